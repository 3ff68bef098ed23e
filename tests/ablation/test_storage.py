"""Plans survive a safetensors file to the last bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic_kl.ablation import (
    Operator,
    SiteKey,
    ablation_operator,
    plan_from_tensors,
    tensors_from_plan,
)

WIDTH = 8


def plan():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, WIDTH, 3, generator=generator)
    weight = torch.randn(WIDTH, 5, generator=generator)
    return {
        SiteKey(10, "mlp", "model.layers.10.mlp.down_proj"): ablation_operator(weight[:, 0], 0.3),
        SiteKey(2, "attention", "model.layers.2.attn.o_proj"): Operator(
            left, right, shift=torch.randn(WIDTH, generator=generator)
        ),
        SiteKey(2, "mlp", "model.layers.2.mlp.down_proj"): ablation_operator(
            weight[:, 1], 0.9, norm="row", site_weight=weight
        ),
    }


def test_a_plan_comes_back_exactly(tmp_path):
    save_file(tensors_from_plan(plan()), tmp_path / "edit.safetensors")
    restored = plan_from_tensors(load_file(tmp_path / "edit.safetensors"))
    assert list(restored) == sorted(plan())
    y = torch.randn(4, WIDTH)
    for key, operator in plan().items():
        assert torch.equal(restored[key](y), operator(y))
        assert (restored[key].scale is None) == (operator.scale is None)
        assert (restored[key].shift is None) == (operator.shift is None)
    assert plan_from_tensors(tensors_from_plan({})) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"3/mlp/down_proj/middle": torch.ones(8)}, "'3/mlp/down_proj/middle'"),
        ({"three/mlp/down_proj/left": torch.ones(8, 1)}, "'three/mlp/down_proj/left'"),
        ({"3/mlp/down_proj/left": torch.ones(8, 1)}, "down_proj needs both left and right"),
        (
            {
                f"3/mlp/down_proj/{part}": torch.ones(8, n)
                for part, n in (("left", 1), ("right", 2))
            },
            r"down_proj do not fit together: .*\(8, 1\)",
        ),
    ],
)
def test_what_is_no_plan_is_rejected_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_from_tensors(tensors_from_plan(plan()) | changes)


def test_a_path_with_a_slash_is_rejected():
    with pytest.raises(ValueError, match="slash"):
        tensors_from_plan({SiteKey(0, "mlp", "a/b"): ablation_operator(torch.ones(4), 1.0)})
