"""Divergences between two next-token distributions. Knows nothing about models or tokens.

Everything is in nats and reads raw logits, not scores that a sampler has processed. For a
differentiable loss see `heretic_kl.kl.loss`.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from heretic_kl.errors import MeasurementError
from heretic_kl.kl.terms import (
    Divergence,
    block_divergence,
    block_elements,
    distribution,
    log_normalizer,
    require_divergence,
    require_finite,
    require_temperature,
    row_blocks,
    working,
    working_device,
    working_dtype,
)

Inputs = Literal["logits", "log_probabilities"]
Reduction = Literal["none", "sum", "batchmean"]


def forward_kl(
    *,
    reference: Tensor,  # (..., V) raw logits or log-probabilities
    candidate: Tensor,  # (..., V) same shape and device
    temperature: float = 1.0,
    inputs: Inputs = "logits",
    mask: Tensor | None = None,  # (...) bool, True where a row is scored
    weights: Tensor | None = None,  # (...) or (N,), non-negative
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Return KL(reference || candidate) in nats, float64.

    A token that is -inf in both contributes 0. One that is -inf in the candidate alone makes
    its row +inf, and with it `sum` and `batchmean`; `row_statistics` counts such rows instead.
    A token that is -inf in the reference alone contributes the candidate's probability.

    Args:
        reference: Distributions over the last dimension; float16, bfloat16, float32, float64.
        candidate: Distributions compared with `reference`, row by row.
        temperature: Both logits are divided by it.
        inputs: `log_probabilities` must sum to one in each row; that is checked.
        mask: Rows that are False are never read: NaN may stand there.
        weights: Row or position weights, see `geometric_weights`. A row of weight 0 is not read.
        reduction: `none` returns `weight * divergence` of shape (...), 0 where masked; `sum`
            adds that up; `batchmean` is the sum over the vocabulary and the weighted mean over
            all scored rows at once (not first within a prompt: that is `summarize`).

    Returns:
        (...) or a scalar, float64, never negative and exactly 0 for identical rows.

    Raises:
        ValueError: Shapes, devices, dtypes or options do not fit; both shapes are named.
        MeasurementError: A scored row holds NaN or +inf, or `batchmean` has nothing to average.
    """
    return _reduced(
        "forward_kl", reference, candidate, temperature, inputs, mask, weights, reduction
    )


def reverse_kl(
    *,
    reference: Tensor,  # (..., V) raw logits or log-probabilities
    candidate: Tensor,  # (..., V) same shape and device
    temperature: float = 1.0,
    inputs: Inputs = "logits",
    mask: Tensor | None = None,  # (...) bool
    weights: Tensor | None = None,  # (...) or (N,)
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Return KL(candidate || reference) in nats, float64; arguments as in `forward_kl`.

    Here a token that is -inf in the *reference* alone makes the row infinite.
    """
    return _reduced(
        "reverse_kl", reference, candidate, temperature, inputs, mask, weights, reduction
    )


def jensen_shannon(
    *,
    reference: Tensor,  # (..., V) raw logits or log-probabilities
    candidate: Tensor,  # (..., V) same shape and device
    temperature: float = 1.0,
    inputs: Inputs = "logits",
    mask: Tensor | None = None,  # (...) bool
    weights: Tensor | None = None,  # (...) or (N,)
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Return the Jensen-Shannon divergence in nats, float64; arguments as in `forward_kl`.

    It is `KL(p || m) / 2 + KL(q || m) / 2` with `m = (p + q) / 2`: symmetric in its arguments
    to the last bit, always finite, at most ln 2 (Lin 1991, doi:10.1109/18.61115).
    """
    return _reduced(
        "jensen_shannon", reference, candidate, temperature, inputs, mask, weights, reduction
    )


def geometric_weights(positions: int, ratio: float) -> Tensor:
    """Return (positions,) float64 `ratio ** t`: 1 at the first position.

    Weights are not normalized here: every mean divides by the weights it used, so a prompt
    that ends early is not counted for less.

    Raises:
        ValueError: `positions` is below 1, or `ratio` is not in (0, 1].
    """
    if positions < 1:
        raise ValueError(f"positions must be at least 1, got {positions}")
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    return torch.tensor(ratio, dtype=torch.float64) ** torch.arange(positions)


def require_same_shape(reference: Tensor, candidate: Tensor) -> None:
    """Raise `ValueError`, naming both, unless shape, device and kind of dtype fit."""
    if reference.shape != candidate.shape:
        raise ValueError(
            f"reference and candidate must have the same shape, got "
            f"{tuple(reference.shape)} and {tuple(candidate.shape)}"
        )
    if reference.dim() == 0 or reference.shape[-1] == 0:
        raise ValueError(f"the last dimension must be a vocabulary, got {tuple(reference.shape)}")
    if reference.device != candidate.device:
        raise ValueError(
            f"reference and candidate must be on one device, got "
            f"{reference.device} and {candidate.device}"
        )
    for name, tensor in (("reference", reference), ("candidate", candidate)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


@torch.no_grad()
def _reduced(
    divergence: Divergence,
    reference: Tensor,
    candidate: Tensor,
    temperature: float,
    inputs: Inputs,
    mask: Tensor | None,
    weights: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    """Check everything, measure the rows that count, and reduce them."""
    require_divergence(divergence)
    require_same_shape(reference, candidate)
    require_temperature(temperature)
    if inputs not in ("logits", "log_probabilities"):
        raise ValueError(f"inputs must be logits or log_probabilities, got {inputs!r}")
    if reduction not in ("none", "sum", "batchmean"):
        raise ValueError(f"reduction must be none, sum or batchmean, got {reduction!r}")
    shape = reference.shape[:-1]
    weight = _row_weights(shape, mask, weights)  # (rows,) float64 on the CPU
    scored_rows = weight.nonzero().squeeze(-1)
    width = reference.shape[-1]
    pieces = _kept_divergence(
        divergence,
        reference.reshape(-1, width),
        candidate.reshape(-1, width),
        scored_rows,
        temperature,
        inputs,
    )
    device = working_device(reference)
    weight, scored_rows = weight.to(device), scored_rows.to(device)
    scored = pieces * weight[scored_rows]
    if reduction == "none":
        full = torch.zeros(weight.shape, dtype=torch.float64, device=device)
        return full.index_copy_(0, scored_rows, scored).reshape(shape)
    if reduction == "sum":
        return scored.sum()
    if scored_rows.numel() == 0:
        raise MeasurementError("nothing left to score: every row is masked or has weight 0")
    return scored.sum() / weight[scored_rows].sum()


def _kept_divergence(
    divergence: Divergence,
    reference: Tensor,  # (rows, V)
    candidate: Tensor,  # (rows, V)
    scored_rows: Tensor,  # (scored,) int64 row numbers on the CPU
    temperature: float,
    inputs: Inputs,
) -> Tensor:
    """Return (scored,) float64 divergences, block by block of rows."""
    whole = scored_rows.numel() == reference.shape[0]
    # Filled in place: small results among freed blocks of megabytes would fragment the heap.
    columns = torch.empty(
        (3, scored_rows.numel()), dtype=torch.float64, device=working_device(reference)
    )
    elements = block_elements(reference.device)
    dtype = working_dtype(reference.dtype, candidate.dtype)
    for block in row_blocks(scored_rows.numel(), reference.shape[-1], elements):
        rows = block if whole else scored_rows[block].to(reference.device)
        first, second = reference[rows], candidate[rows]
        if inputs == "log_probabilities":
            _require_normalized(first, "reference")
            _require_normalized(second, "candidate")
        p = distribution(first, dtype, temperature)
        q = distribution(second, dtype, temperature)
        columns[0, block] = block_divergence(p, q, divergence).values
        columns[1, block] = p.log_normalizer
        columns[2, block] = q.log_normalizer
    require_finite(columns[1], "reference")
    require_finite(columns[2], "candidate")
    return columns[0]


def _row_weights(shape: torch.Size, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    """Return (rows,) float64 weights on the CPU, 0 where a row is masked."""
    weight = torch.ones(shape, dtype=torch.float64)
    if weights is not None:
        fits = weights.shape == shape or (len(shape) > 0 and weights.shape == shape[-1:])
        if not fits:
            raise ValueError(
                f"weights must have the rows' shape {tuple(shape)} or that of the positions "
                f"{tuple(shape[-1:])}, got {tuple(weights.shape)}"
            )
        checked = weights.detach().to(device="cpu", dtype=torch.float64)
        if not bool(((checked >= 0.0) & (checked < math.inf)).all()):
            raise ValueError("weights must be finite and not negative")
        weight = weight * checked
    if mask is not None:
        if mask.shape != shape:
            raise ValueError(
                f"mask must have the rows' shape {tuple(shape)}, got {tuple(mask.shape)}"
            )
        weight = weight.masked_fill(~mask.to(device="cpu", dtype=torch.bool), 0.0)
    return weight.reshape(-1)


def _require_normalized(log_probabilities: Tensor, whose: str) -> None:
    """Raise `MeasurementError` if rows said to be log-probabilities do not sum to one."""
    dtype = log_probabilities.dtype
    tolerance = 0.1 if dtype in (torch.float16, torch.bfloat16) else 1e-3
    total = log_normalizer(working(log_probabilities, working_dtype(dtype, dtype), 1.0))
    worst = float(total.nan_to_num(nan=0.0).abs().max())
    if worst > tolerance:
        raise MeasurementError(
            f"the {whose} log-probabilities do not sum to one (log of the sum is off by "
            f"{worst:.3g}): pass inputs='logits' for raw logits"
        )
