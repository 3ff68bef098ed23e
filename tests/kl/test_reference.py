"""The original model's side: given, loaded, computed."""

import dataclasses
import gc
import math

import pytest
import torch

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    Head,
    Reference,
    ReferenceIdentity,
    row_statistics,
    storage,
    summarize,
    vocabulary_hash,
)
from heretic_kl.kl.head import REFERENCE_KIND

GENERATOR = torch.Generator().manual_seed(6)
HEAD = Head(torch.randn(60, 8, generator=GENERATOR), softcap=20.0, vocabulary_size=57)
MASK = torch.tensor([[True, True, False], [True, True, True]])
HIDDEN = torch.randn(5, 8, generator=GENERATOR)
EDITED = HIDDEN + 0.2 * torch.randn(5, 8, generator=GENERATOR)
TOKENS = torch.randint(57, (2, 3), generator=GENERATOR)
IDENTITY = ReferenceIdentity(
    "abc" * 20, 57, HEAD.fingerprint(), {"model": "tiny", "kl_tokens": 3, "seed": None}
)
LOGITS_IDENTITY = dataclasses.replace(IDENTITY, head_fingerprint=None)
REFERENCE = Reference.from_hidden(TOKENS, MASK, HIDDEN, IDENTITY)
LOGITS = Reference.from_logits(
    TOKENS, MASK, (HEAD.logits(HIDDEN[i : i + 2]) for i in (0, 2, 4)), LOGITS_IDENTITY
)


def test_hidden_states_measure_as_the_plain_functions_do():
    table = REFERENCE.measure(EDITED, head=HEAD, max_elements=120)
    rows = row_statistics(HEAD.logits(HIDDEN), HEAD.logits(EDITED), TOKENS[MASK])
    assert torch.equal(table.mask, MASK)
    torch.testing.assert_close(table.values[MASK], rows.values, rtol=1e-4, atol=1e-8)
    assert REFERENCE.measure(HIDDEN.clone(), head=HEAD).values.sum().item() == 0.0


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_stored_logits_agree_to_their_rounding(divergence):
    exact = REFERENCE.measure(EDITED, head=HEAD, divergence=divergence, temperature=1.5)
    halved = LOGITS.measure(
        EDITED, head=HEAD, divergence=divergence, temperature=1.5, max_elements=60
    )
    assert (halved.divergence, halved.temperature) == (divergence, 1.5)
    for name, column in exact.columns().items():
        torch.testing.assert_close(getattr(halved, name), column, rtol=1e-2, atol=1e-3)
    itself = summarize(LOGITS.measure(HIDDEN, head=HEAD))
    assert 0.0 <= itself.mean < 1e-5


def test_stored_logits_keep_probabilities_and_infinities():
    wide = torch.tensor([[5.0, -1e9, -math.inf, 4.0], [0.0, 0.0, -70_000.0, -math.inf]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    identity = dataclasses.replace(LOGITS_IDENTITY, vocabulary_size=4)
    stored = Reference.from_logits(torch.zeros(2, 1), mask, [wide], identity).logits
    assert stored is not None and stored.shifted.dtype == torch.float16
    assert torch.equal(torch.isinf(stored.shifted), torch.isinf(wide))
    found = stored.shifted.double() - stored.log_normalizer.unsqueeze(-1)
    torch.testing.assert_close(found.exp(), wide.double().softmax(-1), rtol=1e-3, atol=1e-9)
    with pytest.raises(MeasurementError, match="reference logits"):
        Reference.from_logits(torch.zeros(2, 1), mask, [wide * math.nan], identity)
    for chunks, reason in (([], "at least one"), ([wide[:1]], "got 1")):
        with pytest.raises(ValueError, match=f"must hold 2 rows in all.*{reason}"):
            Reference.from_logits(torch.zeros(2, 1), mask, chunks, identity)
    with pytest.raises((ValueError, RuntimeError)):
        Reference.from_logits(torch.zeros(2, 1), mask, [wide, wide], identity)


def test_stored_logits_are_written_where_they_stay():
    def held():
        halves = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        return sum(tensor.nbytes for tensor in halves if tensor.dtype == torch.float16)

    def chunks():
        for row in HIDDEN:
            sizes.append(held())
            yield HEAD.logits(row.unsqueeze(0))

    sizes = []
    stored = Reference.from_logits(TOKENS, MASK, chunks(), LOGITS_IDENTITY).logits
    assert len(sizes) == 5 and len(set(sizes)) == 1
    torch.testing.assert_close(stored.shifted, LOGITS.logits.shifted, rtol=2e-3, atol=1e-3)


def test_a_candidate_may_bring_its_own_head():
    own = dataclasses.replace(HEAD, weight=HEAD.weight * 1.1)
    for reference in (REFERENCE, LOGITS):
        table = reference.measure(HIDDEN, head=HEAD, candidate_head=own)
        assert summarize(table).mean > 1e-3
    narrower = dataclasses.replace(HEAD, vocabulary_size=50)
    with pytest.raises(ValueError, match="got 57 and 50"):
        REFERENCE.measure(HIDDEN, head=HEAD, candidate_head=narrower)
    with pytest.raises(ValueError, match=r"\(\d, 57\) and \(\d, 50\)"):
        LOGITS.measure(HIDDEN, head=narrower)


@pytest.mark.parametrize("reference", [REFERENCE, LOGITS], ids=["hidden", "logits"])
def test_round_trip(reference, tmp_path):
    path = tmp_path / "reference.safetensors"
    reference.save(path)
    loaded = Reference.load(path)
    assert loaded.identity == reference.identity
    assert torch.equal(loaded.tokens, TOKENS) and torch.equal(loaded.mask, MASK)
    one, other = (r.measure(EDITED, head=HEAD).values for r in (reference, loaded))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_hash": "x" * 60}, "another tokenizer .stored 'abcabcabcabc', now 'xxxx"),
        ({"vocabulary_size": 58}, "another vocabulary .stored 57, now 58"),
        ({"head_fingerprint": "y" * 64}, "another head .stored"),
        ({"settings": {**IDENTITY.settings, "seed": 1}}, "setting seed .stored None, now 1"),
        ({"settings": {**IDENTITY.settings, "extra": "a"}}, "setting extra"),
    ],
)
def test_a_mismatch_says_which(change, message, tmp_path):
    path = tmp_path / "reference.safetensors"
    REFERENCE.save(path)
    expected = dataclasses.replace(IDENTITY, **change)
    for reference in (REFERENCE, Reference.load(path), Reference.load(str(path))):
        with pytest.raises(MeasurementError, match=message):
            reference.identity.require_match(expected)
        reference.identity.require_match(IDENTITY)


def test_every_difference_is_named():
    other = ReferenceIdentity("z", 1, "w", {"kl_tokens": 5})
    with pytest.raises(MeasurementError) as caught:
        REFERENCE.identity.require_match(other)
    for word in ("tokenizer", "vocabulary", "head", "kl_tokens", "model"):
        assert word in str(caught.value)


def test_stored_logits_need_no_head():
    LOGITS.identity.require_match(IDENTITY)
    IDENTITY.require_match(LOGITS_IDENTITY)


def test_files_that_are_missing_or_no_reference(tmp_path):
    with pytest.raises(MeasurementError, match="there is no heretic-kl reference file"):
        Reference.load(tmp_path / "none")
    REFERENCE.measure(EDITED, head=HEAD).save(tmp_path / "table")
    with pytest.raises(MeasurementError, match="not a heretic-kl reference file, but heretic-kl t"):
        Reference.load(tmp_path / "table")


@pytest.mark.parametrize("name", ["tokens", "mask", "prompts", "hidden", "log_normalizer"])
@pytest.mark.parametrize("change", ["gone", "other shape", "other type"])
def test_a_damaged_tensor_is_one_line(name, change, tmp_path):
    path = tmp_path / "reference.safetensors"
    whole = LOGITS if name == "log_normalizer" else REFERENCE
    dataclasses.replace(whole, prompts=TOKENS.clone()).save(path)
    tensors, facts = storage.load_tensors(path, REFERENCE_KIND)
    broken = tensors.pop(name)
    if change == "other shape":
        tensors[name] = broken[None]
    if change == "other type":
        tensors[name] = broken.to(torch.int32)
    storage.save_tensors(path, REFERENCE_KIND, tensors, facts)
    if (name, change) in (("prompts", "gone"), ("hidden", "other type")):
        Reference.load(path)  # may do without, or is told by whoever measures
        return
    with pytest.raises(MeasurementError, match="reference.safetensors is damaged: .*; store it"):
        Reference.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"tokenizer_hash": None}, "tokenizer_hash and head_fingerprint must be text"),
        ({"vocabulary_size": "57"}, "vocabulary_size must be 1 or more, got '57'"),
        ({"settings": [1]}, "cannot convert"),
        ({"settings": {"a": [1]}}, r"setting a must be a scalar, got \[1\]"),
    ],
)
def test_a_damaged_fact_is_one_line(change, message, tmp_path):
    path = tmp_path / "reference.safetensors"
    REFERENCE.save(path)
    tensors, facts = storage.load_tensors(path, REFERENCE_KIND)
    storage.save_tensors(path, REFERENCE_KIND, tensors, {**facts, **change})
    with pytest.raises(MeasurementError, match=f"is damaged: .*{message}.*; store it anew"):
        Reference.load(path)


def test_parts_must_fit():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 2\)"):
        Reference.from_hidden(TOKENS, MASK[:, :2], HIDDEN, IDENTITY)
    with pytest.raises(ValueError, match=r"must be \(5, ...\).*got 4 rows"):
        Reference.from_hidden(TOKENS, MASK, HIDDEN[:4], IDENTITY)
    with pytest.raises(ValueError, match="mask must be bool"):
        Reference.from_hidden(TOKENS, MASK.long(), HIDDEN, IDENTITY)
    with pytest.raises(ValueError, match="either hidden states or logits"):
        Reference(TOKENS, MASK, IDENTITY)
    for reference in (REFERENCE, LOGITS):
        with pytest.raises(ValueError, match=r"\(4, 8\)"):
            reference.measure(EDITED[:4], head=HEAD)


def test_vocabulary_hash_ignores_order_and_nothing_else():
    plain = vocabulary_hash({"a": 0, "b": 1})
    assert plain == vocabulary_hash({"b": 1, "a": 0})
    others = [
        vocabulary_hash({"a": 1, "b": 0}),
        vocabulary_hash({"a": 0, "b": 1, "c": 2}),
    ]
    assert len({plain, *others}) == 3
