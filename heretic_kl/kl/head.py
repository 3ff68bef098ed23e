"""From final hidden states to logits, in chunks of rows. Knows nothing about the model below.

A `Head` is what stands between the last hidden state and the logits. Reference and candidate
go through the same head in chunks of the same shape, so equal hidden states give equal logits
to the last bit, and a divergence of exactly 0.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from heretic_kl.kl.packing import PackedWeight, packed
from heretic_kl.kl.storage import load_tensors, undamaged
from heretic_kl.kl.terms import row_blocks

MAX_LOGIT_ELEMENTS: Final = 2**24
"""Logits held at once for each of reference and candidate: 64 MB in float32."""

REFERENCE_KIND: Final = "heretic-kl reference"
"""Kind of the files of stored references, which may hold their head."""

_SAMPLED_ELEMENTS: Final = 2**16


@dataclass(frozen=True, eq=False)
class Head:
    """`logits = softcap * tanh(scale * (weight h + bias) / softcap)`, padding columns dropped.

    Attributes:
        weight: (V, D) output embedding, on the model's device and in its dtype.
        bias: (V,) or None.
        scale: Factor on the logits (Cohere's `logit_scale`, one over Granite's
            `logits_scaling`).
        softcap: Bound of the soft-capping (Gemma 2's `final_logit_softcapping`), or None.
        vocabulary_size: Columns from here on are padding of the weight; None keeps all.
        packed_weight: A packed copy of the weight without padding, or None.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    vocabulary_size: int | None = None
    packed_weight: PackedWeight | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` if the parts do not fit together."""
        if self.weight.dim() != 2:
            raise ValueError(f"weight must be (V, D), got {tuple(self.weight.shape)}")
        rows = self.weight.shape[0]
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(
                f"bias must be ({rows},) to fit weight {tuple(self.weight.shape)}, "
                f"got {tuple(self.bias.shape)}"
            )
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap must be positive, got {self.softcap}")
        if self.vocabulary_size is not None and not 1 <= self.vocabulary_size <= rows:
            raise ValueError(f"vocabulary_size must be in [1, {rows}], got {self.vocabulary_size}")

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the logits cover."""
        return self.vocabulary_size or int(self.weight.shape[0])

    @torch.no_grad()
    def logits(
        self,
        hidden: Tensor,  # (rows, D) after the final norm
    ) -> Tensor:
        """Return (rows, V) float32 logits (float64 from a float64 head).

        The product is computed in the weight's dtype, as the model does it; bias, scale and
        soft-capping follow in float32.

        Raises:
            ValueError: `hidden` is not (rows, D); both shapes are named.
        """
        if hidden.dim() != 2 or hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"hidden must be (rows, {self.weight.shape[1]}) to fit weight "
                f"{tuple(self.weight.shape)}, got {tuple(hidden.shape)}"
            )
        weight = self.weight[: self.vocabulary]
        # A fresh, aligned copy: BLAS may round differently for another memory alignment.
        rows = hidden.to(device=weight.device, dtype=weight.dtype, copy=True)
        if self.packed_weight is None:
            raw = rows.contiguous() @ weight.T
        else:
            raw = self.packed_weight.product(rows.contiguous(), weight)
        logits = raw if raw.dtype == torch.float64 else raw.to(torch.float32)
        if self.bias is not None:
            logits += self.bias[: self.vocabulary].to(logits.dtype)
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def with_packed_weight(self) -> "Head":
        """Return a head that reads a packed copy of the weight; itself where there is no layout."""
        packed_weight = packed(self.weight[: self.vocabulary])
        return self if packed_weight is None else replace(self, packed_weight=packed_weight)

    def kept(self) -> "Head":
        """Return a copy on the CPU that later changes of the model do not reach."""
        bias = None if self.bias is None else self.bias.detach().to("cpu", copy=True)
        weight = self.weight.detach().to("cpu", copy=True)
        return replace(self, weight=weight, bias=bias, packed_weight=None)

    def columns(self) -> dict[str, Tensor]:
        """Return it as tensors of a file; `load` reads them."""
        numbers = [self.scale, self.softcap or 0.0, float(self.vocabulary)]
        columns = {
            "head.weight": self.weight,
            "head.numbers": torch.tensor(numbers, dtype=torch.float64),
        }
        return columns if self.bias is None else {**columns, "head.bias": self.bias}

    @classmethod
    def load(cls, path: str | Path) -> "Head | None":
        """Return the head of a stored reference; None: the file has none.

        Raises:
            MeasurementError: It is no such file, or damaged.
        """
        tensors, _ = load_tensors(path, REFERENCE_KIND, "head")
        if not tensors:
            return None
        with undamaged(path):
            scale, softcap, size = (float(number) for number in tensors["numbers"].tolist())
            return cls(tensors["weight"], tensors.get("bias"), scale, softcap or None, int(size))

    def to(self, device: torch.device) -> "Head":
        """Return the head on `device`; itself if it is there."""
        if self.weight.device == device:
            return self
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias, packed_weight=None)

    @torch.no_grad()
    def same_as(self, other: "Head") -> bool:
        """Whether both give the same logits to the last bit; devices may differ."""
        if self is other:
            return True
        mine = (self.weight.shape, self.weight.dtype, self.scale, self.softcap, self.vocabulary)
        if mine != (
            (other.weight.shape, other.weight.dtype, other.scale, other.softcap, other.vocabulary)
        ):
            return False
        if (self.bias is None) != (other.bias is None):
            return False
        if self.bias is not None and other.bias is not None:
            if not torch.equal(self.bias, other.bias.to(self.bias)):
                return False
        width = int(self.weight.shape[1])
        return all(
            torch.equal(self.weight[block], other.weight[block].to(self.weight.device))
            for block in row_blocks(self.weight.shape[0], width, MAX_LOGIT_ELEMENTS)
        )

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Return a SHA-256 over shape, dtype, scalars and a sample touching every row.

        At least one element of each row is read and at most max(V, 65,536) in all: a head
        that was trained, edited or extended differs, on every device alike.
        """
        digest = hashlib.sha256()
        facts = {
            "shape": [self.vocabulary, int(self.weight.shape[1])],
            "dtype": str(self.weight.dtype),
            "bias": self.bias is not None,
            "scale": float(self.scale),
            "softcap": None if self.softcap is None else float(self.softcap),
        }
        digest.update(json.dumps(facts, sort_keys=True).encode())
        width = int(self.weight.shape[1])
        per_row = min(width, max(1, _SAMPLED_ELEMENTS // self.vocabulary))
        row = torch.arange(self.vocabulary, device=self.weight.device).unsqueeze(-1)
        step = torch.arange(per_row, device=self.weight.device) * max(1, width // per_row)
        sample = self.weight[row, (row * 7919 + step) % width]
        digest.update(_bytes(sample))
        if self.bias is not None:
            digest.update(_bytes(self.bias[: self.vocabulary]))
        return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    """Return the values as little-endian float64 bytes: the same on every device."""
    values = tensor.detach().to("cpu").to(torch.float64).contiguous().view(torch.uint8)
    return bytes(values.flatten().tolist())
