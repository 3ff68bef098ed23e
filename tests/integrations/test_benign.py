"""Which benign items are drawn, and which of their tokens count."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from heretic_kl.errors import MeasurementError
from heretic_kl.integrations.training_batches import BenignBatches
from heretic_kl.testing import tiny_tokenizer

OWN = {"knows_masks": False}


def stack(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def test_batches_are_endless_and_every_pass_holds_every_item_once():
    batches = BenignBatches([{"input_ids": [i]} for i in range(5)], 2, 0, stack, **OWN)
    state = torch.get_rng_state()
    found = [int(i) for n in range(5) for i in batches.batch(n).inputs["input_ids"].flatten()]
    assert sorted(found[:5]) == sorted(found[5:]) == list(range(5))
    assert found[:5] != found[5:]
    assert torch.equal(torch.get_rng_state(), state)
    assert batches.batch(1).inputs["input_ids"].flatten().tolist() == found[2:4]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask", ["loss_mask", "labels", None])
def test_masks_follow_their_tokens_through_padding(side, mask):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    rows = []
    for length in (4, 7):
        ids = list(range(5, 5 + length))
        keep = [0, 0] + [1] * (length - 2)
        row = {"input_ids": ids, "attention_mask": [1] * length, "note": "not for models"}
        if mask == "loss_mask":
            row["loss_mask"] = keep
        if mask == "labels":
            row["labels"] = [i if k else -100 for i, k in zip(ids, keep, strict=True)]
        rows.append(row)
    batches = BenignBatches(rows, 2, 0, DataCollatorForSeq2Seq(tokenizer), **OWN)
    batch = batches.batch(0)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    if mask is None:
        assert batch.kept is None
    else:
        ids = batch.inputs["input_ids"]
        assert torch.equal(batch.kept, (ids >= 7) & batch.inputs["attention_mask"].bool())


def test_a_collator_that_knows_masks_decides():
    rows = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}] * 4
    batch = BenignBatches(rows, 2, 0, stack, knows_masks=True).batch(0)
    assert batch.kept.tolist() == [[False, False, True, True]] * 2
    assert set(batch.inputs) == {"input_ids"}


def test_masks_that_do_not_fit_are_an_error():
    def cut(rows):
        return {key: value[:, :3] for key, value in stack(rows).items()}

    batches = BenignBatches(
        [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 1, 1]}], 2, 0, cut, **OWN
    )
    with pytest.raises(MeasurementError, match="pass a benign_collator"):
        batches.batch(0)
