"""Divergences between an original and an edited model, with their errors. Torch only.

Knows nothing about tokenizers, prompts' text, settings or how a model is run.

    P  prompts
    N  scored positions of the reference's response (the last one predicts the end token)
    V  vocabulary
    D  width of the final hidden state
    rows  scored positions of all prompts, flattened: at most P * N

Units are nats. Unless a docstring says otherwise a divergence is forward,
KL(reference || candidate), and a mean is over positions within the mask, then over prompts.

    divergence.py   forward, reverse, Jensen-Shannon of two tensors
    terms.py        their summands, never negative
    rows.py         everything one position tells
    head.py         hidden states to logits in chunks
    table.py        prompts by positions
    openers.py      the KL split into the mass of some first tokens, and the rest
    measurement.py  means with errors; two candidates compared in pairs
    intervals.py    Wilson, bootstrap
    reference.py    the original model's responses and states: given, loaded or computed
    storage.py      safetensors, written whole or not at all; what a reference is known by
    loss.py         the differentiable version
    packing.py      weights packed for the CPU's matrix products
"""

from heretic_kl.kl.divergence import (
    forward_kl,
    geometric_weights,
    jensen_shannon,
    reverse_kl,
)
from heretic_kl.kl.head import Head
from heretic_kl.kl.intervals import (
    Interval,
    MeanEstimate,
    bootstrap_interval,
    mean_estimate,
    standard_error,
    wilson_interval,
)
from heretic_kl.kl.loss import kl_divergence_loss
from heretic_kl.kl.measurement import (
    NEAR_TIE_MARGIN,
    GroupMean,
    KLSummary,
    PairedComparison,
    PositionMean,
    Quantile,
    compare_paired,
    group_means,
    lowest_mean,
    macro_average,
    prompt_means,
    summarize,
)
from heretic_kl.kl.openers import OpenerMass, OpenerReduction, SplitKL, split_at_opening
from heretic_kl.kl.reference import LogitBlock, Reference, RowLogits
from heretic_kl.kl.rows import (
    DivergenceReduction,
    ReferenceRows,
    RowStatistics,
    reference_rows,
    row_statistics,
)
from heretic_kl.kl.storage import ReferenceIdentity, vocabulary_hash
from heretic_kl.kl.table import KLTable
from heretic_kl.kl.terms import METRIC_VERSION, Divergence

__all__ = [
    "METRIC_VERSION",
    "NEAR_TIE_MARGIN",
    "Divergence",
    "DivergenceReduction",
    "GroupMean",
    "Head",
    "Interval",
    "MeanEstimate",
    "KLSummary",
    "KLTable",
    "LogitBlock",
    "OpenerMass",
    "OpenerReduction",
    "PairedComparison",
    "PositionMean",
    "Quantile",
    "Reference",
    "ReferenceIdentity",
    "ReferenceRows",
    "RowLogits",
    "RowStatistics",
    "SplitKL",
    "bootstrap_interval",
    "mean_estimate",
    "compare_paired",
    "forward_kl",
    "geometric_weights",
    "group_means",
    "jensen_shannon",
    "kl_divergence_loss",
    "lowest_mean",
    "macro_average",
    "prompt_means",
    "reference_rows",
    "reverse_kl",
    "row_statistics",
    "split_at_opening",
    "standard_error",
    "summarize",
    "vocabulary_hash",
    "wilson_interval",
]
