"""Judges of responses: a chat model behind an endpoint, a text classifier. Knows no scorers.

judgement.py   verdicts, the protocol of a judge, each response judged once
question.py    what a chat model is asked, and how its answer is read
endpoint.py    a model of an OpenAI-compatible server: retries, timeouts, concurrency
chat.py        such a model as a judge
classifier.py  a `transformers` text classifier by folder or hub id
"""

from heretic_kl.judging.chat import ChatEndpoint
from heretic_kl.judging.classifier import TextClassifier
from heretic_kl.judging.endpoint import (
    Connection,
    Pace,
    Reply,
    ServedModel,
    endpoint_problem,
    read_key,
)
from heretic_kl.judging.judgement import (
    VERDICTS,
    JudgedOnce,
    Judgement,
    ResponseJudge,
    Verdict,
    check_judge,
)
from heretic_kl.judging.question import Question

__all__ = [
    "ChatEndpoint",
    "Connection",
    "JudgedOnce",
    "Judgement",
    "Pace",
    "Question",
    "Reply",
    "ResponseJudge",
    "ServedModel",
    "TextClassifier",
    "VERDICTS",
    "Verdict",
    "check_judge",
    "endpoint_problem",
    "read_key",
]
