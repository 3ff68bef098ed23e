"""A stored reference that is damaged is refused in one line, before a candidate is loaded."""

import pytest
import torch

from heretic_kl.errors import MeasurementError
from heretic_kl.kl.head import REFERENCE_KIND
from heretic_kl.kl.storage import load_tensors, save_tensors
from heretic_kl.prompts import Prompt
from heretic_kl.score import Document, TeacherForcedKL, TextKL
from heretic_kl.testing import WORDS

TEXT = [Document(" ".join(WORDS[:20]), "a"), Document(" ".join(WORDS[5:30]), "b")]
OPTIONS = {"context": 16, "stride": 6}
ASKED = [Prompt(text, category=text[:1]) for text in ("make a cake", "wait please")]


@pytest.fixture(scope="module")
def files(tmp_path_factory, original):
    """(name) -> what was stored, over responses and over text."""
    folder = tmp_path_factory.mktemp("stored")
    made = {
        "responses": TeacherForcedKL(
            original, prompts=ASKED, kl_tokens=3, bands=True, refusal_openers=[5]
        ),
        "text": TextKL(original, TEXT, **OPTIONS),
    }
    for name, kl in made.items():
        for store in ("hidden", "head", "logits"):
            kl.save(folder / f"{name}-{store}", store=store)
    return folder


def loaded(path):
    if path.name.startswith("text"):
        return TextKL.load(path, TEXT, **OPTIONS)
    return TeacherForcedKL.load(path)


@pytest.fixture
def damaged(files, tmp_path):
    """(name, change of tensors, settings and facts) -> the file so changed."""

    def make(name, change):
        tensors, facts = load_tensors(files / name, REFERENCE_KIND)
        head, _ = load_tensors(files / name, REFERENCE_KIND, "head")
        tensors |= {f"head.{part}": values for part, values in head.items()}
        change(tensors, facts["settings"], facts)
        save_tensors(tmp_path / name, REFERENCE_KIND, tensors, facts)
        return tmp_path / name

    return make


def tensor(name, change):
    """Change a tensor by a function."""
    return lambda tensors, settings, facts: tensors.update({name: change(tensors[name])})


def element(name, place, value):
    """Change one element."""
    return lambda tensors, settings, facts: tensors[name].__setitem__(place, value)


def setting(name, value):
    return lambda tensors, settings, facts: settings.update({name: value})


def without(name):
    return lambda tensors, settings, facts: settings.pop(name)


NAN = float("nan")
OTHER_HEAD = "its head is not the one that its hidden states are for"
IDS = "token ids must be 0 or more, and below"
GAP = "no tokens, or a gap"


@pytest.mark.parametrize("name", ["responses-head", "text-hidden", "text-logits"])
def test_one_that_is_whole_is_loaded(name, damaged):
    assert loaded(damaged(name, lambda *parts: None)).reference.rows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (element("tokens", (0, 0), 10**6), IDS),
        (element("tokens", (0, 0), -1), IDS),
        (element("prompts", (0, 0), 10**6), IDS),
        (element("prompts", (0, 0), -2), GAP),
        (element("prompts", (0, 0), -1), GAP),
        (element("prompts", 0, -1), GAP),
        (element("hidden", (0, 0), NAN), "hidden states must be finite"),
        (tensor("hidden", torch.Tensor.int), "hidden states must be finite"),
        (tensor("hidden", lambda states: states[:, :0]), "hidden states must be finite"),
        (tensor("hidden", lambda states: states[:, 1:]), OTHER_HEAD),
        (tensor("head.weight", lambda weight: weight * 1.01), OTHER_HEAD),
        (tensor("head.weight", lambda weight: weight[:, 1:]), OTHER_HEAD),
        (tensor("head.weight", lambda weight: weight.double()), OTHER_HEAD),
        (element("head.weight", (0, 3), NAN), "head must be finite"),
        (element("head.numbers", 0, 2.0), OTHER_HEAD),
        (element("head.numbers", 2, 3.0), OTHER_HEAD),
        (element("head.numbers", 2, torch.inf), "cannot convert float infinity"),
        (tensor("head.numbers", lambda numbers: numbers[:2]), "not enough values"),
        (setting("batch_size", 0), "batch_size: Input should be greater"),
        (setting("batch_size", "2"), "batch_size: Input should be a valid integer, got '2'"),
        (setting("divergence", "kl"), "divergence: Input should be 'forward_kl'"),
        (setting("temperature", 0), "temperature: Input should be greater than 0"),
        (setting("position_decay", None), "position_decay: Input should be a valid number"),
        (setting("share_prefix", 1), "share_prefix: Input should be a valid boolean"),
        (setting("refusal_openers", "9" * 5000), "refusal_openers: String should match"),
        (setting("refusal_openers", "5 999999"), IDS),
        (setting("band_8", "x"), "band_8 is 'x'"),
        (setting("band_8_error", -1), "band_8_error is -1"),
        (without("band_8_error"), "it has no 'band_8_error'"),
        (setting("batching_floor", 10**400), "int too large"),
        (setting("batching_floor", NAN), "batching_floor is nan"),
        (without("rounding_floor"), "it has no 'rounding_floor'"),
        (setting("categories", "["), "categories: Invalid JSON"),
        (setting("categories", "[" * 9999), "categories: Invalid JSON"),
        (setting("categories", '["a"]'), "1 categories of 2 prompts"),
        (setting("categories", "[1, 2]"), "categories.0: Input should be a valid string"),
        (without("responses"), "responses: Field required"),
        (lambda tensors, settings, facts: facts.update(head_fingerprint=None), "which head"),
    ],
)
def test_states_with_their_head(change, reason, damaged):
    with pytest.raises(MeasurementError, match="-head is damaged: .*; store it anew") as error:
        loaded(damaged("responses-head", change))
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (element("shifted", (0, 0), NAN), "no distribution"),
        (element("shifted", (0, 0), 1.0), "no distribution"),
        (tensor("shifted", lambda logits: logits - 1), "no distribution"),
        (tensor("shifted", lambda logits: logits[:, 1:]), "with a normalizer each"),
        (tensor("shifted", torch.Tensor.float), "logits must be float16"),
        (element("log_normalizer", 0, NAN), "no distribution"),
        (element("log_normalizer", 0, 99.0), "no distribution"),
        (tensor("log_normalizer", lambda values: values[1:]), "with a normalizer each"),
        (without("context"), "context: Field required"),
        (without("grouping"), "grouping: Field required"),
        (setting("stride", "6"), "stride: Input should be a valid integer"),
        (setting("windows", "9" * 5000), "windows: String should match"),
        (setting("windows", "1"), "its windows are not those of its text"),
    ],
)
def test_logits_over_text(change, reason, damaged):
    with pytest.raises(MeasurementError, match="-logits is damaged: .*; store it anew") as error:
        loaded(damaged("text-logits", change))
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_states_that_are_too_narrow_for_their_head(damaged, original):
    """The file has no head to tell it by."""
    stored = loaded(damaged("text-hidden", tensor("hidden", lambda states: states[:, 1:])))
    with pytest.raises(MeasurementError, match="damaged: its hidden states are not 32 wide"):
        stored.score(original)
