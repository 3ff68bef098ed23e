"""Benign batches for a training loss: which items, collated how, which tokens count. Runs no model.

B sequences, T positions. What is drawn is a function of the seed and of how many batches came
before, nothing else: no global random state is read or moved, and a resumed run goes on where the
interrupted one was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heretic_kl.errors import MeasurementError

IGNORED = -100
"""The label of a token that is not kept, as in cross-entropy."""

COLLATED = ("input_ids", "attention_mask")
"""What every collator for language models pads."""

_MASKS = ("loss_mask", "labels")


@dataclass(frozen=True)
class BenignBatch:
    """What both models are fed, and which of its tokens count."""

    inputs: dict[str, Tensor]
    """Arguments of the models' forward."""
    kept: Tensor | None  # (B, T) bool, aligned with tokens
    """None: all real tokens."""


class BenignBatches:
    """Endless batches of a map-style dataset: each pass in a new order, all from one seed.

    Args:
        dataset: map-style; items are dicts with `input_ids`, optionally `attention_mask`, and
            `loss_mask` (1 = kept) or `labels` (-100 = not kept); without them all tokens count.
        batch_size: B.
        seed: of the order.
        collator: gives the batch. One that `knows_masks` gets whole items, and its batch says
            what counts (`loss_mask`, else `labels`). One that does not gets `input_ids` and
            `attention_mask` alone, and masks are put where it left the real tokens: collators
            for language models do not pad masks, and some make labels of their own.
        knows_masks: see there.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        collator: Callable[[list[Any]], Mapping[str, Any]],
        *,
        knows_masks: bool,
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._collator = collator
        self._knows_masks = knows_masks
        self._pass: tuple[int, list[int]] = (-1, [])

    def batch(self, number: int) -> BenignBatch:
        """The batch that comes after `number` others.

        Raises:
            MeasurementError: the collator moved, cut or joined sequences so that masks do not fit.
        """
        first = number * self._batch_size
        items = [
            dict(self._dataset[self._index(place)])
            for place in range(first, first + self._batch_size)
        ]
        if self._knows_masks:
            batch = dict(self._collator(items))
            return BenignBatch(_without_masks(batch), _kept(batch))
        bare = [{key: item[key] for key in COLLATED if key in item} for item in items]
        inputs = _without_masks(dict(self._collator(bare)))
        return BenignBatch(inputs, _aligned(items, inputs))

    def _index(self, place: int) -> int:
        """Which item stands at `place` of the endless order."""
        number, offset = divmod(place, len(self._dataset))
        if self._pass[0] != number:
            generator = torch.Generator().manual_seed(self._seed + number)
            self._pass = (number, torch.randperm(len(self._dataset), generator=generator).tolist())
        return self._pass[1][offset]


def _without_masks(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key not in _MASKS}


def _kept(tokens: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of an item or a batch count; None if it does not say."""
    if tokens.get("loss_mask") is not None:
        return torch.as_tensor(tokens["loss_mask"]).bool()
    if tokens.get("labels") is not None:
        return torch.as_tensor(tokens["labels"]) != IGNORED
    return None


def _aligned(items: Sequence[Mapping[str, Any]], inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The items' masks, (B, T), where the collator left their real tokens."""
    masks = [_kept(item) for item in items]
    if all(mask is None for mask in masks):
        return None
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    mask_of_batch = torch.zeros_like(real)
    fits = real.shape == ids.shape and real.shape[0] == len(items)
    for row, (item, mask) in enumerate(zip(items, masks, strict=True)):
        real_tokens = torch.as_tensor(
            item.get("attention_mask", [1] * len(item["input_ids"]))
        ).bool()
        mask = real_tokens if mask is None else mask
        fits = (
            fits
            and mask.shape == real_tokens.shape
            and int(real_tokens.sum()) == int(real[row].sum())
        )
        if not fits:
            raise MeasurementError(
                "the masks of the benign dataset do not fit what the collator made of its tokens: "
                "pass a benign_collator that gives input_ids, attention_mask and loss_mask"
            )
        mask_of_batch[row, real[row]] = mask[real_tokens].to(mask_of_batch.device)
    return mask_of_batch
