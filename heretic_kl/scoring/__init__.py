"""Scorer contract, requests, loader and suite: everything a scorer plug-in may import.

Dimensions: P prompts, N scored positions, V vocabulary; rows are the scored positions of all
prompts.
"""

from heretic_kl.judging import (
    ChatEndpoint,
    JudgedOnce,
    Judgement,
    Pace,
    ResponseJudge,
    TextClassifier,
    Verdict,
    check_judge,
    endpoint_problem,
    read_key,
)
from heretic_kl.kl_options import KLOptions, sampling_seed
from heretic_kl.requests import (
    ModelRequest,
    ModelResult,
    PartialResponses,
    PartialRows,
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    RowReduction,
    Sampling,
    SoFar,
    StopRule,
    TeacherForcedRequest,
    TeacherForcedResult,
)
from heretic_kl.scoring.agreement import Agreement, agreement_text
from heretic_kl.scoring.degenerate import Degeneracy, degeneracy
from heretic_kl.scoring.harness import HarnessTask
from heretic_kl.scoring.loader import (
    build_scorer,
    built_in_scorers,
    documented_settings,
    scorer_code,
)
from heretic_kl.scoring.paired import (
    PairedDifference,
    alike,
    intervals_overlap,
    paired_difference,
    paired_scores,
)
from heretic_kl.scoring.racing import Rival, Stopped
from heretic_kl.scoring.refusal_count import RefusalCount, RefusalSettings
from heretic_kl.scoring.refusal_rule import PreviewedResponse, RefusalRule
from heretic_kl.scoring.scorer import (
    Bounds,
    Meaning,
    PromptKind,
    Role,
    Score,
    Scorer,
    ScorerContext,
    ScorerSettings,
    likely_value,
)
from heretic_kl.scoring.suite import (
    KL_TOKENS,
    MeasuringEngine,
    ScorerSpec,
    Suite,
    summed_judging,
)

__all__ = [
    "Agreement",
    "ChatEndpoint",
    "JudgedOnce",
    "Judgement",
    "KL_TOKENS",
    "KLOptions",
    "sampling_seed",
    "Bounds",
    "Degeneracy",
    "HarnessTask",
    "Meaning",
    "MeasuringEngine",
    "ModelRequest",
    "ModelResult",
    "Pace",
    "PairedDifference",
    "PartialResponses",
    "PartialRows",
    "PreviewedResponse",
    "PromptKind",
    "RefusalCount",
    "RefusalRule",
    "RefusalSettings",
    "Request",
    "ResponseRequest",
    "ResponseResult",
    "ResponseJudge",
    "Result",
    "Rival",
    "Role",
    "RowReduction",
    "Sampling",
    "Score",
    "Scorer",
    "ScorerContext",
    "ScorerSettings",
    "ScorerSpec",
    "SoFar",
    "StopRule",
    "Stopped",
    "Suite",
    "TeacherForcedRequest",
    "TeacherForcedResult",
    "TextClassifier",
    "Verdict",
    "agreement_text",
    "alike",
    "build_scorer",
    "check_judge",
    "degeneracy",
    "built_in_scorers",
    "documented_settings",
    "endpoint_problem",
    "intervals_overlap",
    "paired_difference",
    "read_key",
    "paired_scores",
    "scorer_code",
    "summed_judging",
    "likely_value",
]
