"""What is learned starts as the start, keeps directions unit, and freezes to the same edit."""

import pytest
import torch

from heretic_kl.ablation import Operator, SiteKey, ablation_operator
from heretic_kl.refine.parameters import (
    LearnableEdit,
    removes_single_directions,
    single_direction,
)

D = 12
KEYS = [SiteKey(0, "attention", "a"), SiteKey(1, "mlp", "b")]


def start(strength: float = 0.6) -> dict[SiteKey, Operator]:
    torch.manual_seed(0)
    return {key: ablation_operator(torch.randn(D), strength) for key in KEYS}


@pytest.mark.parametrize("form", ["strength", "direction", "factors"])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_begins_as_the_start_and_freezes_to_itself(form, rank):
    plan = start()
    edit = LearnableEdit(plan, form, rank=rank)
    outputs = torch.randn(5, 7, D)
    for key, learned in edit.plan.items():
        assert torch.allclose(learned(outputs), plan[key](outputs), atol=1e-5)
        assert torch.allclose(edit.frozen()[key](outputs), learned(outputs), atol=1e-5)
    for parameter in edit.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    for key, learned in edit.plan.items():
        assert torch.allclose(edit.frozen()[key](outputs), learned(outputs), atol=1e-4)
        assert edit.frozen()[key].rank == (rank if form == "factors" else 1)


def test_only_what_the_form_names_is_learned():
    learned = {
        form: {
            n.split(".")[-1]
            for n, p in LearnableEdit(start(), form).named_parameters()
            if p.requires_grad
        }
        for form in ("strength", "direction", "factors")
    }
    assert learned == {
        "strength": {"strength"},
        "direction": {"strength", "direction"},
        "factors": {"left", "right"},
    }


def test_strength_and_direction_of_an_ablation_are_read_off_it():
    direction = torch.randn(D)
    unit, strength = single_direction(ablation_operator(direction, 0.7))
    assert strength == pytest.approx(0.7, abs=1e-6)
    assert torch.allclose(unit, direction / direction.norm(), atol=1e-6)


def test_starts_of_another_form_are_rejected_but_learned_as_factors():
    weight = torch.randn(D, 4)
    restoring = ablation_operator(torch.randn(D), 0.7, norm="row", site_weight=weight)
    with pytest.raises(ValueError, match="removes one direction"):
        LearnableEdit({KEYS[0]: restoring}, "direction")
    oblique = Operator(torch.randn(D, 1), torch.randn(D, 1))
    with pytest.raises(ValueError, match="removes what it measures"):
        LearnableEdit({KEYS[0]: oblique}, "direction")
    for plan in (restoring, oblique):
        outputs = torch.randn(3, D)
        (learned,) = LearnableEdit({KEYS[0]: plan}, "factors").plan.values()
        assert torch.allclose(learned(outputs), plan(outputs), atol=1e-5)


def test_starts_with_another_form_are_known_beforehand():
    assert removes_single_directions(start())
    weight = torch.randn(D, 4)
    restoring = ablation_operator(torch.randn(D), 0.7, norm="row", site_weight=weight)
    assert not removes_single_directions({**start(), KEYS[0]: restoring})


def test_an_empty_plan_has_nothing_to_learn():
    with pytest.raises(ValueError, match="without sites"):
        LearnableEdit({})


@pytest.mark.parametrize("form", ["direction", "factors"])
def test_gradients_are_those_of_finite_differences(form):
    edit = LearnableEdit(start(), form)
    outputs = torch.randn(4, D)
    (operator, *_) = edit.plan.values()
    target = torch.randn(4, D)
    loss = ((operator(outputs) - target) ** 2).sum()
    loss.backward()
    step = 1e-3
    for parameter in operator.parameters():
        direction = torch.randn_like(parameter)
        expected = float((parameter.grad * direction).sum())
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * step * direction
                values.append(float(((operator(outputs) - target) ** 2).sum()))
                parameter -= sign * step * direction
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=2e-2, abs=1e-2)
