"""What a trial may vary. Draws nothing, and knows nothing about models' insides.

Ranges are fixed: what depends on another parameter is derived afterwards, so that one
multivariate sampler can learn from every trial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from heretic_kl.ablation import Component, EditParameters, NormMode, Refinement, WeightKernel

Range = tuple[float, float]

SCOPES = ("global", "per layer")
POSITION: Range = (0.2, 0.95)
"""Where the global direction is taken, as a share of the depth."""
PEAK_WEIGHT: Mapping[Component, Range] = {"attention": (0.0, 1.5), "mlp": (-0.4, 1.5)}
"""From no edit at all: mild edits must be in reach. An MLP weight of 0 or less is off."""
PEAK_POSITION: Range = (0.2, 1.0)
"""As a share of the depth."""
FLOOR: Range = (0.0, 1.0)
"""Weight at the end of the reach, as a share of the peak weight."""
REACH: Range = (0.1, 1.0)
"""As a share of the depth."""


@dataclass(frozen=True)
class SearchSpace:
    """The edits that a study chooses from."""

    layers: int
    components: tuple[Component, ...] = ("attention", "mlp")
    norm: NormMode = "none"

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, in the order in which it is drawn, and what it may be."""
        chosen: dict[str, BaseDistribution] = {
            "direction.scope": CategoricalDistribution(SCOPES),
            "direction.position": FloatDistribution(*POSITION),
        }
        for component in self.components:
            for name, bounds in _kernel_ranges(component).items():
                chosen[name] = FloatDistribution(*bounds)
        return chosen

    def edit(self, chosen: Mapping[str, Any]) -> EditParameters:
        """The edit that chosen parameters stand for; positions and reach in layers."""
        depth = self.layers - 1
        kernels: dict[Component, WeightKernel] = {}
        for component in self.components:
            peak = float(chosen[f"{component}.peak_weight"])
            if peak <= 0:
                continue
            kernels[component] = WeightKernel(
                peak_weight=peak,
                peak_position=float(chosen[f"{component}.peak_position"]) * depth,
                floor_weight=float(chosen[f"{component}.floor"]) * peak,
                reach=float(chosen[f"{component}.reach"]) * depth,
            )
        position = None
        if chosen["direction.scope"] == "global":
            position = float(chosen["direction.position"]) * depth
        return EditParameters(position, kernels, self.norm)

    def known_good(self) -> tuple[dict[str, Any], ...]:
        """Plausible edits, tried before random ones.

        Chosen by the literature and by what worked on the demo model; measured on no other.
        """
        return tuple(self._start(start) for start in _STARTS)

    def _start(self, start: _Start) -> dict[str, Any]:
        peaks: dict[Component, float] = {"attention": start.attention, "mlp": start.mlp}
        chosen: dict[str, Any] = {
            "direction.scope": start.scope,
            "direction.position": start.position,
        }
        for component in self.components:
            chosen[f"{component}.peak_weight"] = peaks[component]
            chosen[f"{component}.peak_position"] = 0.65
            chosen[f"{component}.floor"] = start.floor
            chosen[f"{component}.reach"] = start.reach
        return chosen


class _Start(NamedTuple):
    """A known-good edit."""

    scope: str
    position: float
    attention: float
    mlp: float
    floor: float
    reach: float


_STARTS = (
    # Gentle: learning starts from these, and a model that refuses little needs no more.
    _Start("global", 0.65, 0.5, 0.5, 1.0, 1.0),
    _Start("global", 0.65, 0.3, 0.3, 1.0, 1.0),
    # One direction removed everywhere (Arditi et al. 2024), taken at several depths.
    _Start("global", 0.7, 1.0, 1.0, 1.0, 1.0),
    _Start("global", 0.6, 1.0, 1.0, 1.0, 1.0),
    _Start("global", 0.8, 1.0, 1.0, 1.0, 1.0),
    _Start("global", 0.5, 1.0, 1.0, 1.0, 1.0),
    # The same with less force, and with attention alone.
    _Start("global", 0.7, 0.85, 0.7, 1.0, 1.0),
    _Start("global", 0.7, 0.7, 0.5, 1.0, 1.0),
    _Start("global", 0.7, 1.0, -0.2, 1.0, 1.0),
    # Each layer's own direction, in the middle of the model.
    _Start("per layer", 0.7, 1.0, 0.5, 0.5, 0.6),
    _Start("per layer", 0.7, 0.6, -0.2, 0.5, 0.6),
)


CROWDED = 0.02
"""Share of a range next to its end where a trial crowds it."""
FEWEST_TO_CROWD = 3


def crowded_bounds(front: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Ends of ranges near which most of a front lies, where a wider range might hold better edits.

    Ends that mean a limit of the edit itself (no weight, the whole depth) are none.

    Args:
        front: the parameters of its trials.

    Returns:
        For people: `attention.peak_weight near 1.5`.
    """
    if len(front) < FEWEST_TO_CROWD:
        return ()
    ranges = {f"{c}.peak_weight": PEAK_WEIGHT[c] for c in PEAK_WEIGHT}
    ranges |= {f"{c}.peak_position": PEAK_POSITION for c in PEAK_WEIGHT}
    ends = [(name, high, high - low) for name, (low, high) in ranges.items() if high != 1.0]
    ends += [(name, low, high - low) for name, (low, high) in ranges.items() if low > 0]
    ends += [("direction.position", end, POSITION[1] - POSITION[0]) for end in POSITION]
    crowded = []
    for name, end, width in ends:
        near = [abs(trial[name] - end) <= CROWDED * width for trial in front if name in trial]
        if 2 * sum(near) > len(front):
            crowded.append(f"{name} near {end:g}")
    return tuple(crowded)


def _kernel_ranges(component: Component) -> dict[str, Range]:
    return {
        f"{component}.peak_weight": PEAK_WEIGHT[component],
        f"{component}.peak_position": PEAK_POSITION,
        f"{component}.floor": FLOOR,
        f"{component}.reach": REACH,
    }


REFINE = "refine."
"""What the parameters of a refined trial begin with that its start does not have."""


def refinement_parameters(refinement: Refinement) -> dict[str, Any]:
    """A refined trial's parameters beside those of its start."""
    return {
        f"{REFINE}steps": refinement.steps,
        f"{REFINE}form": refinement.form,
        f"{REFINE}rank": refinement.rank,
        f"{REFINE}mass_limit": refinement.mass_limit,
        f"{REFINE}strength": refinement.strength,
    }


def refinement_distributions() -> dict[str, BaseDistribution]:
    """What these parameters may be."""
    return {
        f"{REFINE}steps": IntDistribution(1, 100_000),
        f"{REFINE}form": CategoricalDistribution(("strength", "direction", "factors")),
        f"{REFINE}rank": IntDistribution(1, 1024),
        f"{REFINE}mass_limit": FloatDistribution(1e-4, 1.0, log=True),
        f"{REFINE}strength": FloatDistribution(1e-3, 1e3, log=True),
    }
