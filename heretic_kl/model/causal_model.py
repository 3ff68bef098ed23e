"""A frozen causal language model, as measuring needs it. Knows nothing about layers or sites."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from heretic_kl.kl import Head, vocabulary_hash
from heretic_kl.model.capabilities import Capabilities
from heretic_kl.model.loading.chat import ChatEncoder
from heretic_kl.model.placement import device_of

M = TypeVar("M", bound="CausalModel")


@dataclass(frozen=True)
class CausalModel:
    """A causal language model with its chat encoder and output head: what teacher forcing needs."""

    model: Any
    """A `transformers` causal LM."""
    chat: ChatEncoder
    stop_ids: frozenset[int]
    body: Any
    """The model without its head: called with token ids, returns `last_hidden_state`."""
    head: Head
    dtype: torch.dtype
    """What it computes in."""
    capabilities: Capabilities = field(default=Capabilities(), kw_only=True)
    """Which ways of saving work are exact for it."""

    def limited(self: M, **changes: Any) -> M:
        """The same model with some capabilities changed, for instance `tree_problem="off"`."""
        return replace(self, capabilities=replace(self.capabilities, **changes))

    @property
    def device(self) -> torch.device:
        """Of the input embeddings."""
        return device_of(self.model.get_input_embeddings())

    @property
    def dtype_name(self) -> str:
        """For instance `float32`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def parameter_count(self) -> int:
        """Number of weights; shared ones count once."""
        return int(self.model.num_parameters())  # counts quantized weights right

    def tokenizer_hash(self) -> str:
        """Of the vocabulary, which two models must share to be compared position by position."""
        return vocabulary_hash(self.chat.tokenizer.get_vocab())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode until the block is left; then every module is as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
