"""What a measurement tells beside its mean: signed change, worst places, thoughts, refusals."""

from heretic_kl.score.detail.change import (
    ConfidenceBucket,
    PartMean,
    SignedChange,
    part_means,
    signed_change,
)
from heretic_kl.score.detail.inputs import ForcedInputs
from heretic_kl.score.detail.split import KLSplit, PassNotes, split_of
from heretic_kl.score.detail.worst import (
    WorstPosition,
    WorstPrompt,
    worst_positions,
    worst_prompts,
)

__all__ = [
    "ConfidenceBucket",
    "ForcedInputs",
    "KLSplit",
    "PartMean",
    "PassNotes",
    "SignedChange",
    "WorstPosition",
    "WorstPrompt",
    "part_means",
    "signed_change",
    "split_of",
    "worst_positions",
    "worst_prompts",
]
