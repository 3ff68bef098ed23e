"""Any two models with one tokenizer, compared by teacher-forced KL. Edits and searches nothing.

Dimensions: P prompts, N scored positions, V vocabulary, D width of the final hidden state; rows
are the scored positions of all prompts. Units are nats.
"""

from heretic_kl.score.bands import Band
from heretic_kl.score.chain import ChainMeasurement, measure_chain
from heretic_kl.score.comparison import Comparison, RankedCandidate, rank
from heretic_kl.score.detail import (
    ConfidenceBucket,
    KLSplit,
    PartMean,
    SignedChange,
    WorstPosition,
    WorstPrompt,
)
from heretic_kl.score.hub import (
    KLMetric,
    MeasuredOn,
    card_metadata,
    evaluation_results,
    merged_with_lm_eval,
)
from heretic_kl.score.loader import Backend, Loading
from heretic_kl.score.measurement import Measurement
from heretic_kl.score.preflight import check_logits_fit, check_models, tokenizer_of
from heretic_kl.score.prompts import DEFAULT_PROMPTS, PromptsLike
from heretic_kl.score.teacher_forced_kl import TeacherForcedKL
from heretic_kl.score.text import Document, TextKL, load_documents

__all__ = [
    "Backend",
    "Band",
    "ChainMeasurement",
    "Comparison",
    "ConfidenceBucket",
    "DEFAULT_PROMPTS",
    "Document",
    "KLMetric",
    "KLSplit",
    "Loading",
    "MeasuredOn",
    "Measurement",
    "PartMean",
    "PromptsLike",
    "RankedCandidate",
    "SignedChange",
    "TeacherForcedKL",
    "TextKL",
    "WorstPosition",
    "WorstPrompt",
    "card_metadata",
    "check_logits_fit",
    "check_models",
    "evaluation_results",
    "load_documents",
    "measure_chain",
    "merged_with_lm_eval",
    "rank",
    "tokenizer_of",
]
