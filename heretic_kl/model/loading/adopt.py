"""A model that the caller holds, seen as something to measure. Loads nothing, changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.capabilities import Capabilities
from heretic_kl.model.causal_model import CausalModel, evaluating
from heretic_kl.model.forward.probing import find_capabilities
from heretic_kl.model.loading.chat import ChatEncoder, chat_template, stop_token_ids
from heretic_kl.model.loading.head import find_body_and_head


def adopt_model(
    model: Any,
    tokenizer: Any,
    *,
    template: str = "model",
    variables: Mapping[str, Any] | None = None,
    response_prefix: str = "",
    capabilities: Capabilities | None = None,
) -> CausalModel:
    """A model that the caller has loaded, to be measured; nothing in it is changed.

    Args:
        model: a `transformers` causal LM, or one wrapped by PEFT, whose adapters stay active.
        tokenizer: its tokenizer.
        template: see `chat_template`; a tokenizer without a template is prompted with plain text.
        variables: see `ChatEncoder`.
        response_prefix: text at the start of every response.
        capabilities: of this very model, from an earlier call; None: they are found by running it.

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
        body, head = find_body_and_head(inner)
    adopted = CausalModel(
        model=inner,
        chat=ChatEncoder(
            tokenizer, chat_template(tokenizer, template), variables or {}, response_prefix
        ),
        stop_ids=stop_token_ids(tokenizer, getattr(inner, "generation_config", None)),
        body=body,
        head=head,
        dtype=head.weight.dtype,
    )
    if capabilities is not None:
        return replace(adopted, capabilities=capabilities)
    with evaluating(inner):
        return replace(adopted, capabilities=find_capabilities(adopted))


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
