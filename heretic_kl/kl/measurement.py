"""From a prompt-by-position table to a number that says how sure it is.

Averaging order everywhere: within a prompt over its scored positions (weighted by
`position_weights`), then over prompts, each counting alike. Prompts are the independent unit,
so errors are clustered by prompt; where a table has clusters of rows, such as the windows of a
document, a cluster is what a prompt is here. Infinite positions are counted, never averaged.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from heretic_kl.errors import MeasurementError
from heretic_kl.kl.intervals import Interval, bootstrap_interval, sorted_quantile, standard_error
from heretic_kl.kl.table import KLTable
from heretic_kl.kl.terms import METRIC_VERSION, Divergence

NEAR_TIE_MARGIN: Final = 0.1
"""A position is a near tie if the reference's two best tokens differ by less probability."""

QUANTILE_LEVELS: Final = (0.05, 0.25, 0.75, 0.9, 0.95, 0.99, 0.999)

ROWS_BEYOND_QUANTILE: Final = 5
"""A quantile is reported only if this many rows lie beyond it."""

PROMPTS_TO_DISTINGUISH: Final = 6
"""With fewer, equal signs alone would exclude 0 more often than in 5% of ties (2 ** -5)."""


class Quantile(NamedTuple):
    """A quantile over all scored, finite positions."""

    level: float
    value: float  # nats


@dataclass(frozen=True)
class PositionMean:
    """One position of the profile, averaged over the prompts that reach it."""

    position: int
    mean: float | None  # nats; None if no finite row is there
    standard_error: float | None  # nats; None for fewer than two rows
    count: int  # finite rows averaged
    infinite: int  # rows left out because they are infinite


class GroupMean(NamedTuple):
    """The mean over one group of prompts, such as those of one file; nats."""

    name: str
    mean: float
    standard_error: float | None  # clustered; None for one cluster
    clusters: int
    rows: int  # scored positions


@dataclass(frozen=True)
class KLSummary:
    """A divergence with its error. Nats; mean over positions, then over prompts.

    Attributes:
        mean: Divergence over finite scored positions.
        standard_error: Clustered by prompt; None for one prompt.
        interval: 95% percentile bootstrap over prompts; None for one prompt.
        prompts: Prompts, or clusters of them, that were averaged.
        rows: Scored positions, infinite ones included.
        median: Over all finite rows, prompts pooled.
        quantiles: Those that at least `ROWS_BEYOND_QUANTILE` rows lie beyond.
        profile: Mean at each position with the number of rows behind it.
        infinite_count: Rows where the candidate excludes a token that the reference allows.
        top1_agreement: Share of positions where both prefer the same token.
        mean_probability_change: Candidate minus reference, of the reference's own token.
        near_tie_share: Share of the mean that comes from positions where the reference's two
            best tokens are within `near_tie_margin`; 0 if the mean is 0.
        near_tie_margin: The threshold on that difference of probabilities.
        noise_floor: Divergence of an unchanged model, if it was measured.
        below_noise_floor: Whether the mean is no larger than that; None if not measured.
        divergence: Which divergence.
        temperature: Of both distributions.
        metric_version: See `heretic_kl.kl.metric`.
    """

    mean: float
    standard_error: float | None
    interval: Interval | None
    prompts: int
    rows: int
    median: float
    quantiles: tuple[Quantile, ...]
    profile: tuple[PositionMean, ...]
    infinite_count: int
    top1_agreement: float
    mean_probability_change: float
    near_tie_share: float
    near_tie_margin: float = NEAR_TIE_MARGIN
    noise_floor: float | None = None
    below_noise_floor: bool | None = None
    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    metric_version: int = METRIC_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dicts, ready for JSON (no NaN, no infinity)."""
        plain = asdict(self)
        plain["interval"] = None if self.interval is None else self.interval._asdict()
        plain["quantiles"] = [quantile._asdict() for quantile in self.quantiles]
        plain["profile"] = [asdict(place) for place in self.profile]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "KLSummary":
        """Return the summary that `to_dict` described.

        Raises:
            MeasurementError: Another metric version wrote it, or fields are missing.
        """
        version = plain.get("metric_version")
        if version != METRIC_VERSION:
            raise MeasurementError(
                f"the summary was written by metric version {version}, "
                f"this is version {METRIC_VERSION}: measure again"
            )
        fields = dict(plain)
        try:
            interval = fields["interval"]
            fields["interval"] = None if interval is None else Interval(**interval)
            fields["quantiles"] = tuple(Quantile(**quantile) for quantile in fields["quantiles"])
            fields["profile"] = tuple(PositionMean(**place) for place in fields["profile"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise MeasurementError(f"not a KL summary: {error}") from error


class PairedComparison(NamedTuple):
    """The difference `a - b` of two candidates on the same prompts, nats."""

    mean_difference: float
    standard_error: float | None  # clustered by prompt; None for one prompt
    interval: Interval | None  # percentile bootstrap over prompts
    distinguishable: bool  # the interval excludes 0, on `PROMPTS_TO_DISTINGUISH` or more
    prompts: int
    infinite_a: int  # rows left out of both because they are infinite in a
    infinite_b: int


def summarize(
    table: KLTable,
    *,
    position_weights: Tensor | None = None,  # (N,) non-negative, e.g. `geometric_weights`
    noise_floor: float | None = None,
    bootstrap_draws: int = 2000,
) -> KLSummary:
    """Return the table's mean and everything that says how far to trust it.

    The order of prompts and the content of unscored places do not matter. With N = 1 the mean
    is the first-token divergence averaged over prompts.

    Raises:
        ValueError: `position_weights` is not (N,), or negative.
        MeasurementError: No scored position is finite, or one is NaN.
    """
    weights = _position_weights(table, position_weights)
    finite = table.mask & ~table.infinite
    _require_something(table, finite, weights)
    per_prompt = _prompt_means(table, table.values, finite, weights)
    mean = _mean(per_prompt)
    near_tie = finite & (table.reference_margin < NEAR_TIE_MARGIN)
    divergence = torch.where(near_tie, table.values, torch.zeros_like(table.values))
    near_tie_mean = _mean(_prompt_means(table, divergence, finite, weights))
    change = table.candidate_probability - table.reference_probability
    ordered = table.values[finite].sort().values
    return KLSummary(
        mean=mean,
        standard_error=standard_error(per_prompt),
        interval=bootstrap_interval(per_prompt, draws=bootstrap_draws),
        prompts=per_prompt.numel(),
        rows=int(table.mask.sum()),
        median=sorted_quantile(ordered, 0.5),
        quantiles=_supported_quantiles(ordered),
        profile=_profile(table, finite),
        infinite_count=int((table.mask & table.infinite).sum()),
        top1_agreement=_mean(
            _prompt_means(table, table.top1_agreement.double(), table.mask, weights)
        ),
        mean_probability_change=_mean(_prompt_means(table, change, table.mask, weights)),
        near_tie_share=near_tie_mean / mean if mean > 0.0 else 0.0,
        noise_floor=noise_floor,
        below_noise_floor=None if noise_floor is None else mean <= noise_floor,
        divergence=table.divergence,
        temperature=table.temperature,
    )


def group_means(
    table: KLTable,
    groups: Sequence[str],  # P names, in the order of the prompts
    position_weights: Tensor | None = None,  # as in `summarize`
) -> tuple[GroupMean, ...]:
    """Return the mean of each group, in order of first appearance; nats.

    Raises:
        ValueError: There is not one name for each prompt.
        MeasurementError: A group has no finite scored position.
    """
    if len(groups) != table.prompts:
        raise ValueError(f"groups must be {table.prompts} names, got {len(groups)}")
    means = []
    for name in dict.fromkeys(groups):
        part = table.select_prompts(torch.tensor([group == name for group in groups]))
        weights = _position_weights(part, position_weights)
        finite = part.mask & ~part.infinite
        _require_something(part, finite, weights)
        values = _prompt_means(part, part.values, finite, weights)
        error = standard_error(values)
        means.append(GroupMean(name, _mean(values), error, values.numel(), int(part.mask.sum())))
    return tuple(means)


def macro_average(groups: Sequence[GroupMean]) -> GroupMean:
    """Return the mean of the groups' means, each counting alike; groups are independent."""
    errors = [group.standard_error for group in groups if group.standard_error is not None]
    error = math.hypot(*errors) / len(groups) if len(errors) == len(groups) else None
    return GroupMean(
        "macro-average",
        math.fsum(group.mean for group in groups) / len(groups),
        error,
        sum(group.clusters for group in groups),
        sum(group.rows for group in groups),
    )


def lowest_mean(table: KLTable, prompts: int, *, position_weights: Tensor | None = None) -> float:
    """Return what the mean over `prompts` prompts is at least, some of them measured so far.

    Divergences are not negative, so what is not there counts 0. Rounding is allowed for. NaN
    stays NaN.

    Args:
        table: All scored positions of some of the prompts.
        prompts: How many prompts the mean is over in the end.
        position_weights: As in `summarize`.
    """
    weights = _position_weights(table, position_weights)
    per_prompt = _prompt_means(table, table.values, table.mask & ~table.infinite, weights)
    return math.fsum(per_prompt.tolist()) / prompts * (1.0 - 1e-9)


def compare_paired(
    a: KLTable,
    b: KLTable,
    *,
    position_weights: Tensor | None = None,  # (N,) non-negative
    bootstrap_draws: int = 2000,
) -> PairedComparison:
    """Return how candidate `a` differs from `b`, paired by prompt: negative if `a` is closer.

    Positions that are infinite in either are left out of both. Differences are averaged over
    positions within each prompt, then over prompts.

    Raises:
        ValueError: `position_weights` is not (N,), or negative.
        MeasurementError: The tables do not score the same positions of the same reference, or
            no position is finite in both.
    """
    _require_same_reference(a, b)
    weights = _position_weights(a, position_weights)
    finite = a.mask & ~a.infinite & ~b.infinite
    _require_something(a, finite, weights)
    _require_something(b, finite, weights)
    difference = torch.where(finite, a.values, 0.0) - torch.where(finite, b.values, 0.0)
    per_prompt = _prompt_means(a, difference, finite, weights)
    interval = bootstrap_interval(per_prompt, draws=bootstrap_draws)
    excludes_zero = interval is not None and not interval.low <= 0.0 <= interval.high
    return PairedComparison(
        mean_difference=_mean(per_prompt),
        standard_error=standard_error(per_prompt),
        interval=interval,
        distinguishable=excludes_zero and per_prompt.numel() >= PROMPTS_TO_DISTINGUISH,
        prompts=per_prompt.numel(),
        infinite_a=int((a.mask & a.infinite).sum()),
        infinite_b=int((b.mask & b.infinite).sum()),
    )


def prompt_means(
    table: KLTable,
    *,
    values: Tensor | None = None,  # (P, N) float64, in place of the table's
    keep: Tensor | None = None,  # (P, N) bool, the finite positions that count
    position_weights: Tensor | None = None,  # (N,) non-negative
) -> Tensor:
    """Return each prompt's mean over its finite positions, nats; `KLSummary.mean` is their mean.

    Prompts without a position that counts are left out.

    Raises:
        ValueError: `position_weights` is not (N,), or negative.
        MeasurementError: no position is left, or one is NaN.
    """
    weights = _position_weights(table, position_weights)
    finite = table.mask & ~table.infinite
    finite = finite if keep is None else finite & keep
    _require_something(table, finite, weights)
    return _prompt_means(table, table.values if values is None else values, finite, weights)


def _position_weights(table: KLTable, weights: Tensor | None) -> Tensor:
    """Return (N,) float64 weights, or raise `ValueError`."""
    if weights is None:
        return torch.ones(table.positions, dtype=torch.float64)
    if weights.shape != (table.positions,):
        raise ValueError(
            f"position_weights must be ({table.positions},) to fit a table "
            f"{tuple(table.values.shape)}, got {tuple(weights.shape)}"
        )
    checked = weights.detach().to(device="cpu", dtype=torch.float64)
    if not bool(((checked >= 0.0) & (checked < float("inf"))).all()):
        raise ValueError("position_weights must be finite and not negative")
    return checked


def _prompt_means(table: KLTable, values: Tensor, keep: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over kept positions of each prompt or cluster that has any."""
    weight = keep * weights
    total = torch.where(weight > 0.0, values, 0.0).mul(weight).sum(dim=-1)
    norm = weight.sum(dim=-1)
    if table.clusters is not None:
        _, index = torch.unique(table.clusters, return_inverse=True)
        total = torch.bincount(index, total)
        norm = torch.bincount(index, norm)
    counted = norm > 0.0
    return total[counted] / norm[counted]


def _mean(per_prompt: Tensor) -> float:
    """Return the mean over prompts, summed exactly: the same to the last bit in any order."""
    return math.fsum(per_prompt.tolist()) / per_prompt.numel()


def _require_something(table: KLTable, finite: Tensor, weights: Tensor) -> None:
    """Raise `MeasurementError` if no position is left to average, or one is NaN."""
    if bool(torch.isnan(table.values[finite]).any()):
        raise MeasurementError("the table holds NaN at a scored position")
    if not bool((finite & (weights > 0.0)).any()):
        infinite = int((table.mask & table.infinite).sum())
        raise MeasurementError(
            f"nothing left to score: of {int(table.mask.sum())} positions {infinite} are "
            f"infinite and the rest are masked or have weight 0"
        )


def _supported_quantiles(ordered: Tensor) -> tuple[Quantile, ...]:
    """Return the quantiles that enough rows lie beyond."""
    rows = ordered.numel()
    return tuple(
        Quantile(level, sorted_quantile(ordered, level))
        for level in QUANTILE_LEVELS
        if rows * min(level, 1.0 - level) >= ROWS_BEYOND_QUANTILE - 1e-9
    )


def _profile(table: KLTable, finite: Tensor) -> tuple[PositionMean, ...]:
    """Return the mean over prompts at each position."""
    places = []
    for position in range(table.positions):
        values = table.values[finite[:, position], position]
        mean = _mean(values) if values.numel() else None
        infinite = int((table.mask & table.infinite)[:, position].sum())
        error = standard_error(values)
        places.append(PositionMean(position, mean, error, values.numel(), infinite))
    return tuple(places)


def _require_same_reference(a: KLTable, b: KLTable) -> None:
    """Raise `MeasurementError`, saying which, unless both measured the same rows alike."""
    if a.lower_bound or b.lower_bound:
        raise MeasurementError("a lower bound cannot be paired: its distance to the KL is unknown")
    if a.values.shape != b.values.shape:
        raise MeasurementError(
            f"tables of {tuple(a.values.shape)} and {tuple(b.values.shape)} prompts and "
            f"positions cannot be paired"
        )
    if a.divergence != b.divergence or a.temperature != b.temperature:
        raise MeasurementError(
            f"tables measured as {a.divergence} at temperature {a.temperature} and {b.divergence} "
            f"at temperature {b.temperature} cannot be paired"
        )
    if not torch.equal(a.mask, b.mask) or not torch.equal(_clusters(a), _clusters(b)):
        raise MeasurementError("tables that score different positions cannot be paired")


def _clusters(table: KLTable) -> Tensor:
    return torch.arange(table.prompts) if table.clusters is None else table.clusters
