"""Plans as flat dicts of named tensors, as safetensors files hold them. Touches no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import get_args

from torch import Tensor

from heretic_kl.ablation.operator import Operator
from heretic_kl.ablation.plan import Component, Plan, SiteKey

PARTS = tuple(field.name for field in fields(Operator))
"""Of an operator: left and right always, scale and shift where it has them."""


def tensors_from_plan(plan: Plan) -> dict[str, Tensor]:
    """The operators' tensors as they are, named such as `3/mlp/model.layers.3.mlp.down_proj/left`.

    Raises:
        ValueError: a module path holds a slash.
    """
    tensors: dict[str, Tensor] = {}
    for key, operator in plan.items():
        if "/" in key.path:
            raise ValueError(f"the path of a site cannot hold a slash, got {key.path!r}")
        for part in PARTS:
            value: Tensor | None = getattr(operator, part)
            if value is not None:
                tensors[f"{key.layer}/{key.component}/{key.path}/{part}"] = value.detach()
    return tensors


def plan_from_tensors(tensors: Mapping[str, Tensor]) -> dict[SiteKey, Operator]:
    """The plan whose `tensors_from_plan` these are, to the last bit, in the order of its layers.

    Raises:
        ValueError: a name is not one of a plan's, or the tensors of a site do not fit together;
            the name is given.
    """
    parts_by_site: dict[SiteKey, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, part = _parsed(name)
        parts_by_site.setdefault(key, {})[part] = tensor
    return {key: _operator(key, parts_by_site[key]) for key in sorted(parts_by_site)}


def _parsed(name: str) -> tuple[SiteKey, str]:
    match name.split("/"):
        case [layer, component, path, part] if (
            layer.isdecimal() and component in get_args(Component) and path and part in PARTS
        ):
            return SiteKey(int(layer), component, path), part  # type: ignore[arg-type]
    raise ValueError(f"no tensor of an edit is named {name!r}: LAYER/COMPONENT/PATH/PART expected")


def _operator(key: SiteKey, parts: Mapping[str, Tensor]) -> Operator:
    left, right = parts.get("left"), parts.get("right")
    if left is None or right is None:
        raise ValueError(f"the edit of {key.path} needs both left and right, got {sorted(parts)}")
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    vectors = (shape for part, shape in shapes.items() if part in ("scale", "shift"))
    if left.ndim != 2 or left.shape != right.shape or any(s != shapes["left"][:1] for s in vectors):
        raise ValueError(f"the tensors of the edit of {key.path} do not fit together: {shapes}")
    return Operator(left, right, parts.get("scale"), parts.get("shift"))
