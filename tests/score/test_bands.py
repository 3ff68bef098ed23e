"""A model's own weights rounded, and what a KL is read against."""

import pytest
import torch
from judge import log_rows, mean_of_means

from heretic_kl.errors import ModelError
from heretic_kl.kl import Interval
from heretic_kl.model.rounding import BLOCK, linear_weights, round_to_nearest, rounded_weights
from heretic_kl.score import Band, Document, TeacherForcedKL, TextKL
from heretic_kl.score.bands import BITS, place_among
from heretic_kl.testing import TINY_CONFIGS, WORDS, load_tiny_model, save_tiny_model

PROMPTS = ["make a cake", "tell me about Rome", "wait please"]


@pytest.fixture(scope="module")
def kl(original):
    return TeacherForcedKL(original, prompts=PROMPTS, kl_tokens=4, dtype="float32", bands=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(8, 64), (3, 40), (2, 5, 33)])
def test_each_weight_moves_by_half_a_step_at_most(bits, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    rounded = round_to_nearest(weight, bits)
    for block, original in zip(rounded.split(BLOCK, -1), weight.split(BLOCK, -1), strict=True):
        step = original.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((block - original).abs() <= step / 2 * (1 + 1e-5)).all()
        levels = block / step
        assert torch.allclose(levels, levels.round(), atol=1e-3)
        assert levels.abs().max() <= 2 ** (bits - 1) - 1 + 1e-3
    across = round_to_nearest(weight.transpose(-1, -2), bits, input_dim=-2)
    assert torch.equal(across.transpose(-1, -2), rounded)
    assert torch.equal(round_to_nearest(torch.zeros(2, 40), bits), torch.zeros(2, 40))


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_weights_come_back_to_the_last_bit(family, tmp_path):
    model = load_tiny_model(save_tiny_model(tmp_path / family, TINY_CONFIGS[family]())).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="in between"), rounded_weights(model, 4):
        changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
        raise RuntimeError("in between")
    assert len(changed) == len(linear_weights(model)) >= 3 * 4
    assert not any("embed" in name or "lm_head" in name or "wte" in name for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_packed_weights_are_refused():
    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)
            packed = torch.zeros(4, 4, dtype=torch.uint8)
            self.layer.weight = torch.nn.Parameter(packed, requires_grad=False)

        def get_input_embeddings(self):
            return None

        get_output_embeddings = get_input_embeddings

    with pytest.raises(ModelError, match="packed or not in memory"):
        linear_weights(Packed())


def test_bands_are_those_of_float64(kl, original, load):
    sequences = kl.inputs.sequences
    model = load(original)
    reference = log_rows(model, sequences)
    for band in kl.bands:
        with rounded_weights(model, band.bits):
            rounded = log_rows(model, sequences)
        values = [(p.exp() * (p - q)).sum(-1) for p, q in zip(reference, rounded, strict=True)]
        mean, error = mean_of_means(values)
        assert band.kl == pytest.approx(mean, rel=1e-3)  # of float32 passes that batch otherwise
        assert band.standard_error == pytest.approx(error, rel=1e-2)
    assert [band.bits for band in kl.bands] == list(BITS)
    assert [band.kl for band in kl.bands] == sorted(band.kl for band in kl.bands)
    assert kl.score(original).kl == 0.0  # the weights are back, and the reference is untouched


def test_a_rounded_model_is_at_its_band(kl, original, load):
    candidate = load(original)
    with rounded_weights(candidate, 4):
        measured = kl.score(candidate)
    (band,) = [band for band in kl.bands if band.bits == 4]
    assert measured.kl == pytest.approx(band.kl, rel=1e-6)
    about = f"{measured.kl:.3g} nats: about 4-bit rounding of this model; floor "
    assert measured.verdict.startswith(about)


def test_over_text_and_stored(kl, original, make_adapter, tmp_path):
    text = [Document(" ".join(WORDS * 2), "long")]
    bands = TextKL(original, text, context=16, stride=6, dtype="float32", bands=True).bands
    assert len(bands) == len(BITS) and bands[-1].kl > bands[0].kl > 0.0
    kl.save(tmp_path / "r.safetensors")
    stored = TeacherForcedKL.load(tmp_path / "r.safetensors")
    assert stored.bands == kl.bands
    adapter = make_adapter(original, str(original))
    assert stored.score(adapter).verdict == kl.score(adapter).verdict


def test_where_a_kl_lies():
    bands = [Band(8, 0.1, None), Band(6, 0.2, None), Band(5, 0.19, None)]
    assert place_among(0.05, bands) == "less than 8-bit rounding of this model"
    assert place_among(0.1, bands) == "between 8- and 5-bit rounding of this model"
    assert place_among(0.195, bands) == "between 5- and 6-bit rounding of this model"
    assert place_among(0.2, bands) == "more than 5-bit rounding of this model"
    wide = Interval(0.18, 0.21)
    assert place_among(0.194, bands, wide) == "about 5-bit rounding of this model"
    assert place_among(0.196, bands, wide) == "about 6-bit rounding of this model"
    narrow = Interval(0.14, 0.16)
    assert place_among(0.15, bands, narrow) == "between 8- and 5-bit rounding of this model"
