"""Teacher-forced passes carry gradients, from the layer cache and in trees as in plain passes."""

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine, portions_with_gradient
from heretic_kl.model import edited, on_layer_outputs
from heretic_kl.prompts import Prompt
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model

SYSTEM = "please tell me about the weather in Rome and then wait I will not mix flour"
PROMPTS = tuple(Prompt(text, SYSTEM) for text in ("how do I make a cake", "tell me", "I wait"))
LOWEST = 1


@pytest.fixture(params=["trees", "rectangles"])
def lm(request, tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", TINY_CONFIGS["llama"]()))
    return lm if request.param == "trees" else lm.limited(tree_problem="off")


def gradient(lm, added, portions):
    """Of the sum of squared states, one backward pass a portion."""

    def add(layer, hidden):
        return hidden + added if layer == LOWEST else None

    rows = []
    with on_layer_outputs(lm.architecture.layers, add):
        for portion in portions:
            (portion.hidden.float() ** 2).sum().backward()
            rows += portion.rows.tolist()
    return added.grad, sorted(rows)


def test_gradients_from_the_layer_cache_are_those_of_whole_passes(lm):
    width = lm.architecture.width
    start = torch.randn(width, generator=torch.Generator().manual_seed(1))
    engine = Engine(lm, batch_size=2, cache_bytes=2**22)
    reference, batches, resumed = engine.forced_pass(PROMPTS, 4, LOWEST)
    assert resumed.boundary == LOWEST
    assert (batches.batches[0].tree is not None) == (lm.capabilities.tree_problem is None)
    ours, rows = gradient(
        lm, start.clone().requires_grad_(), portions_with_gradient(lm, batches, resumed)
    )
    assert rows == list(range(reference.rows))
    whole, _ = gradient(lm, start.clone().requires_grad_(), portions_with_gradient(lm, batches))
    assert float(whole.norm()) > 0
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)
    nudge, step = torch.zeros(width), 1e-2
    nudge[3] = step

    def value(added):
        with (
            torch.no_grad(),
            on_layer_outputs(
                lm.architecture.layers, lambda layer, h: h + added if layer == LOWEST else None
            ),
        ):
            return sum(
                float((p.hidden.double() ** 2).sum()) for p in portions_with_gradient(lm, batches)
            )

    slope = (value(start + nudge) - value(start - nudge)) / (2 * step)
    assert float(ours[3]) == pytest.approx(slope, rel=2e-2, abs=1e-2)


def test_measuring_holds_no_graph_and_an_edit_is_seen(lm):
    engine = Engine(lm, batch_size=2)
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(2))
    plan = {key: ablation_operator(direction, 0.5) for key in lm.architecture.facts()}
    assert not engine.hidden_states(plan, PROMPTS, 3).requires_grad
    _, batches, start = engine.forced_pass(PROMPTS, 3, 0)
    with edited(lm.architecture, plan):
        states = torch.cat([p.hidden[0] for p in portions_with_gradient(lm, batches, start)])
        rows = torch.cat([p.rows for p in portions_with_gradient(lm, batches, start)])
    measured = engine.hidden_states(plan, PROMPTS, 3)
    torch.testing.assert_close(states[rows.argsort()], measured, rtol=1e-4, atol=1e-5)
