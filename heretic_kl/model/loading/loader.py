"""From a hub id, a folder or a GGUF file to a model to edit or to measure. Safetensors and GGUF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from heretic_kl import ranks
from heretic_kl.errors import ModelError, UnsupportedModelError
from heretic_kl.model.forward.probing import find_capabilities
from heretic_kl.model.language_model import LanguageModel
from heretic_kl.model.loading.adapters import (
    adapter_base,
    check_adapter,
    merged_adapter,
    with_adapter,
)
from heretic_kl.model.loading.chat import ChatEncoder, chat_template, stop_token_ids
from heretic_kl.model.loading.devices import DtypeName
from heretic_kl.model.loading.head import find_body_and_head
from heretic_kl.model.loading.quantization import Quantization
from heretic_kl.model.loading.source import (
    ModelSource,
    check_cached,
    check_exists,
    has_tokenizer,
    hub_arguments,
    no_safetensors,
    readable_errors,
)
from heretic_kl.model.loading.weights import PROBE_TOKENS, check_decoder_only, load_weights
from heretic_kl.model.placement import device_of
from heretic_kl.model.sites.architecture import find_architecture
from heretic_kl.model.transformers_logging import quiet_transformers


def load_model(
    source: ModelSource,
    *,
    base: ModelSource | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    quantization: Quantization = "none",
    trust_remote_code: bool = False,
    template: str = "model",
    variables: Mapping[str, Any] | None = None,
    layers: str | None = None,
    sites: Sequence[str] = (),
) -> LanguageModel:
    """Load a model to edit.

    Args:
        source: where it comes from. The folder of a PEFT adapter is merged into its base.
        base: the model that an adapter is merged into; None: the one it names.
        dtype: see `load_weights`, as for the next three.
        device: a torch device or `auto`.
        device_map: overrides `device`.
        quantization: of the weights as they are loaded, by bitsandbytes.
        trust_remote_code: run code from the model's repository.
        template: see `chat_template`.
        variables: see `ChatEncoder`.
        layers: see `find_architecture`, as for `sites`.
        sites: patterns of module paths.

    Raises:
        ModelError: it does not exist, cannot be edited, or gives no finite logits in any dtype.
    """
    whole = _whole_model(source, base, quantization)
    tokenizer = load_tokenizer(source if has_tokenizer(source) else whole, trust_remote_code)
    chat = ChatEncoder(tokenizer, chat_template(tokenizer, template), variables or {})
    weights = load_weights(
        whole,
        dtype=dtype,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    model = weights.model
    check_cached(whole, getattr(model.config, "_commit_hash", None) or whole.revision)
    if source.adapter is not None:
        model = merged_adapter(model, source.adapter, whole.name)
    _check_causal(source, model)
    body, head = find_body_and_head(model)
    loaded = LanguageModel(
        source=source,
        model=model,
        chat=chat,
        stop_ids=stop_token_ids(tokenizer, getattr(model, "generation_config", None)),
        architecture=find_architecture(model, _stream_width(model), layers=layers, sites=sites),
        body=body,
        head=head,
        dtype=weights.dtype,
        stored_dtype=weights.stored_dtype,
        quantization=quantization,
    )
    return replace(loaded, capabilities=find_capabilities(loaded))


def load_to_measure(
    source: ModelSource,
    *,
    base: ModelSource | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a `transformers` causal LM that is measured and never edited, whatever its layout.

    Args:
        source: a model, or the folder of a PEFT adapter.
        base: the model that an adapter is put on.
        dtype: see `load_weights`, as for the rest.
        device: a torch device or `auto`.
        device_map: overrides `device`.
        trust_remote_code: run code from the model's repository.

    Raises:
        ModelError: see `load_model`; an adapter has no base, or does not fit it.
    """
    whole = check_parts(source, base)
    model = load_weights(
        whole,
        dtype=dtype,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    ).model
    if source.adapter is None:
        return model
    return with_adapter(model, source.adapter, whole.name)


def check_to_measure(
    source: ModelSource, *, base: ModelSource | None = None, trust_remote_code: bool = False
) -> None:
    """Check for what would make `load_to_measure` fail, as far as it shows without the weights.

    Raises:
        ModelError: see `load_to_measure`.
    """
    from transformers import AutoConfig

    whole = check_parts(source, base)
    if whole.gguf_file is not None:
        return  # its header is read with its tokenizer
    name, extra = hub_arguments(whole)
    with quiet_transformers(), readable_errors(whole, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)
        check_decoder_only(whole, config)
    if whole.folder is not None and not any(whole.folder.glob("*.safetensors")):
        raise no_safetensors(whole)


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model or adapter.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    name, extra = hub_arguments(source)
    with quiet_transformers(), readable_errors(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)


def check_parts(source: ModelSource, base: ModelSource | None) -> ModelSource:
    """The model whose weights are loaded: the source, or the base of an adapter.

    Raises:
        ModelError: one of them does not exist or is of the wrong kind; it is named.
    """
    check_exists(source)
    if source.adapter is None:
        return source
    check_adapter(source.adapter)
    if ranks.count() > 1:
        raise UnsupportedModelError(
            f"{source.name!r} is an adapter, which cannot be put on a model that is split among "
            "processes: merge it first, or run without torchrun"
        )
    if base is None:
        raise ModelError(
            f"{source.name!r} is an adapter and names no base model: give the model to put it on "
            "(--base)"
        )
    check_exists(base)
    if base.adapter is not None:
        raise UnsupportedModelError(
            f"{base.name!r}, to put the adapter {source.name!r} on, is an adapter itself: merge "
            "one of them first"
        )
    return base


def _whole_model(
    source: ModelSource, base: ModelSource | None, quantization: Quantization
) -> ModelSource:
    """The source, or the base of an adapter: the one given, else the one that it names."""
    if source.adapter is not None and base is None:
        base_name = adapter_base(source.adapter)
        base = None if base_name is None else ModelSource(base_name)
    whole = check_parts(source, base)
    if source.adapter is not None and quantization != "none":
        raise UnsupportedModelError(
            f"{source.name!r} is an adapter, which cannot be merged into quantized weights: "
            "leave out --quantization, or merge it first"
        )
    return whole


def _stream_width(model: Any) -> int:
    """D, as the config states it, else the width of the input embeddings."""
    embedding_width = model.get_input_embeddings().weight.shape[1]
    return int(getattr(model.config.get_text_config(), "hidden_size", embedding_width))


@torch.no_grad()
def _check_causal(source: ModelSource, model: Any) -> None:
    """Reject encoders, whose earlier tokens attend to later ones."""
    embeddings = model.get_input_embeddings()
    vocabulary = len(embeddings.weight)
    tokens = (torch.arange(PROBE_TOKENS) * 97 % vocabulary).repeat(2, 1)
    tokens[1, -1] = (tokens[1, -1] + 1) % vocabulary
    logits = model(input_ids=tokens.to(device_of(embeddings)), use_cache=False).logits
    first, second = logits[:, 0].float()
    if float((first - second).norm()) > 0.05 * float(first.norm()):
        raise UnsupportedModelError(
            f"{source.name!r} ({model.config.model_type}) attends in both directions, as encoders "
            "do; only decoder-only language models can be edited"
        )
