"""An edit of one site as an operator on its output. Knows nothing about models or hooks.

Every edit in scope has the form `y -> s * y + U (V^T y) + c`: exact, no weights touched. The
constant `c` is zero unless the site has a bias and the operator rescales rows: a bias is mapped
by the projection alone, while the rows of the weight are rescaled too.

Source of the idea of removing one direction from everything that writes to the residual stream:
Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction" (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NormMode = Literal["none", "row", "normalized_row"]
"""What happens to the norms of the weight's rows.

- `none`: they change as the ablation makes them.
- `row`: ablate, then restore the row norms. Little of the direction comes back.
- `normalized_row`: ablate the unit rows, normalize, restore the norms. Where row norms differ,
  part of the direction stays in the output; offered for comparison with tools that do this.
"""


DEPENDENT = 1e-6
"""A unit direction of which less than this is left once others are removed depends on them."""


@dataclass(frozen=True)
class Operator:
    """`y -> scale * y + left (right^T y) + shift`, for outputs `y` (..., D) of one site."""

    left: Tensor
    """(D, R) float32."""
    right: Tensor
    """(D, R) float32."""
    scale: Tensor | None = None
    """(D,) float32; None: 1."""
    shift: Tensor | None = None
    """(D,) float32; None: 0."""

    @property
    def width(self) -> int:
        """D, the width of the outputs."""
        return int(self.left.shape[0])

    @property
    def rank(self) -> int:
        """R, the number of directions."""
        return int(self.left.shape[1])

    def __call__(self, output: Tensor) -> Tensor:
        """The edited output.

        Args:
            output: (..., D) what the site writes, any float dtype.

        Returns:
            (..., D) in the same dtype, computed in float32. Gradients pass to the output and to
            whichever of the operator's tensors ask for them.
        """
        vectors = output.float()
        overwrite = vectors is not output and not torch.is_grad_enabled()
        edited = self._linear(vectors, overwrite=overwrite)
        if self.shift is not None:
            edited = edited + self.shift
        return edited.to(output.dtype)

    def strengthened(self, factor: float) -> Operator:
        """`y -> y + factor (edit(y) - y)`: the same change, `factor` times as large."""
        return Operator(
            left=factor * self.left,
            right=self.right,
            scale=None if self.scale is None else 1 + factor * (self.scale - 1),
            shift=None if self.shift is None else factor * self.shift,
        )

    def linear(self, vectors: Tensor) -> Tensor:
        """`scale * y + left (right^T y)` of float32 vectors (..., D): the edit without its shift.

        What makes it permanent in a weight, whose every column is such a vector.
        """
        return self._linear(vectors, overwrite=False)

    def _linear(self, vectors: Tensor, *, overwrite: bool) -> Tensor:
        """`linear`; a large tensor less to be allocated where the vectors may be written to."""
        along = vectors @ self.right
        if self.scale is not None:
            scaled = vectors * self.scale
        else:
            scaled = vectors if overwrite else vectors.clone()
        if self.rank == 1:
            # A matrix product over a single column takes several times as long.
            return scaled.addcmul_(along, self.left[:, 0])
        return scaled.add_(along @ self.left.T)

    def to(self, device: torch.device) -> Operator:
        """The same operator on another device."""
        return Operator(
            self.left.to(device),
            self.right.to(device),
            None if self.scale is None else self.scale.to(device),
            None if self.shift is None else self.shift.to(device),
        )

    def bake(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that make the edit permanent.

        Args:
            weight: (D, F) rows write to the residual stream.
            bias: (D,) or None.

        Returns:
            (D, F) float32 and (D,) float32, the latter None where there is neither bias nor shift.
        """
        baked = self.linear(weight.float().T).T
        if bias is None:
            return baked, None if self.shift is None else self.shift.clone()
        return baked, self(bias.float())


def ablation_operator(
    direction: Tensor,  # (D,) any length but zero; (R, D) to remove all that they span
    weight: float,
    *,
    norm: NormMode = "none",
    site_weight: Tensor | None = None,  # (D, F), needed unless norm is "none"
    site_bias: Tensor | None = None,  # (D,)
) -> Operator:
    """The operator that removes `weight` times a direction from what a site writes.

    With unit `v`, row norms `n` of `W`:

    - `none`: `y' = y - w v (v . y)`.
    - `row`: `u = W^T v`, `r_i = n_i / |W_i - w v_i u|`, `y' = r * (y - w v (v . y))`.
    - `normalized_row`: `u = (W / n)^T v`, `r_i = 1 / |W_i / n_i - w v_i u|`,
      `y' = r * (y - w (n * v) (v . (y / n)))`.

    Several directions are made orthogonal, each to those before it. They are defined for `none`
    only.

    Raises:
        ValueError: a direction is not finite or all are zero, the mode needs `site_weight` and it
            is missing, or it is not `none` and there are several directions.
    """
    if direction.ndim == 2:
        if norm != "none":
            raise ValueError(f"norm mode {norm!r} is not defined for several directions")
        basis = _orthonormal(direction)
        return Operator(left=-weight * basis, right=basis)
    v = direction.float()
    length = v.norm()
    if not torch.isfinite(length) or length == 0:
        raise ValueError("direction must be finite and not zero")
    v = v / length
    if norm == "none":
        return Operator(left=(-weight * v)[:, None], right=v[:, None])
    if site_weight is None:
        raise ValueError(f"norm mode {norm!r} needs the site's weight")
    w = site_weight.float()
    norms = w.norm(dim=1)
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)
    if norm == "row":
        restore = _row_restoration(norms.square(), v, weight, u=w.T @ v, rows=w) * norms
        left, right = v, v
    elif norm == "normalized_row":
        u = w.T @ (v * inverse)
        unit_squares = (norms > 0).float()
        restore = _row_restoration(unit_squares, v, weight, u=u, rows=w, row_scale=inverse)
        left, right = norms * v, inverse * v
    else:
        raise ValueError(f"norm must be one of none, row, normalized_row, got {norm!r}")
    operator = Operator((restore * -weight * left)[:, None], right[:, None], scale=restore)
    if site_bias is None:
        return operator
    bias = site_bias.float()
    projected = bias - weight * v * (v @ bias)
    return Operator(operator.left, operator.right, restore, shift=projected - operator(bias))


def _orthonormal(directions: Tensor) -> Tensor:
    """(D, R) unit vectors that span (R, D) directions, each orthogonal to those before it.

    A direction that depends on those before it is left out.
    """
    lengths = directions.double().norm(dim=1)
    if not torch.isfinite(lengths).all() or not (lengths > 0).any():
        raise ValueError("direction must be finite and not zero")
    basis = directions.new_zeros(directions.shape[1], 0, dtype=torch.float64)
    for vector, length in zip(directions.double(), lengths, strict=True):
        unit = vector / length.clamp_min(torch.finfo(torch.float64).tiny)
        for _ in range(2):  # the second time removes what rounding left
            unit = unit - basis @ (basis.T @ unit)
        if float(unit.norm()) > DEPENDENT:
            basis = torch.cat([basis, (unit / unit.norm())[:, None]], dim=1)
    return basis.float()


def _row_restoration(
    squares: Tensor,  # (D,) squared norms of the rows before
    v: Tensor,  # (D,)
    weight: float,
    *,
    u: Tensor,  # (F,) what the ablation subtracts from each row, up to w v_i
    rows: Tensor,  # (D, F)
    row_scale: Tensor | None = None,  # (D,) the rows are row_scale * rows
) -> Tensor:
    """1 / |row_i - w v_i u|, (D,), from one matrix-vector product; 0 where the row vanishes."""
    along = rows @ u
    if row_scale is not None:
        along = along * row_scale
    after = squares - 2 * weight * v * along + (weight * v).square() * u.square().sum()
    # Rounding can leave a vanished row a hair below zero; relative to its norm it is zero.
    vanished = after <= squares * 1e-12
    return torch.where(vanished, 0.0, after.clamp_min(torch.finfo(after.dtype).tiny).rsqrt())
