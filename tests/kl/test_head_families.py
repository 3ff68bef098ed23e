"""`Head` against the forward pass of families whose heads are not a plain product."""

import pytest
import torch
import transformers

from heretic_kl.kl import Head

TINY = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 5.0},
    "Gemma3Text": {"final_logit_softcapping": 5.0},
    "Cohere": {"logit_scale": 0.0625},
    "Granite": {"logits_scaling": 8.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family):
    config = getattr(transformers, f"{family}Config")(**TINY, **FAMILIES[family])
    name = "Gemma3" if family == "Gemma3Text" else family
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    ids = torch.randint(1, 99, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    scale = FAMILIES[family].get("logit_scale", 1.0) / FAMILIES[family].get("logits_scaling", 1.0)
    softcap = FAMILIES[family].get("final_logit_softcapping")
    head = Head(model.lm_head.weight, model.lm_head.bias, scale=scale, softcap=softcap)
    found = head.logits(hidden.flatten(0, 1)).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad
