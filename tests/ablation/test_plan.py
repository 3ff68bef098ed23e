import pytest
import torch

from heretic_kl.ablation import (
    Directions,
    EditParameters,
    SiteFacts,
    SiteKey,
    WeightKernel,
    build_plan,
    lowest_edited_layer,
)

WIDTH, LAYERS = 8, 6


def sites(gain=None):
    weight = torch.randn(WIDTH, 12, generator=torch.Generator().manual_seed(0))
    facts = SiteFacts(
        weight=lambda: weight, bias=lambda: None, gains=None if gain is None else gain[None]
    )
    return {
        SiteKey(layer, component, f"layers.{layer}.{component}"): facts
        for layer in range(LAYERS)
        for component in ("attention", "mlp")
    }


DIRECTIONS = Directions(
    torch.nn.functional.normalize(
        torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1
    )
)
KERNEL = WeightKernel(peak_weight=1.0, peak_position=3.0, floor_weight=0.5, reach=2.0)


def test_kernel_is_a_tent():
    weights = [KERNEL.weight_at(layer) for layer in range(LAYERS)]
    assert weights == [0.0, 0.5, 0.75, 1.0, 0.75, 0.5]
    assert WeightKernel(0.8, 2.0, 0.1, 0.0).weight_at(2) == 0.8
    with pytest.raises(ValueError, match="reach"):
        WeightKernel(1, 1, 1, -1)


def test_plan_covers_the_kernel_and_leaves_the_rest_alone():
    plan = build_plan(EditParameters(2.5, {"attention": KERNEL}), DIRECTIONS, sites())
    assert {(key.layer, key.component) for key in plan} == {
        (layer, "attention") for layer in range(1, 6)
    }
    assert lowest_edited_layer(plan) == 1
    assert lowest_edited_layer({}) is None


def test_global_direction_is_one_for_all_layers_and_own_directions_differ():
    def right_of(position):
        plan = build_plan(EditParameters(position, {"mlp": KERNEL}), DIRECTIONS, sites())
        return torch.stack([op.right[:, 0] for op in plan.values()])

    one = right_of(2.5)
    assert torch.equal(one, one[:1].expand_as(one))
    torch.testing.assert_close(right_of(None), DIRECTIONS.per_layer[1:6])


def test_post_norm_pulls_the_direction_back():
    gain = torch.linspace(0.1, 2.0, WIDTH)
    plan = build_plan(EditParameters(3.0, {"attention": KERNEL}), DIRECTIONS, sites(gain))
    operator = plan[SiteKey(3, "attention", "layers.3.attention")]
    y = torch.randn(5, WIDTH)
    edited = operator(y)
    normed = gain * edited / edited.square().mean(dim=-1, keepdim=True).sqrt()
    assert float((normed @ DIRECTIONS.at(3.0)).abs().max()) < 1e-5


def test_norm_modes_behind_a_norm_are_rejected():
    with pytest.raises(ValueError, match="not defined for sites behind a norm"):
        build_plan(
            EditParameters(3.0, {"attention": KERNEL}, "row"),
            DIRECTIONS,
            sites(torch.ones(WIDTH)),
        )
