"""From the numbers of a trial to an operator for every site. Knows nothing about modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from heretic_kl.ablation.direction import Directions
from heretic_kl.ablation.kernel import WeightKernel
from heretic_kl.ablation.operator import (
    NormMode,
    Operator,
    ablation_operator,
)

Component = Literal["attention", "mlp"]


class SiteKey(NamedTuple):
    """Names a site: a module whose output is added to the residual stream."""

    layer: int
    component: Component
    path: str
    """Dotted path of the module inside the model."""


@dataclass(frozen=True)
class SiteFacts:
    """What building an operator needs to know about a site; weights are read on each call."""

    weight: Callable[[], Tensor]
    """() -> (D, F); rows write to the residual stream."""
    bias: Callable[[], Tensor | None]
    """() -> (D,) or None."""
    gains: Tensor | None = None
    """(G, D) gains between the site and the stream, of a norm or scale; None: there are none.
    More than one where a short convolution adds what was written for earlier tokens."""
    centred: bool = False
    """A LayerNorm between them subtracts the mean first."""

    def pull_back(self, direction: Tensor) -> Tensor:
        """(D,) or (G, D): what to remove from the site's output to remove it from the stream."""
        if self.gains is None:
            return direction
        pulled = direction * self.gains.to(direction)
        if self.centred:
            pulled = pulled - pulled.mean(dim=-1, keepdim=True)
        return pulled[0] if len(pulled) == 1 else pulled


@dataclass(frozen=True)
class LearningSettings:
    """What a refinement was asked for: what it takes to learn the same from the same start."""

    steps: int
    form: str
    rank: int
    mass_limit: float
    """Of the first refinement of its run."""
    kl_tokens: int
    """Positions of the response in the loss."""
    beta_kl: float | None
    """Fixed weight of the KL; None: dual ascent."""
    kl_temperature: float
    seed: int
    """Of its own draws."""

    @property
    def loss(self) -> str:
        """For people: `KL over 16 positions at temperature 1, dual ascent`."""
        weight = "dual ascent" if self.beta_kl is None else f"fixed weight {self.beta_kl:g}"
        positions = f"{self.kl_tokens} position{'s' if self.kl_tokens != 1 else ''}"
        return f"KL over {positions} at temperature {self.kl_temperature:g}, {weight}"


@dataclass(frozen=True)
class Refinement:
    """What was learned from an edit as start; its operators are stored by their hash."""

    sha256: str
    """Of the safetensors file that holds the operators."""
    start: int
    """Number of the trial whose edit it started from."""
    steps: int
    form: str
    """What was learned at each site: strength, direction or factors."""
    rank: int
    mass_limit: float
    """Largest mean probability of opening a response with a refusal that was aimed at."""
    strength: float = 1.0
    """By which all of it was multiplied afterwards, so that responses meet the target."""
    asked: LearningSettings | None = None
    """What it was learned with; None: an older study did not keep it."""
    of: int | None = None
    """Number of the trial that was learned, of which this is another strength; None: this one."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Refinement:
        """The inverse of `dataclasses.asdict`."""
        asked = data.get("asked")
        return cls(**{**data, "asked": None if asked is None else LearningSettings(**asked)})


@dataclass(frozen=True)
class EditParameters:
    """One edit, as numbers: everything a trial varies."""

    direction_position: float | None
    """One global direction at this fractional layer; None: each layer uses its own."""
    kernels: Mapping[Component, WeightKernel]
    """A component that is missing is not edited."""
    norm: NormMode = "none"
    refinement: Refinement | None = None
    """What was learned from the edit that the other fields describe; None: nothing was."""


Plan = Mapping[SiteKey, Operator]
"""The operators of one candidate; a site that is missing is left alone."""


def build_plan(
    parameters: EditParameters,
    directions: Directions,
    sites: Mapping[SiteKey, SiteFacts],
) -> dict[SiteKey, Operator]:
    """An operator for every site that the parameters reach.

    Where a norm stands between the site and the residual stream, the direction is pulled back
    through it: to remove `v` from `g * y / rms(y)`, remove `g * v` from `y`; for a LayerNorm, its
    centred form.

    Raises:
        ValueError: a norm-restoring mode meets a site behind a norm, where row norms of the
            weight say nothing about what reaches the stream.
    """
    plan: dict[SiteKey, Operator] = {}
    shared_direction = None
    if parameters.direction_position is not None:
        shared_direction = directions.at(parameters.direction_position)
    for key, facts in sites.items():
        kernel = parameters.kernels.get(key.component)
        weight = 0.0 if kernel is None else kernel.weight_at(key.layer)
        if weight == 0:
            continue
        direction = (
            directions.per_layer[key.layer] if shared_direction is None else shared_direction
        )
        plan[key] = _site_operator(direction, weight, facts, parameters.norm)
    return plan


def _site_operator(direction: Tensor, weight: float, facts: SiteFacts, norm: NormMode) -> Operator:
    if norm == "none":
        return ablation_operator(facts.pull_back(direction), weight)
    if facts.gains is not None or facts.centred:
        raise ValueError(f"norm mode {norm!r} is not defined for sites behind a norm; use 'none'")
    site_weight = facts.weight()
    return ablation_operator(
        direction.to(site_weight.device),
        weight,
        norm=norm,
        site_weight=site_weight,
        site_bias=facts.bias(),
    )


def lowest_edited_layer(plan: Iterable[SiteKey]) -> int | None:
    """The first layer a plan touches; None for an empty plan."""
    return min((key.layer for key in plan), default=None)
