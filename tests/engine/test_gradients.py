"""Teacher-forced passes carry gradients, in trees and in rectangles; measuring holds no graph."""

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine, forced_sequences
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.engine.teacher_forcing.forward import forced_portions
from heretic_kl.model import edited, on_layer_outputs
from heretic_kl.prompts import Prompt
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model

SYSTEM = "please tell me about the weather in Rome and then wait I will not mix flour"
PROMPTS = tuple(Prompt(text, SYSTEM) for text in ("how do I make a cake", "tell me", "I wait"))
LAYER = 1


@pytest.fixture(params=["trees", "rectangles"])
def lm(request, tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", TINY_CONFIGS["llama"]()))
    return lm if request.param == "trees" else lm.limited(tree_problem="off")


def test_the_gradient_is_the_slope(lm):
    sequences = [ForcedSequence(lm.chat.encode(prompt), (5, 6, 7)) for prompt in PROMPTS]
    batches = Engine(lm, batch_size=2).runner.laid_out(sequences)
    assert (batches.batches[0].tree is not None) == (lm.capabilities.tree_problem is None)

    def value(added):
        """Sum of the squared states with a vector added to the stream."""

        def add(layer, hidden):
            return hidden + added if layer == LAYER else None

        with on_layer_outputs(lm.architecture.layers, add):
            return sum((p.hidden.double() ** 2).sum() for p in forced_portions(lm, batches))

    added = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(1))
    added.requires_grad_()
    value(added).backward()
    nudge, step = torch.zeros_like(added), 1e-2
    nudge[3] = step
    with torch.no_grad():
        slope = float(value(added + nudge) - value(added - nudge)) / (2 * step)
    assert float(added.grad[3]) == pytest.approx(slope, rel=2e-2, abs=1e-2)


def test_measuring_holds_no_graph_and_an_edit_is_seen(lm):
    engine = Engine(lm, batch_size=2)
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(2))
    plan = {key: ablation_operator(direction, 0.5) for key in lm.architecture.facts()}
    reference = engine.reference(PROMPTS, 3)
    measured = engine.hidden_states(plan, PROMPTS, 3)
    assert not measured.requires_grad
    with edited(lm.architecture, plan):
        again = engine.runner.hidden_states(forced_sequences(reference))
    torch.testing.assert_close(again, measured, rtol=1e-4, atol=1e-5)
