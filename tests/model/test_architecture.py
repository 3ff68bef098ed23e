import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model import (
    edited,
    find_architecture,
    last_token_residuals,
    on_layer_outputs,
    prove_sites,
)
from heretic_kl.model.proof import direction_residue
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model, tiny_llama


@pytest.fixture(scope="module", params=list(TINY_CONFIGS))
def lm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return load_tiny_model(save_tiny_model(folder / "m", TINY_CONFIGS[request.param]()))


TOKENS = torch.tensor([[5, 9, 2, 7, 11, 3]])


def logits(lm):
    with torch.inference_mode():
        return lm.model(input_ids=TOKENS).logits


def plan_for(lm, weight=1.0):
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(3))
    return {key: ablation_operator(direction, weight) for key in lm.architecture.facts()}


def test_sites_are_all_that_writes(lm):
    assert float(direction_residue(lm).max()) < 1e-5
    assert prove_sites(lm) < 1e-5


def test_a_missing_site_is_noticed(lm, monkeypatch):
    facts = type(lm.architecture).facts
    monkeypatch.setattr(
        type(lm.architecture),
        "facts",
        lambda self: {k: v for k, v in facts(self).items() if k[:2] != (1, "mlp")},
    )
    with pytest.raises(UnsupportedModelError, match="layer 1 still adds"):
        prove_sites(lm)


def test_leaving_the_context_restores_logits_bit_for_bit(lm):
    before = logits(lm)
    with edited(lm.architecture, plan_for(lm)):
        assert not torch.equal(logits(lm), before)
    assert torch.equal(logits(lm), before)
    with pytest.raises(RuntimeError, match="inside"):
        with edited(lm.architecture, plan_for(lm)):
            raise RuntimeError("inside")
    assert torch.equal(logits(lm), before)


def test_an_empty_plan_and_a_zero_weight_change_nothing(lm):
    before = logits(lm)
    with edited(lm.architecture, {}):
        assert torch.equal(logits(lm), before)
    with edited(lm.architecture, plan_for(lm, weight=0.0)):
        assert torch.equal(logits(lm), before)


def test_residuals_are_those_of_the_last_real_token(lm):
    sequences = [[5, 9, 2], [7, 11, 3, 4, 8], [6]]
    (batch,) = last_token_residuals(lm, [sequences])
    assert batch.shape == (3, 3, lm.architecture.width)
    for row, sequence in enumerate(sequences):
        (alone,) = last_token_residuals(lm, [[sequence]])
        torch.testing.assert_close(batch[row], alone[0], rtol=1e-4, atol=1e-5)


def test_residuals_are_the_hidden_states_of_transformers(lm):
    (residuals,) = last_token_residuals(lm, [TOKENS.tolist()])
    with torch.inference_mode():
        states = lm.model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    for layer in range(len(lm.architecture.layers) - 1):
        torch.testing.assert_close(residuals[0, layer], states[layer + 1][0, -1])


def test_a_visitor_can_replace_what_a_layer_gives(lm):
    before = logits(lm)
    with on_layer_outputs(lm.architecture.layers, lambda layer, hidden: hidden * 0.5):
        assert not torch.equal(logits(lm), before)
    assert torch.equal(logits(lm), before)


def test_head_gives_the_models_own_logits(lm):
    with torch.inference_mode():
        hidden = lm.body(input_ids=TOKENS).last_hidden_state[0]
    torch.testing.assert_close(lm.head.logits(hidden), logits(lm)[0], rtol=1e-4, atol=1e-4)


def test_unknown_layouts_list_what_was_tried():
    with pytest.raises(UnsupportedModelError, match=r"tried model\.layers"):
        find_architecture(torch.nn.Linear(2, 2), 2)


def test_an_unknown_writer_lists_what_was_tried(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", tiny_llama()))
    layer = lm.model.model.layers[1]
    layer.mlp.strange_proj = layer.mlp.down_proj
    del layer.mlp.down_proj
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .* no known mlp output: tried mlp"):
        find_architecture(lm.model, 32)
    layer.mlp.down_proj = torch.nn.Linear(8, 16)
    with pytest.raises(UnsupportedModelError, match="writes 16 features"):
        find_architecture(lm.model, 32)
