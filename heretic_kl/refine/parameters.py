"""Site operators whose numbers are parameters. Knows nothing about losses, prompts or hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from heretic_kl.ablation import Operator, Plan, SiteKey

Form = Literal["strength", "direction", "factors"]
"""What is learned at each site.

- `strength`: one number `w` in `y -> y - w r (r . y)`; the unit direction `r` stays.
- `direction`: `w` and `r`, which is kept a unit vector.
- `factors`: free `U`, `V` (D, R) in `y -> s * y + U (V^T y) + c`; `s` and `c` stay.
"""


class LearnableOperator(nn.Module):
    """One site's edit with gradients. Called on outputs (..., D) as `Operator` is."""

    def forward(self, output: Tensor) -> Tensor:
        """The edited output (..., D), in the dtype of the output, computed in float32."""
        raise NotImplementedError

    def frozen(self) -> Operator:
        """The same edit as plain tensors, float32 on the CPU."""
        raise NotImplementedError


class DirectionOperator(LearnableOperator):
    """`y -> y - w r (r . y)`; `r` is normalized whenever it is used.

    Args:
        direction: (D,) where `r` starts.
        strength: where `w` starts.
        learn_direction: False: only `w` is learned.
    """

    def __init__(self, direction: Tensor, strength: float, *, learn_direction: bool) -> None:
        super().__init__()
        unit = direction.float() / direction.float().norm()
        self.direction = nn.Parameter(unit.clone(), requires_grad=learn_direction)
        self.strength = nn.Parameter(torch.tensor(float(strength)))

    def forward(self, output: Tensor) -> Tensor:
        """See `LearnableOperator`."""
        unit = self.direction / self.direction.norm()
        along = output.float() @ unit
        edited: Tensor = output.float() - (self.strength * along)[..., None] * unit
        return edited.to(output.dtype)

    @torch.no_grad()
    def frozen(self) -> Operator:
        """See `LearnableOperator`."""
        unit = (self.direction / self.direction.norm()).cpu()
        return Operator(left=-float(self.strength) * unit[:, None], right=unit[:, None].clone())


class FactorOperator(LearnableOperator):
    """`y -> s * y + U (V^T y) + c` with free factors.

    Args:
        start: gives `U`, `V`, `s` and `c`.
        rank: R; columns beyond the start's are added with `U` zero and `V` random, small.
        seed: of those columns.
    """

    def __init__(self, start: Operator, *, rank: int, seed: int) -> None:
        super().__init__()
        left, right = start.left.float(), start.right.float()
        more = rank - left.shape[1]
        if more > 0:
            noise = torch.randn(start.width, more, generator=torch.Generator().manual_seed(seed))
            left = torch.cat([left, torch.zeros_like(noise)], dim=1)
            right = torch.cat([right, noise / noise.norm(dim=0)], dim=1)
        self.left = nn.Parameter(left.clone())
        self.right = nn.Parameter(right.clone())
        self.scale = start.scale
        self.shift = start.shift

    def forward(self, output: Tensor) -> Tensor:
        """See `LearnableOperator`."""
        vectors = output.float()
        edited = vectors if self.scale is None else vectors * self.scale
        edited = edited + (vectors @ self.right) @ self.left.T
        if self.shift is not None:
            edited = edited + self.shift
        return edited.to(output.dtype)

    @torch.no_grad()
    def frozen(self) -> Operator:
        """See `LearnableOperator`."""
        parts = (self.left, self.right, self.scale, self.shift)
        left, right, scale, shift = (None if p is None else p.detach().cpu().clone() for p in parts)
        assert left is not None and right is not None
        return Operator(left, right, scale, shift)


class LearnableEdit(nn.Module):
    """A plan with gradients: one `LearnableOperator` a site.

    Args:
        start: the plan to begin at. `strength` and `direction` need operators of the form
            `y - w v (v . y)`, as directional ablation without norm restoring makes.
        form: what is learned.
        rank: R of `factors`.
        seed: of what `factors` adds to the start.

    Raises:
        ValueError: the plan is empty, or an operator is not of the form that is needed.
    """

    def __init__(
        self, start: Plan, form: Form = "direction", *, rank: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        if not start:
            raise ValueError("there is nothing to learn in a plan without sites")
        self.form = form
        self.keys: tuple[SiteKey, ...] = tuple(start)
        self.operators = nn.ModuleList(
            self._operator(operator, rank, seed + index)
            for index, operator in enumerate(start.values())
        )

    def _operator(self, start: Operator, rank: int, seed: int) -> LearnableOperator:
        if self.form == "factors":
            return FactorOperator(start, rank=max(rank, start.rank), seed=seed)
        direction, strength = single_direction(start)
        return DirectionOperator(direction, strength, learn_direction=self.form == "direction")

    @property
    def plan(self) -> Mapping[SiteKey, LearnableOperator]:
        """The operators by site, with gradients; goes where a `Plan` goes."""
        return dict(zip(self.keys, self.operators, strict=True))  # type: ignore[arg-type]

    def frozen(self) -> dict[SiteKey, Operator]:
        """The same edit as a plain plan."""
        return {key: operator.frozen() for key, operator in self.plan.items()}

    def groups(self, direction_rate: float, strength_rate: float) -> list[dict[str, object]]:
        """Parameters for an optimiser: directions and factors at one rate, strengths at another."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        strengths = [p for n, p in named if n.endswith("strength")]
        others = [p for n, p in named if not n.endswith("strength")]
        groups: list[dict[str, object]] = [{"params": strengths, "lr": strength_rate}]
        return [*groups, {"params": others, "lr": direction_rate}] if others else groups


def single_direction(operator: Operator) -> tuple[Tensor, float]:
    """The unit direction `v` (D,) and strength `w` of an operator `y - w v (v . y)`.

    Raises:
        ValueError: it is of another form.
    """
    if operator.rank != 1 or operator.scale is not None or operator.shift is not None:
        raise ValueError("learning directions needs a start that removes one direction a site")
    left, right = operator.left[:, 0].double(), operator.right[:, 0].double()
    length = right.norm()
    unit = right / length
    strength = -float(left @ unit) * float(length)
    if not torch.allclose(left * length, -strength * unit, atol=1e-5 * max(1.0, abs(strength))):
        raise ValueError("learning directions needs a start that removes what it measures")
    return unit.float(), strength


def removes_single_directions(plan: Plan) -> bool:
    """Whether every operator is of the form whose direction and strength can be learned."""
    try:
        for operator in plan.values():
            single_direction(operator)
    except ValueError:
        return False
    return True
