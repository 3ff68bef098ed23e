"""Files with any bytes changed are read, or refused in one line: no traceback, no hang."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heretic_kl.config import load_settings
from heretic_kl.config.reading import _toml
from heretic_kl.errors import ConfigError, HereticKLError
from heretic_kl.export import read_reproduction
from heretic_kl.kl.storage import load_tensors, save_tensors

FUZZ = settings(
    max_examples=int(os.environ.get("HERETIC_KL_TEST_FUZZ", "100")),
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@st.composite
def changed(draw, whole):
    """Bytes of which some are changed, and the end is perhaps missing."""
    content = bytearray(whole)
    for place in draw(st.lists(st.integers(0, len(whole) - 1), max_size=6)):
        content[place] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(len(content) // 2, len(content)))])


@FUZZ
@given(st.binary(max_size=200) | changed(b'[prompts.harmful]\ntrain.source = "a"\nx = [1, 2.5]\n'))
def test_a_settings_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(content)
    for read in (lambda: _toml(path), lambda: load_settings(["--config", str(path)])):
        try:
            read()
        except ConfigError as error:
            assert str(error)


@FUZZ
@given(st.dictionaries(st.sampled_from(["trial", "format", "base", "files", "settings"]), JSON))
def test_a_reproduction_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(HereticKLError) as raised:
        read_reproduction(path)
    assert str(raised.value).isprintable()


@FUZZ
@given(st.data())
def test_a_stored_reference(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_tensors(path, "reference", {"w": torch.zeros(2)}, {"a": 1})
    path.write_bytes(data.draw(changed(path.read_bytes())))
    try:
        load_tensors(path, "reference")
    except HereticKLError as error:
        assert str(error)
