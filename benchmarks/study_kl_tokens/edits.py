"""The list of edits: fixed by a seed, shuffled, plain data. Builds none of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution

from heretic_kl.search.space import SearchSpace

SEED = 0
RANDOM_DRAWS = 42
NOTHING = "nothing"
ABLATIONS = (
    "search start", "random draw", "attention only", "mlp only", "early", "middle", "late",
    "norm mode", "past 1", "random direction",
)  # fmt: skip
LEARNED = "learned"
WEIGHTS = ("noise", "rounding", "fine-tune")
"""Families whose edits change weights: no operator on a site's output says them."""
THIRDS = ("early", "middle", "late")
PARTS = (*THIRDS, "attention", "mlp")
SNAPSHOTS = 5
"""Of each form that is learned."""
FORMS = ("direction", "factors")
TUNING_SNAPSHOTS = 2


@dataclass(frozen=True)
class Edit:
    """One edit as data."""

    name: str
    family: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Ablations: what `SearchSpace.edit` takes, `norm`, `direction_seed`. Learned: form, snapshot.
    Noise: size, part, seed. Rounding: bits, part. Fine-tune: snapshot, scale."""

    @property
    def changes_weights(self) -> bool:
        """Whether it is made by writing to weights."""
        return self.family in WEIGHTS


def all_edits(layers: int, every: int = 1) -> list[Edit]:
    """The edits of a model in the order in which they are measured.

    Args:
        layers: of the model.
        every: take every such edit of the shuffled list only; the one that does nothing stays.
    """
    edits = [*_ablations(SearchSpace(layers)), *_learned(), *_weights()]
    random.Random(SEED).shuffle(edits)
    return [Edit(NOTHING, NOTHING), *edits[::every]]


def _ablations(space: SearchSpace) -> Iterator[Edit]:
    for index, start in enumerate(space.known_good()):
        yield Edit(f"search start {index}", "search start", start)
    draw = random.Random(SEED)
    for index in range(RANDOM_DRAWS):
        yield Edit(f"random draw {index}", "random draw", _drawn(space, draw))
    for strength in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5):
        yield Edit(f"attention {strength:g}", "attention only", _global(strength, -0.2))
        yield Edit(f"mlp {strength:g}", "mlp only", _global(0.0, strength))
    for third, centre in zip(THIRDS, (1 / 6, 1 / 2, 5 / 6), strict=True):
        for strength in (0.5, 1.0, 1.5):
            facts = _global(strength, strength, centre, 1 / 6)
            yield Edit(f"{third} third {strength:g}", third, facts)
    for norm in ("row", "normalized_row"):
        for strength in (0.5, 1.0):
            facts = {**_global(strength, strength), "norm": norm}
            yield Edit(f"{norm} {strength:g}", "norm mode", facts)
    for strength in (2.0, 3.0, 4.0, 6.0):
        yield Edit(f"strength {strength:g}", "past 1", _global(strength, strength))
    for seed in (0, 1):
        for strength in (1.0, 2.0, 4.0, 8.0):
            facts = {**_global(strength, strength), "direction_seed": seed}
            yield Edit(f"random direction {seed} {strength:g}", "random direction", facts)


def _learned() -> Iterator[Edit]:
    for form in FORMS:
        for index in range(SNAPSHOTS):
            facts = {"form": form, "snapshot": index}
            yield Edit(f"learned {form} {index}", LEARNED, facts)


def _weights() -> Iterator[Edit]:
    noise = [(size, None) for size in (0.03, 0.06, 0.1, 0.15, 0.2)]
    for size, part in [*noise, *((0.2, part) for part in PARTS)]:
        name = f"noise {size:g} {part or 'all'}"
        yield Edit(name, "noise", {"size": size, "part": part, "seed": SEED})
    for bits, part in [*((bits, None) for bits in (8, 6, 5, 4, 3)), *((4, p) for p in PARTS[:3])]:
        name = f"{bits} bits {part or 'all'}"
        yield Edit(name, "rounding", {"bits": bits, "part": part})
    for snapshot in range(TUNING_SNAPSHOTS):
        for scale in (0.5, 1.0, 2.0):
            name = f"fine-tune {snapshot} times {scale:g}"
            yield Edit(name, "fine-tune", {"snapshot": snapshot, "scale": scale})


def _global(
    attention: float, mlp: float, centre: float = 0.65, reach: float = 1.0
) -> dict[str, Any]:
    """One direction, as strong in all layers that are reached; 0 or less: not edited."""
    chosen: dict[str, Any] = {"direction.scope": "global", "direction.position": 0.65}
    for component, peak in (("attention", attention), ("mlp", mlp)):
        values = {"peak_weight": peak, "peak_position": centre, "floor": 1.0, "reach": reach}
        chosen |= {f"{component}.{name}": value for name, value in values.items()}
    return chosen


def _drawn(space: SearchSpace, draw: random.Random) -> dict[str, Any]:
    """Uniform in the search's space."""
    chosen: dict[str, Any] = {}
    for name, distribution in space.distributions.items():
        if isinstance(distribution, CategoricalDistribution):
            chosen[name] = draw.choice(distribution.choices)
        else:
            assert isinstance(distribution, FloatDistribution)
            chosen[name] = draw.uniform(distribution.low, distribution.high)
    return chosen
