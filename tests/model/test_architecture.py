from dataclasses import replace

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model import (
    edited,
    find_architecture,
    last_token_residuals,
    on_layer_outputs,
    verify_sites,
)
from heretic_kl.model.sites.output_gain import OutputGain
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
    assert verify_sites(lm).residue < 1e-5


def test_a_missing_site_is_noticed(lm):
    sites = [site for site in lm.architecture.sites if site.key[:2] != (1, "mlp")]
    partial = replace(lm, architecture=replace(lm.architecture, sites=tuple(sites)))
    with pytest.raises(UnsupportedModelError, match="layer 1 changes the residual stream"):
        verify_sites(partial)


def test_a_wrong_gain_names_the_site(lm):
    (first, *rest) = lm.architecture.sites
    wrong = replace(
        first, output_gain=OutputGain(torch.linspace(0.1, 2, lm.architecture.width)[None])
    )
    changed = replace(lm, architecture=replace(lm.architecture, sites=(wrong, *rest)))
    with pytest.raises(UnsupportedModelError, match=f"{first.key.path} .* still writes"):
        verify_sites(changed)


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


def test_a_model_without_a_stack_of_layers_says_what_was_looked_at(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", tiny_llama()))
    with pytest.raises(UnsupportedModelError, match=r"\(model\.layers \(3\)\) none takes"):
        find_architecture(lm.model, 31)
    with pytest.raises(UnsupportedModelError, match="no list of modules at 'model.blocks'"):
        find_architecture(lm.model, 32, layers="model.blocks")
    assert find_architecture(lm.model, 32, layers="model.layers").layers_path == "model.layers"


def test_names_do_not_matter(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", tiny_llama()))
    for layer in lm.model.model.layers:
        mlp = layer.mlp
        mlp.strange = mlp.down_proj
        del mlp.down_proj
        mlp.forward = lambda x, m=mlp: m.strange(m.act_fn(m.gate_proj(x)) * m.up_proj(x))
    sites = find_architecture(lm.model, 32).sites
    assert {site.key.path.rpartition(".")[2] for site in sites} == {"o_proj", "strange"}


def test_patterns_limit_what_is_considered_and_may_not_leave_a_writer_out(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", tiny_llama()))
    limited = find_architecture(lm.model, 32, sites=("*.o_proj", "mlp.down*"))
    assert limited.sites == lm.architecture.sites
    with pytest.raises(UnsupportedModelError, match="layer 0 .* changes the residual stream"):
        find_architecture(lm.model, 32, sites=("*.o_proj",))


def test_a_layer_that_writes_by_no_module_is_rejected(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", tiny_llama()))
    layer = lm.model.model.layers[1]
    forward = layer.forward
    table = torch.randn(32, 32)
    layer.forward = lambda h, *a, **k: forward(h, *a, **k) + torch.tanh(h @ table)
    with pytest.raises(UnsupportedModelError, match="layer 1 .* changes the residual stream"):
        find_architecture(lm.model, 32)


def test_a_constant_of_a_layer_is_noted(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", tiny_llama()))
    layer = lm.model.model.layers[2]
    forward = layer.forward
    layer.forward = lambda h, *a, **k: forward(h, *a, **k) + torch.ones(32)
    assert find_architecture(lm.model, 32).constant_layers == (2,)


def test_a_gate_that_differs_from_token_to_token_is_rejected(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", tiny_llama()))
    mlp = lm.model.model.layers[0].mlp
    plain, gate = mlp.forward, torch.nn.Linear(32, 32)
    mlp.forward = lambda x: plain(x) * torch.sigmoid(gate(x))
    changed = replace(lm, architecture=find_architecture(lm.model, 32))
    with pytest.raises(UnsupportedModelError, match="mlp.down_proj .* still writes"):
        verify_sites(changed)


def test_components_are_told_apart_by_what_they_do(lm):
    by_component = {
        component: {
            s.key.path.split(".")[3] for s in lm.architecture.sites if s.key.component == component
        }
        for component in ("attention", "mlp")
    }
    assert by_component["attention"] <= {"self_attn", "attn"}
    assert by_component["mlp"] == {"mlp"}
