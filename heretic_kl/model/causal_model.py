"""A frozen causal language model, as measuring needs it. Knows nothing about layers or sites."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.kl import Head, vocabulary_hash
from heretic_kl.model.loading.chat import ChatEncoder, chat_template, stop_token_ids
from heretic_kl.model.loading.head import find_body_and_head


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

    @property
    def device(self) -> torch.device:
        """Of the input embeddings."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

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


def adopt_model(
    model: Any,
    tokenizer: Any,
    *,
    template: str = "model",
    enable_thinking: bool | None = None,
    response_prefix: str = "",
    vocabulary_size: int | None = None,
) -> CausalModel:
    """A model that the caller has loaded, to be measured; nothing in it is changed.

    Args:
        model: a `transformers` causal LM, or one wrapped by PEFT, whose adapters stay active.
        tokenizer: its tokenizer.
        template: see `chat_template`; a tokenizer without a template is prompted with plain text.
        enable_thinking: see `ChatEncoder`.
        response_prefix: text at the start of every response.
        vocabulary_size: tokens that count; columns of the head beyond it are padding.

    Raises:
        UnsupportedModelError: it is not a causal LM with a linear head, or has an adapter that
            does not work inside the layers.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a causal language model of transformers"
        )
    with evaluating(inner):
        body, head = find_body_and_head(inner, vocabulary_size=vocabulary_size)
    return CausalModel(
        model=inner,
        chat=ChatEncoder(
            tokenizer, chat_template(tokenizer, template), enable_thinking, response_prefix
        ),
        stop_ids=stop_token_ids(tokenizer, getattr(inner, "generation_config", None)),
        body=body,
        head=head,
        dtype=head.weight.dtype,
    )


def unwrapped(model: Any) -> Any:
    """The causal LM inside wrappers of PEFT and data parallelism; adapters in its layers stay.

    Raises:
        UnsupportedModelError: the adapter works on the prompt instead of the layers.
    """
    while True:
        config: Any = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"adapters of kind {config.peft_type.value} put learned tokens before the prompt; "
                "only adapters inside the layers (such as LoRA) can be measured"
            )
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


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
