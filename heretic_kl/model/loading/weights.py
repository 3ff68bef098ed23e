"""A checkpoint's weights in a dtype that works. Knows no tokenizers, layers or sites."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from heretic_kl import ranks
from heretic_kl.errors import ModelError, UnsupportedModelError
from heretic_kl.model.loading.devices import DtypeName, dtype_candidates, resolve_device
from heretic_kl.model.loading.quantization import (
    Quantization,
    forget_gguf_quantization,
    is_quantized,
    keep_gradients,
    quantization_arguments,
)
from heretic_kl.model.loading.source import ModelSource, hub_arguments, readable_errors
from heretic_kl.model.loading.tensor_parallel import check_alike, tensor_parallel
from heretic_kl.model.out_of_memory import is_out_of_memory
from heretic_kl.model.placement import device_of, is_offloaded, offloads
from heretic_kl.model.transformers_logging import quiet_transformers

PROBE_TOKENS: Final = 8
"""Length of the forward pass that shows whether a dtype works."""


@dataclass(frozen=True)
class LoadedWeights:
    """A `transformers` causal LM in evaluation mode, gradients off."""

    model: Any
    dtype: torch.dtype
    """What it computes in."""
    stored_dtype: torch.dtype
    """What its checkpoint is stored in."""


def load_weights(
    source: ModelSource,
    *,
    dtype: DtypeName,
    device: str,
    device_map: str | Mapping[str, Any] | None,
    trust_remote_code: bool,
    quantization: Quantization = "none",
) -> LoadedWeights:
    """Load a whole model in the first dtype whose forward pass gives finite logits.

    The source is no adapter. A `device_map`, passed to transformers, overrides the device. Under
    `torchrun` every process gets its part, see `tensor_parallel`.

    Raises:
        ModelError: it cannot be loaded, does not fit, or no dtype gives finite logits.
    """
    target = resolve_device(device)
    placement: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if ranks.count() > 1:
        placement = tensor_parallel(
            source,
            device=device,
            device_map=device_map,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
        )
    elif not device_map and (quantization != "none" or is_quantized(source, trust_remote_code)):
        placement = {"device_map": {"": str(target)}}  # quantized weights cannot be moved later
    failures: list[str] = []
    model: Any = None
    for candidate in dtype_candidates(dtype, target):
        model = None  # free the failed attempt before the next one
        arguments = {
            **placement,
            **quantization_arguments(source, quantization, candidate, trust_remote_code),
        }
        model, stored = _from_pretrained(source, candidate, trust_remote_code, arguments)
        if not placement:
            model = _moved(model, target, source)
        model.eval().requires_grad_(False)
        failure = str(candidate).removeprefix("torch.")
        try:
            logits = probe_logits(model)
            check_alike(source, logits)
            if bool(torch.isfinite(logits).all()):
                return LoadedWeights(model, candidate, stored)
        except RuntimeError as error:  # its code does not run in this dtype
            if is_out_of_memory(error):
                raise
            failure += f" ({str(error).splitlines()[0]})"
        failures.append(failure)
    raise ModelError(
        f"{source.name!r} gives no finite logits in {', '.join(failures)}: "
        "try --dtype float32, and check the checkpoint"
    )


def check_decoder_only(source: ModelSource, config: Any) -> None:
    """Reject encoder-decoders by their config.

    Raises:
        UnsupportedModelError: it is one.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{source.name!r} ({config.model_type}) is an encoder-decoder; "
            "only decoder-only language models can be edited"
        )


@torch.no_grad()
def probe_logits(model: Any) -> Tensor:
    """The logits of a short forward pass, (1, PROBE_TOKENS, V)."""
    embeddings = model.get_input_embeddings()
    tokens = torch.arange(PROBE_TOKENS) * 97 % int(embeddings.weight.shape[0])
    logits: Tensor = model(input_ids=tokens[None].to(device_of(embeddings)), use_cache=False).logits
    return logits


def _from_pretrained(
    source: ModelSource, dtype: torch.dtype, trust_remote_code: bool, arguments: dict[str, Any]
) -> tuple[Any, torch.dtype]:
    """The model, and the dtype its checkpoint is stored in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, extra = hub_arguments(source)
    with quiet_transformers(), readable_errors(source, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)
        check_decoder_only(source, config)
        stored = getattr(config, "dtype", None)
        if source.gguf_file is None:
            # A pickle from outside can run code: only safetensors are read.
            extra = {**extra, "use_safetensors": True}
        auto_class: Any = AutoModelForCausalLM
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, **arguments, **extra}
        model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
        prefix = _prefix_of_stored_names(info)
        if prefix is not None:
            options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
            model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
    _check_complete(source, model, info)
    keep_gradients(model)
    if source.gguf_file is not None:
        forget_gguf_quantization(model)
        stored = torch.bfloat16  # a quantized file has no dtype to go back to
    return model, stored if isinstance(stored, torch.dtype) else torch.bfloat16


def _prefix_of_stored_names(info: Any) -> str | None:
    """What precedes the names of all missing weights in the files; None: nothing does.

    Some vision-language models are released with their language model under a name of its own, for
    which `transformers` has no rule when that half is loaded alone.
    """
    missing, stored = sorted(info["missing_keys"]), set(info["unexpected_keys"])
    if not missing:
        return None
    prefixes = {name.removesuffix(missing[0]) for name in stored if name.endswith(f".{missing[0]}")}
    return next((prefix for prefix in prefixes if {prefix + m for m in missing} <= stored), None)


def _check_complete(source: ModelSource, model: Any, info: Any) -> None:
    """Reject missing weights, which loading leaves random, and weights on no device."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise UnsupportedModelError(
            f"{source.name!r} lacks {len(missing)} of the model's weights, for instance "
            f"{missing[0]}: the download is incomplete, or of another layout"
        )
    if is_offloaded(model) and not offloads(model):
        raise ModelError(
            f"{source.name!r} does not fit in memory, and transformers offloads none of it: use a "
            "smaller model, or --quantization"
        )


def _moved(model: Any, device: torch.device, source: ModelSource) -> Any:
    try:
        return model.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{source.name!r} does not fit on {device}: try --device-map auto or --device cpu"
        ) from error
