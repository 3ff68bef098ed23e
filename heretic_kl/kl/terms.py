"""The summand of each divergence, non-negative. Knows only (rows, V) blocks.

With `D = log p - log q`, the identity `KL(p || q) = sum(q - p + p D)` holds because both
distributions sum to one, and every summand of it is non-negative. An error `c` in a row's
normalizer enters only as `exp(c) - 1 - c`, to second order, and identical rows, with `D = 0`, give
exactly 0. The identity is computed in one of two ways.

Float32 logits on a CPU: as it stands, in float64, where what cancels leaves less than 1e-15. Few
passes over memory, no transcendental function beside the normalizers' own.

Elsewhere, where there is no wider type or it is slow: with the larger of the two probabilities in
front, so that neither overflow nor cancellation can make a summand negative. With `a = |D|`, the
part `J` that is even in `D` and the part `h` that is odd,

    summand = max(p, q) (J + sign(D) h)
    J = a (1 - exp(-a)) / 2
    h = a - (1 - exp(-a)) (1 + a / 2),   between a^3 (1 - a / 2) / 12 and a^3 / 12

where the bounds take over from `h` when `a` is so small that it would cancel. For `D >= 0` this is
`p (expm1(-D) + D)`. This is why float32 measures divergences of 1e-12 meaningfully.
"""

import math
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from heretic_kl.errors import MeasurementError

METRIC_VERSION: Final = 2
"""Raised whenever the same two models would measure differently than before; a stored table or
reference carries it, and two versions never mix."""

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
"""`forward_kl` is KL(reference || candidate), `reverse_kl` is KL(candidate || reference)."""

DIVERGENCES: Final[tuple[Divergence, ...]] = ("forward_kl", "reverse_kl", "jensen_shannon")

BLOCK_ELEMENTS: Final = {"cpu": 2**18}
"""Elements worked on at once, by device type: on a CPU for each thread, sized for its cache."""

_BLOCK_ELEMENTS_ELSEWHERE: Final = 2**22
"""On an accelerator: large enough to hide launches, about 16 MB for each temporary."""

_RUN: Final = 256
"""Tokens whose largest logit is looked for first."""

_NEGLIGIBLE_FROM: Final = 50.0
"""`exp(-a) (1 + a)` is below float64's rounding of 1 from here on."""

_JS_SERIES_BELOW: Final = 0.1


class Distribution(NamedTuple):
    """Logits of a block of rows, and what follows from them alone."""

    logits: Tensor  # (rows, V) float32 or float64, already divided by the temperature
    log_normalizer: Tensor  # (rows,) float64, log-sum-exp; NaN if the row has none
    probability: Tensor  # (rows, V) float64, or the logits' dtype where that is slow

    def of(self, rows: slice) -> "Distribution":
        """Return some of the rows."""
        return Distribution(*(tensor[rows] for tensor in self))


class BlockDivergence(NamedTuple):
    """Per-row results of one block; a row with a NaN normalizer has no meaning."""

    values: Tensor  # (rows,) float64, nats, +inf where `infinite`
    infinite: Tensor  # (rows,) bool


def row_blocks(rows: int, width: int, elements: int) -> Iterator[slice]:
    """Yield slices of at most `elements / width` rows (at least one) covering `rows`."""
    step = max(1, elements // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def block_elements(device: torch.device) -> int:
    """Return how many elements a block of the divergence arithmetic may have on `device`."""
    if device.type in BLOCK_ELEMENTS:
        per_thread = BLOCK_ELEMENTS[device.type]
        return min(per_thread * torch.get_num_threads(), _BLOCK_ELEMENTS_ELSEWHERE)
    return _BLOCK_ELEMENTS_ELSEWHERE


def working_device(tensor: Tensor) -> torch.device:
    """Return where blocks of `tensor` are worked on: its device, or the CPU for Apple's.

    Apple's has no float64.
    """
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def working_dtype(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Return in which dtype rows of these two are compared: float64 if either is."""
    return torch.float64 if torch.float64 in (first, second) else torch.float32


def working(logits: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """Return (rows, V) raw logits as they are worked on, divided by `temperature`."""
    wide = logits.to(device=working_device(logits), dtype=dtype)
    return wide if temperature == 1.0 else wide / temperature


def distribution(logits: Tensor, dtype: torch.dtype, temperature: float) -> Distribution:
    """Return the distribution of (rows, V) raw logits of any floating dtype.

    Never raises on NaN (see `require_finite`).
    """
    scaled = working(logits, dtype, temperature)
    return Distribution(scaled, *_normalize(scaled))


def best_tokens(
    logits: Tensor,  # (rows, V)
) -> Tensor:
    """Return `logits.argmax(-1)`: each row's best token, (rows,) int64, the first of equal ones.

    On a CPU the largest of each run of tokens comes first, which is several times as fast.
    """
    runs = logits.shape[-1] // _RUN
    if logits.device.type != "cpu" or runs < 2:
        return logits.argmax(dim=-1)
    head = logits[:, : runs * _RUN].view(len(logits), runs, _RUN)
    tail = logits[:, runs * _RUN :]
    run = head.amax(dim=-1).argmax(dim=-1)
    inside = head[torch.arange(len(logits)), run]
    best = run * _RUN + inside.argmax(dim=-1)
    if not tail.shape[-1]:
        return best
    last = tail.argmax(dim=-1)
    values = [x.gather(-1, at[:, None]).squeeze(-1) for x, at in ((logits, best), (tail, last))]
    later = (values[1] > values[0]) | (values[1].isnan() & ~values[0].isnan())
    return torch.where(later, runs * _RUN + last, best)


def log_normalizer(logits: Tensor) -> Tensor:
    """Return log-sum-exp of each row of (rows, V) as (rows,) float64; NaN if it has none.

    A row has none if it holds NaN or +inf, or nothing but -inf.
    """
    return _normalize(logits)[0]


def block_divergence(
    reference: Distribution,
    candidate: Distribution,  # same shape, dtype and device
    divergence: Divergence,
) -> BlockDivergence:
    """Return the divergence of each row in nats; never raises on NaN (see `require_finite`)."""
    if divergence == "jensen_shannon":
        values = _jensen_shannon(reference, candidate)
        return BlockDivergence(values, torch.zeros_like(values, dtype=torch.bool))
    if divergence == "reverse_kl":
        reference, candidate = candidate, reference
    if reference.probability.dtype == reference.logits.dtype:
        return _kl(reference, candidate)
    return _kl_in_float64(reference, candidate)


def require_finite(log_normalizers: Tensor, whose: str) -> None:
    """Raise `MeasurementError` naming the first row whose logits define no distribution."""
    broken = ~torch.isfinite(log_normalizers)
    if bool(broken.any()):
        row = int(broken.nonzero()[0].item())
        raise MeasurementError(
            f"the {whose} logits define no distribution in {int(broken.sum())} of "
            f"{broken.numel()} rows (first: row {row}): they hold NaN or +inf, or only -inf"
        )


def require_divergence(divergence: str) -> None:
    """Raise `ValueError` unless `divergence` is one of `DIVERGENCES`."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")


def require_temperature(temperature: float) -> None:
    """Raise `ValueError` unless `temperature` is positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _normalize(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's log-sum-exp, (rows,) float64, and its probabilities, (rows, V)."""
    peak = logits.amax(dim=-1, keepdim=True)
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        probability = logits.to(torch.float64).sub_(peak).exp_()
    else:
        probability = (logits - peak).exp_()
    total = probability.sum(dim=-1, dtype=torch.float64)
    probability.div_(total.to(probability.dtype).unsqueeze(-1))
    return peak.squeeze(-1).to(torch.float64) + total.log(), probability


def _kl_in_float64(reference: Distribution, candidate: Distribution) -> BlockDivergence:
    """Return KL(reference || candidate) of float32 logits whose probabilities are float64.

    The order of operations is written for few passes over memory: this is the hot loop.
    """
    p, q = reference.probability, candidate.probability
    ratio = reference.logits.to(torch.float64).sub_(candidate.logits)
    # D - 1, so that q - p + p D is one operation.
    ratio.sub_((reference.log_normalizer - candidate.log_normalizer + 1.0).unsqueeze(-1))
    # Both -inf, or only the first: contributes q. Only the second: infinite.
    ratio.nan_to_num_(nan=0.0, posinf=math.inf, neginf=0.0)
    total = torch.addcmul(q, p, ratio).clamp_min_(0.0).sum(dim=-1)
    infinite = ~torch.isfinite(total)  # NaN where p underflows to 0 and q is excluded
    return BlockDivergence(total.masked_fill_(infinite, math.inf), infinite)


def _log_ratio(reference: Distribution, candidate: Distribution) -> Tensor:
    """Return log p - log q in the logits' dtype, NaN where both are -inf."""
    ratio = reference.logits - candidate.logits
    shift = reference.log_normalizer - candidate.log_normalizer
    return ratio.sub_(shift.to(ratio.dtype).unsqueeze(-1))


def _kl(reference: Distribution, candidate: Distribution) -> BlockDivergence:
    """Return KL(reference || candidate) in the logits' dtype."""
    larger = torch.maximum(reference.probability, candidate.probability)
    ratio = _log_ratio(reference, candidate)
    # Both -inf: NaN, contributes 0. Only the first: contributes q. Only the second: infinite.
    ratio.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf).clamp_(min=-_NEGLIGIBLE_FROM)
    infinite = ratio.amax(dim=-1) == math.inf
    size = ratio.abs()
    decay = size.neg().expm1_()  # exp(-a) - 1
    even = (size * decay).mul_(-0.5)
    odd = decay.add_(size).sub_(even)
    upper = (size * size).mul_(size).mul_(1.0 / 12.0)
    lower = size.mul_(-0.5).add_(1.0).mul_(upper)
    torch.maximum(odd, lower, out=odd)
    torch.minimum(odd, upper, out=odd)
    summand = even.add_(odd.copysign_(ratio)).mul_(larger)
    total = summand.sum(dim=-1, dtype=torch.float64)
    return BlockDivergence(total.masked_fill_(infinite, math.inf), infinite)


def _jensen_shannon(reference: Distribution, candidate: Distribution) -> Tensor:
    """Return the Jensen-Shannon divergence of each row, symmetric to the last bit.

    With `m = (p + q) / 2` and `u = |p - q| / (p + q)` a summand is
    `m ((1 + u) log(1 + u) + (1 - u) log(1 - u)) / 2`.
    """
    larger = torch.maximum(reference.probability, candidate.probability)
    ratio = _log_ratio(reference, candidate)
    ratio.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    decay = ratio.abs_().neg_().expm1_()
    both = decay + 2.0  # 1 + min(p, q) / max(p, q)
    contrast = decay.neg_().div_(both)
    square = contrast * contrast
    terms = 9 if square.dtype == torch.float64 else 4
    series = torch.full_like(square, 1.0 / (terms * (2 * terms - 1)))
    for k in range(terms - 1, 0, -1):
        series.mul_(square).add_(1.0 / (k * (2 * k - 1)))
    series.mul_(square)
    closed = torch.special.xlog1py(1.0 + contrast, contrast)
    closed += torch.special.xlog1py(1.0 - contrast, -contrast)
    summand = torch.where(contrast < _JS_SERIES_BELOW, series, closed)
    summand.mul_(both).mul_(larger).mul_(0.25)
    # Rounding of the normalizers may carry disjoint distributions past the bound by an ulp.
    return summand.sum(dim=-1, dtype=torch.float64).clamp_(max=math.log(2.0))
