"""Weight files whose header claims more than they hold are refused before anything is allocated."""

import json
import os
import struct
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model import ModelSource
from heretic_kl.model.loading.headers import check_gguf, check_safetensors
from heretic_kl.model.loading.source import check_exists
from heretic_kl.testing import save_tiny_model, tiny_llama

FUZZ = settings(
    max_examples=int(os.environ.get("HERETIC_KL_TEST_FUZZ", "150")),
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def text(value):
    return struct.pack("<Q", len(value)) + value


def gguf(tensors=b"", count=0, facts=b"", facts_count=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, count, facts_count) + facts + tensors


def tensor(*shape):
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)
    return text(b"w") + numbers


def safetensors(header, data=b""):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(shape, start, end):
    return {"w": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}}


HUGE = 10**12
GGUFS = {
    "elements": gguf(tensor(HUGE), 1),
    "elements of two sizes": gguf(tensor(10**6, 10**6), 1),
    "tensors": gguf(tensor(1), HUGE),
    "facts": gguf(facts_count=HUGE),
    "a text": gguf(facts=struct.pack("<Q", HUGE), facts_count=1),
    "an array of numbers": gguf(facts=text(b"k") + struct.pack("<IIQ", 9, 4, HUGE), facts_count=1),
    "an array of texts": gguf(facts=text(b"k") + struct.pack("<IIQ", 9, 8, HUGE), facts_count=1),
    "arrays in arrays": gguf(
        facts=text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 99, facts_count=1
    ),
    "dimensions": gguf(text(b"w") + struct.pack("<I", 2**32 - 1), 1),
    "a version": gguf(version=99),
    "nothing": b"",
    "another magic": b"GGML" + bytes(60),
}
SAFETENSORS = {
    "elements": safetensors(entry([HUGE], 0, 4), bytes(4)),
    "bytes": safetensors(entry([HUGE], 0, 4 * HUGE), bytes(4)),
    "a header": struct.pack("<Q", 2**63) + b"{}",
    "a negative size": safetensors(entry([-1, -4], 0, 4), bytes(4)),
    "offsets in reverse": safetensors(entry([1], 4, 0), bytes(4)),
    "texts for numbers": safetensors(entry(["a"], 0, 4), bytes(4)),
    "a text many times": safetensors(entry(["a", 10**8], 0, 4), bytes(4)),
    "a list many times": safetensors(entry([[1], 10**8], 0, 4), bytes(4)),
    "a list": safetensors([1, 2]),
    "deep JSON": safetensors(b"[" * 100_000),
    "no JSON": safetensors(b"\xff\xfe"),
    "nothing": b"",
}


def refused(check, path):
    """The error of a check, which takes neither time nor memory."""
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(UnsupportedModelError) as raised:
            check(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6 and time.monotonic() - started < 60  # it does not hang
    assert str(raised.value).isprintable() and "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("claim", GGUFS)
def test_a_gguf_header_claims_too_much(tmp_path, claim):
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUFS[claim])
    assert "its header claims" in refused(lambda p: check_exists(ModelSource(str(p))), path)


@pytest.mark.parametrize("claim", SAFETENSORS)
def test_a_safetensors_header_claims_too_much(tmp_path, claim):
    folder = save_tiny_model(tmp_path / "m", tiny_llama())
    (folder / "model.safetensors").write_bytes(SAFETENSORS[claim])
    message = refused(lambda p: check_exists(ModelSource(str(p))), folder)
    assert "model.safetensors" in message and "its header claims" in message


def test_a_tensor_of_many_axes_is_refused_before_they_are_multiplied(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(safetensors(entry([2**63] * 99, 0, 4), bytes(4)))
    assert "claims a tensor of 99 axes" in refused(check_safetensors, path)
    path.write_bytes(gguf(tensor(*[2**63] * 99), 1))
    assert "claims a tensor of 99 axes" in refused(check_gguf, path)


@FUZZ
@given(st.data())
def test_headers_with_any_bytes_changed_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    whole = data.draw(st.sampled_from([*GGUFS.values(), *SAFETENSORS.values()]))
    content = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, max(0, len(whole) - 1)), max_size=8)):
        if content:
            content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    for check in (check_gguf, check_safetensors):
        try:
            check(path)
        except UnsupportedModelError as error:
            assert len(str(error)) < 1000 and "\n" not in str(error)


def test_whole_files_pass(tmp_path):
    folder = save_tiny_model(tmp_path / "m", tiny_llama())
    check_exists(ModelSource(str(folder)))
    path = tmp_path / "m.gguf"
    fact = text(b"k") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")
    path.write_bytes(gguf(tensor(2, 3), 1, fact, 1) + bytes(64))
    check_gguf(path)
