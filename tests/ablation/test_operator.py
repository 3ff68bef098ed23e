"""Laws of operators: applied to outputs they do what baking them into weights does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heretic_kl.ablation import Operator, ablation_operator
from heretic_kl.ablation.operator import NormMode

MODES: tuple[NormMode, ...] = ("none", "row", "normalized_row")


def site(seed: int, *, width: int = 24, inputs: int = 40, spread: float = 10.0):
    """A weight whose row norms differ by `spread`, a bias, a direction and inputs."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, torch.log10(torch.tensor(spread)).item(), width)
    weight = torch.randn(width, inputs, generator=generator) * scale[:, None] / inputs**0.5
    bias = torch.randn(width, generator=generator)
    direction = torch.randn(width, generator=generator)
    x = torch.randn(16, inputs, generator=generator)
    return weight, bias, direction, x


@pytest.mark.parametrize("norm", MODES)
@pytest.mark.parametrize("with_bias", [False, True])
@given(seed=st.integers(0, 10_000), weight=st.floats(-0.5, 1.5))
@settings(max_examples=20, deadline=None)
def test_applying_equals_baking(norm, with_bias, seed, weight):
    w, b, v, x = site(seed)
    bias = b if with_bias else None
    operator = ablation_operator(v, weight, norm=norm, site_weight=w, site_bias=bias)
    baked, baked_bias = operator.bake(w, bias)
    expected = x @ baked.T + (0 if baked_bias is None else baked_bias)
    actual = operator(x @ w.T + (0 if bias is None else bias))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 10_000), weight=st.floats(0, 1.5))
@settings(max_examples=20, deadline=None)
def test_none_removes_the_weighted_share_of_the_direction(seed, weight):
    w, _, v, x = site(seed)
    unit = v / v.norm()
    y = x @ w.T
    edited = ablation_operator(v, weight)(y)
    torch.testing.assert_close(edited @ unit, (1 - weight) * (y @ unit), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["row", "normalized_row"])
@given(seed=st.integers(0, 10_000), weight=st.floats(0, 1.5))
@settings(max_examples=20, deadline=None)
def test_norm_modes_keep_row_norms(norm, seed, weight):
    w, _, v, _ = site(seed)
    baked, _ = ablation_operator(v, weight, norm=norm, site_weight=w).bake(w)
    torch.testing.assert_close(baked.norm(dim=1), w.norm(dim=1), rtol=1e-4, atol=1e-5)


def dense_row(w, v, weight):
    unit = v / v.norm()
    ablated = w - weight * torch.outer(unit, unit @ w)
    return ablated * (w.norm(dim=1) / ablated.norm(dim=1))[:, None]


def dense_normalized_row(w, v, weight):
    unit = v / v.norm()
    norms = w.norm(dim=1, keepdim=True)
    rows = w / norms
    ablated = rows - weight * torch.outer(unit, unit @ rows)
    return norms * ablated / ablated.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("norm", "dense"), [("row", dense_row), ("normalized_row", dense_normalized_row)]
)
@given(seed=st.integers(0, 10_000), weight=st.floats(0, 1.5))
@settings(max_examples=20, deadline=None)
def test_closed_form_equals_dense_computation(norm, dense, seed, weight):
    w, _, v, _ = site(seed)
    baked, _ = ablation_operator(v, weight, norm=norm, site_weight=w).bake(w)
    torch.testing.assert_close(baked, dense(w, v, weight), rtol=1e-4, atol=1e-4)


def test_row_leaves_less_of_the_direction_than_normalized_row():
    w, _, v, _ = site(0, width=256, inputs=512)
    unit = v / v.norm()
    left = {
        norm: (unit @ ablation_operator(v, 1.0, norm=norm, site_weight=w).bake(w)[0]).norm()
        / (unit @ w).norm()
        for norm in MODES
    }
    assert left["none"] < 1e-5
    assert left["row"] < 0.1 * left["normalized_row"]


def test_zero_rows_stay_zero():
    w, b, v, _ = site(1)
    w[3] = 0
    for norm in ("row", "normalized_row"):
        baked, bias = ablation_operator(v, 1.0, norm=norm, site_weight=w, site_bias=b).bake(w, b)
        assert torch.equal(baked[3], torch.zeros_like(baked[3]))
        assert torch.isfinite(baked).all() and torch.isfinite(bias).all()


def test_bias_is_mapped_by_the_projection_alone():
    w, b, v, _ = site(2)
    unit = v / v.norm()
    _, bias = ablation_operator(v, 1.0, norm="row", site_weight=w, site_bias=b).bake(w, b)
    torch.testing.assert_close(bias, b - unit * (unit @ b), rtol=1e-4, atol=1e-5)


def example_operators(seed=0, rank=2):
    """One of every form, by name, for outputs 24 wide."""
    w, b, v, _ = site(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    directions = torch.randn(rank, 24, generator=generator)
    shift = torch.randn(24, generator=generator)
    factors = torch.randn(2, 24, rank, generator=generator) / 5
    return {
        "one direction": ablation_operator(v, 0.7),
        "row norms": ablation_operator(v, 0.7, norm="row", site_weight=w, site_bias=b),
        "several directions": ablation_operator(directions, 0.7),
        "factors": Operator(*factors, shift=shift),
    }


@pytest.mark.parametrize("form", example_operators())
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_form_applies_as_it_bakes_and_is_exact_as_an_adapter(form, with_bias):
    operator = example_operators()[form]
    w, b, _, x = site(0)
    bias = b if with_bias else None
    y = x @ w.T + (0 if bias is None else bias)
    baked, baked_bias = operator.bake(w, bias)
    expected = x @ baked.T + (0 if baked_bias is None else baked_bias)
    torch.testing.assert_close(operator(y), expected, rtol=1e-4, atol=1e-4)
    if operator.scale is None:  # B A is the change of the weight, rank R
        torch.testing.assert_close(
            w + operator.left @ (operator.right.T @ w), baked, rtol=1e-5, atol=1e-4
        )


def test_a_share_of_several_directions_is_removed():
    directions = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))
    operator = ablation_operator(directions, 0.7)
    basis, _ = torch.linalg.qr(directions.T.double())
    y = torch.randn(7, 24)
    along = y.double() @ basis
    expected = 0.3 * along
    torch.testing.assert_close(operator(y).double() @ basis, expected, rtol=1e-4, atol=1e-5)
    rest = y.double() - along @ basis.T
    torch.testing.assert_close(operator(y).double() - expected @ basis.T, rest, atol=1e-5, rtol=0)


def test_the_span_of_directions_is_removed_though_some_depend_on_others():
    directions = torch.randn(2, 24)
    more = torch.stack([*directions, directions.sum(dim=0), torch.zeros(24)])
    y = torch.randn(5, 24)
    ours, expected = ablation_operator(more, 1.0)(y), ablation_operator(directions, 1.0)(y)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3])
def test_gradients_reach_the_output_and_the_operator(dtype, rank):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(8, rank, generator=generator) for _ in range(2))
    y = torch.randn(4, 8, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (left, right, y)]
    Operator(left, right)(y.to(dtype)).square().sum().backward()
    ours = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    (y + y @ right @ left.T).square().sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for gradient, leaf in zip(ours, leaves, strict=True):
        error = (gradient - leaf.grad).norm() / leaf.grad.norm()
        assert float(error) < tolerance


def test_output_keeps_its_dtype():
    operator = ablation_operator(torch.ones(8), 1.0)
    assert operator(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (operator.width, operator.rank) == (8, 1)


def test_bad_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="not zero"):
        ablation_operator(torch.zeros(4), 1.0)
    with pytest.raises(ValueError, match="needs the site's weight"):
        ablation_operator(torch.ones(4), 1.0, norm="row")
    with pytest.raises(ValueError, match="one of none, row, normalized_row"):
        ablation_operator(torch.ones(4), 1.0, norm="rows", site_weight=torch.ones(4, 4))


def test_moving_keeps_the_values():
    w, b, v, _ = site(3)
    operator = ablation_operator(v, 0.7, norm="row", site_weight=w, site_bias=b)
    moved = operator.to(torch.device("cpu"))
    assert isinstance(moved, Operator)
    y = torch.randn(3, 24)
    assert torch.equal(moved(y), operator(y))


@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("factor", [0.0, 1.0, 1.5])
def test_a_strengthened_edit_makes_the_same_change_so_many_times(factor, with_rest):
    draw = torch.Generator().manual_seed(0)
    left, right, rest = (torch.randn(6, n, generator=draw) for n in (2, 2, 2))
    more = {"scale": rest[:, 0], "shift": rest[:, 1]} if with_rest else {}
    operator, outputs = Operator(left, right, **more), torch.randn(3, 6, generator=draw)
    expected = outputs + factor * (operator(outputs) - outputs)
    torch.testing.assert_close(operator.strengthened(factor)(outputs), expected)
