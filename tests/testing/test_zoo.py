"""The zoo's laws: on a dozen families by default, on every model type with `-m architectures`."""

import importlib.util
import inspect

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from heretic_kl.model.transformers_logging import quiet_transformers
from heretic_kl.testing import tiny_tokenizer, zoo

EVERY = zoo.model_types()
FEW = (
    "bamba deepseek_v3 falcon_h1 gemma2 gemma3_text gpt2 gpt_oss jamba lfm2 llama mamba2 mixtral "
    "qwen3_moe qwen3_next"
).split()
PROMPT_LENGTH = 12
NEVER_BUILT = {
    "gemma4_assistant": "ValueError: hidden_size_per_layer_input must be 0",
    "musicgen": "'MusicgenConfig' object has no attribute 'dropout'",
    "musicgen_melody": "'MusicgenMelodyConfig' object has no attribute 'dropout'",
}
"""Not decoders, and `AutoModelForCausalLM.from_config` fails on their own default config."""
BIGGEST_BYTES = 5_000_000


def decoders(model_types):
    return [name for name in model_types if zoo.kind_of(name).name == "decoder"]


def few_and_every(model_types):
    """Parameters: the few always, the others under the marker."""
    return [
        pytest.param(name, marks=() if name in FEW else pytest.mark.architectures)
        for name in model_types
    ]


@pytest.fixture(autouse=True)
def quiet():
    with quiet_transformers(), torch.no_grad():
        yield


def built(model_type, **options):
    library = zoo.NEEDS_LIBRARY.get(model_type)
    if library and importlib.util.find_spec(library) is None:
        with pytest.raises(ImportError, match=library):
            zoo.tiny_model(model_type)
        pytest.skip(f"needs {library}")
    return zoo.tiny_model(model_type, **options)


def prompts():
    words = len(tiny_tokenizer())
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(4, words, (2, PROMPT_LENGTH), generator=drawn)


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def earlier_change(model):
    """How much the last token moves the logits of the positions before it."""
    ids = prompts()
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, -1] == 5, 6, 5)
    return (logits(model, ids) - logits(model, other))[:, :-1].abs().max()


@pytest.mark.parametrize("model_type", few_and_every(decoders(EVERY)))
def test_decoders_are_small_finite_causal_and_tell_tokens_apart(model_type):
    model = built(model_type)
    assert not model.training
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) < BIGGEST_BYTES
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    seen = logits(model, prompts())
    assert seen.shape == (2, PROMPT_LENGTH, zoo.VOCABULARY)
    assert torch.isfinite(seen).all()
    assert seen.std(dim=-1).mean() > 0.1  # between tokens of the vocabulary
    assert seen.std(dim=1).mean() > 0.05  # between positions
    assert earlier_change(model) < 1e-4


@pytest.mark.parametrize("model_type", few_and_every(decoders(EVERY)))
def test_same_seed_same_weights(model_type):
    first, second, other = (built(model_type, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("model_type", few_and_every(decoders(EVERY)))
def test_nothing_that_acts_starts_constant(model_type):
    for name, parameter in built(model_type).named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 1e-3, name


@pytest.mark.parametrize("model_type", few_and_every(decoders(EVERY)))
def test_a_cache_changes_nothing(model_type):
    model = built(model_type)
    ids = prompts()
    if model_type in zoo.OWN_CACHE:
        try:
            assert not torch.allclose(cached_logits(model, ids), logits(model, ids), atol=1e-3)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            pass  # it does not even take one
        return
    torch.testing.assert_close(cached_logits(model, ids), logits(model, ids), rtol=0, atol=1e-3)


def cached_logits(model, ids):
    """All but two tokens at once, then those two, one at a time."""
    parameters = inspect.signature(model.forward).parameters
    counts = "position_ids" in parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    cache, seen, start = DynamicCache(config=model.config), [], 0
    for end in (ids.shape[1] - 2, ids.shape[1] - 1, ids.shape[1]):
        positions = torch.arange(start, end).expand(len(ids), -1)
        more = {"position_ids": positions} if counts else {}
        more |= {name: cache, "use_cache": True}
        output = model(input_ids=ids[:, start:end], **more)
        start = end
        seen.append(output.logits)
    return torch.cat(seen, dim=1)


@pytest.mark.parametrize("model_type", few_and_every(decoders(EVERY)))
def test_saved_models_come_back(model_type, tmp_path):
    model = built(model_type)
    model.save_pretrained(tmp_path)
    loader = AutoModelForCausalLM
    if model_type in zoo.NOT_RELOADED:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            loader.from_pretrained(tmp_path)
        loader = type(model)
    again = loader.from_pretrained(tmp_path).eval()
    stored, reloaded = model.state_dict(), again.state_dict()
    assert stored.keys() == reloaded.keys()
    assert all(torch.equal(stored[name], reloaded[name]) for name in stored)
    # Equal weights at other addresses: sums may differ in their last bit.
    ids = prompts()
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", few_and_every(decoders(EVERY)))
def test_every_kind_of_layer_of_the_family_is_there(model_type):
    default = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
    tiny = zoo.tiny_config(model_type).get_text_config(decoder=True)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"):
        kinds = getattr(default, name, None)
        if kinds:
            assert set(kinds) <= set(getattr(tiny, name)), name


@pytest.mark.parametrize("model_type", ["gemma3_text", "jamba", "laguna", "qwen3_next"])
def test_deeper_wider_and_other_vocabularies(model_type):
    config = zoo.tiny_config(model_type, layers=6, width=32, vocabulary=110)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 32, 110)


@pytest.mark.parametrize("model_type", few_and_every(decoders(EVERY)))
def test_half_precision_is_the_same_model_rounded(model_type):
    rounded = built(model_type, dtype=torch.bfloat16)
    exact = dict(built(model_type).named_parameters())
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, exact[name].to(parameter.dtype)), name
    if model_type in zoo.FULL_PRECISION_ONLY:
        with pytest.raises(RuntimeError, match="same dtype"):
            logits(rounded, prompts())
    else:
        assert torch.isfinite(logits(rounded, prompts())).all()


def test_half_precision_keeps_what_is_computed_and_not_stored():
    model = zoo.tiny_model("llama", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.buffers()} == {torch.float32}


def test_building_leaves_the_generator_and_the_switches_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    zoo.tiny_model("gpt2")
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_tokenizer_fits():
    assert len(tiny_tokenizer()) <= zoo.VOCABULARY


def test_every_type_has_a_kind_and_a_reason():
    kinds = {name: zoo.kind_of(name) for name in EVERY}
    assert all(kind.reason for kind in kinds.values())
    expected = {
        "llama": "decoder",
        "gpt_neox": "decoder",  # declares `is_decoder` and is never an encoder
        "gpt2": "decoder",  # declares `add_cross_attention`
        "gemma3": "decoder",
        "bert": "encoder_only",
        "bart": "encoder_decoder",
        "trocr": "encoder_decoder",
        "xlnet": "other",
        "blt": "other",
    }
    assert {name: kinds[name].name for name in expected} == expected
    assert kinds["gemma3"].towers and not kinds["gemma3_text"].towers
    assert not kinds["llama4"].towers  # the auto class takes the text half alone


@pytest.mark.architectures
@pytest.mark.parametrize(
    "model_type", [name for name in EVERY if zoo.kind_of(name).name == "encoder_only"]
)
def test_encoders_read_both_ways(model_type):
    model = zoo.tiny_model(model_type)
    if model_type == "reformer":  # its class refuses to be built unless it is a decoder
        assert model.config.is_decoder
    else:
        assert earlier_change(model) > 1e-2


@pytest.mark.architectures
@pytest.mark.parametrize(
    "model_type", [name for name in EVERY if zoo.kind_of(name).name in ("encoder_decoder", "other")]
)
def test_the_rest_is_built_where_the_library_builds_it(model_type):
    if model_type in NEVER_BUILT:
        with pytest.raises(Exception, match=NEVER_BUILT[model_type]):
            zoo.tiny_model(model_type)
    else:
        zoo.tiny_model(model_type)
