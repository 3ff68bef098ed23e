"""From a hub id, a folder or a GGUF file to a frozen `LanguageModel`. Safetensors and GGUF only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch

from heretic_kl.errors import ModelError, UnsupportedModelError
from heretic_kl.model.language_model import LanguageModel
from heretic_kl.model.loading.adapters import (
    adapter_base,
    check_adapter,
    merged_adapter,
    with_adapter,
)
from heretic_kl.model.loading.chat import ChatEncoder, chat_template, stop_token_ids
from heretic_kl.model.loading.head import find_body_and_head
from heretic_kl.model.loading.quantization import (
    Quantization,
    forget_gguf_quantization,
    is_quantized,
    quantization_arguments,
)
from heretic_kl.model.loading.source import (
    ModelSource,
    check_exists,
    has_tokenizer,
    hub_arguments,
    no_safetensors,
    readable_errors,
)
from heretic_kl.model.sites.architecture import find_architecture
from heretic_kl.model.transformers_logging import quiet_transformers

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

PROBE_TOKENS = 8
"""Length of the forward pass that shows whether a dtype works."""


def load_model(
    source: ModelSource,
    *,
    base: ModelSource | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
    device_map: str | None = None,
    quantization: Quantization = "none",
    trust_remote_code: bool = False,
    template: str = "model",
    enable_thinking: bool | None = None,
    layers: str | None = None,
    sites: Sequence[str] = (),
) -> LanguageModel:
    """Load a model to edit, in the first dtype whose forward pass gives finite logits.

    Args:
        source: where it comes from; the folder of a PEFT adapter is put on its base, for good.
        base: the model that an adapter is put on; None: the one it names.
        dtype: a dtype, or `auto`: bfloat16, float16, float32 on a GPU; on a CPU bfloat16 only
            where the processor multiplies it in hardware, else float32.
        device: `auto` (CUDA, MPS or CPU) or a torch device.
        device_map: passed to transformers, for models spread over devices; overrides `device`.
        quantization: of the weights as they are loaded, by bitsandbytes.
        trust_remote_code: run code from the model's repository.
        template: see `heretic_kl.model.loading.chat.chat_template`.
        enable_thinking: see `ChatEncoder`.
        layers: see `find_architecture`.
        sites: see `find_architecture`.

    Raises:
        ModelNotFoundError: nothing there, or the hub cannot be reached.
        UnsupportedModelError: it is there, but is not something we can edit.
        ModelError: no dtype gives finite logits.
    """
    whole = source
    if source.adapter is not None:
        named = adapter_base(source.adapter)
        whole = base or (source if named is None else ModelSource(named))
        _check_parts(source, None if whole is source else whole)
        if quantization != "none":
            raise UnsupportedModelError(
                f"{source.name!r} is an adapter, which cannot be put on quantized weights for "
                "good: leave out --quantization, or merge it first"
            )
    check_exists(whole)
    tokenizer = load_tokenizer(source if has_tokenizer(source) else whole, trust_remote_code)
    encoder = ChatEncoder(tokenizer, chat_template(tokenizer, template), enable_thinking)
    model, computed, stored = _load_working(
        whole, dtype, device, device_map, trust_remote_code, quantization
    )
    if source.adapter is not None:
        model = merged_adapter(model, source.adapter, whole.name)
    _refuse_two_way(source, model)
    width = int(model.get_input_embeddings().weight.shape[1])
    hidden = getattr(model.config.get_text_config(), "hidden_size", width)
    architecture = find_architecture(model, int(hidden), layers=layers, sites=sites)
    body, head = find_body_and_head(model)
    return LanguageModel(
        source=source,
        model=model,
        chat=encoder,
        stop_ids=stop_token_ids(tokenizer, getattr(model, "generation_config", None)),
        architecture=architecture,
        body=body,
        head=head,
        dtype=computed,
        stored_dtype=stored,
        quantization=quantization,
    )


def load_to_measure(
    source: ModelSource,
    *,
    base: ModelSource | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a `transformers` causal LM that is measured and never edited: any layout will do.

    Args:
        source: a model, or the folder of a PEFT adapter.
        base: the model that an adapter is put on.
        dtype: see `load_model`.
        device: see `load_model`.
        device_map: see `load_model`.
        trust_remote_code: see `load_model`.

    Raises:
        ModelError: see `load_model`; an adapter has no base, or does not fit it.
    """
    _check_parts(source, base)
    if source.adapter is None:
        return _load_working(source, dtype, device, device_map, trust_remote_code)[0]
    assert base is not None  # `_check_parts`
    model, _, _ = _load_working(base, dtype, device, device_map, trust_remote_code)
    return with_adapter(model, source.adapter, base.name)


def check_to_measure(
    source: ModelSource, *, base: ModelSource | None = None, trust_remote_code: bool = False
) -> None:
    """Find what would keep `load_to_measure` from loading that shows without reading weights.

    Raises:
        ModelError: see `load_to_measure`.
    """
    from transformers import AutoConfig

    _check_parts(source, base)
    whole = source if source.adapter is None or base is None else base
    if whole.gguf_file is not None:
        return  # its header is read with its tokenizer
    name, extra = hub_arguments(whole)
    with quiet_transformers(), readable_errors(whole, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)
        _refuse_encoder_decoder(whole, config)
    if whole.folder is not None and not any(whole.folder.glob("*.safetensors")):
        raise no_safetensors(whole)


def _check_parts(source: ModelSource, base: ModelSource | None) -> None:
    """Whether the model, or the adapter and its base, are there and are what they should be."""
    check_exists(source)
    if source.adapter is None:
        return
    check_adapter(source.adapter)
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


def _load_working(
    source: ModelSource,
    dtype: DtypeName,
    device: str,
    device_map: str | None,
    trust_remote_code: bool,
    quantization: Quantization = "none",
) -> tuple[Any, torch.dtype, torch.dtype]:
    """The model in evaluation mode, the dtype it computes in and the one it is stored in."""
    target = resolve_device(device)
    place: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if not device_map and (quantization != "none" or is_quantized(source, trust_remote_code)):
        place = {"device_map": {"": str(target)}}  # quantized weights cannot be moved afterwards
    failures: list[str] = []
    model: Any = None
    for candidate in dtype_candidates(dtype, target):
        model = None  # free the failed attempt before the next one
        extra = {
            **place,
            **quantization_arguments(source, quantization, candidate, trust_remote_code),
        }
        model, stored = _load_weights(source, candidate, trust_remote_code, extra)
        if not place:
            model = _moved(model, target, source)
        model.eval().requires_grad_(False)
        failure = str(candidate).removeprefix("torch.")
        try:
            if _gives_finite_logits(model):
                return model, candidate, stored
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # its code does not run in this dtype
            failure += f" ({str(error).splitlines()[0]})"
        failures.append(failure)
    raise ModelError(
        f"{source.name!r} gives no finite logits in {', '.join(failures)}: "
        "try --dtype float32, and check the checkpoint"
    )


def resolve_device(setting: str) -> torch.device:
    """The device a setting names.

    Raises:
        ModelError: torch does not know it, or it is not there.
    """
    if setting == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(setting)
        torch.empty(1, device=device)
    except Exception as error:
        raise ModelError(
            f"device {setting!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return device


def dtype_candidates(setting: DtypeName, device: torch.device) -> tuple[torch.dtype, ...]:
    """Dtypes to try, best first."""
    if setting != "auto":
        named: torch.dtype = getattr(torch, setting)
        return (named,)
    if device.type == "cpu":
        # Without hardware support bfloat16 is several times slower than float32 on a CPU.
        fast = _cpu_multiplies_bfloat16()
        return (torch.bfloat16, torch.float32) if fast else (torch.float32,)
    return (torch.bfloat16, torch.float16, torch.float32)


def _cpu_multiplies_bfloat16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies beside a model or adapter.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    name, extra = hub_arguments(source)
    with quiet_transformers(), readable_errors(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)


def _load_weights(
    source: ModelSource, dtype: torch.dtype, trust_remote_code: bool, place: dict[str, Any]
) -> tuple[Any, torch.dtype]:
    """The model, and the dtype its checkpoint is stored in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, extra = hub_arguments(source)
    with quiet_transformers(), readable_errors(source, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)
        _refuse_encoder_decoder(source, config)
        stored = getattr(config, "dtype", None)
        if source.gguf_file is None:
            # A pickle from outside can run code: only safetensors are read.
            extra = {**extra, "use_safetensors": True}
        load: Any = AutoModelForCausalLM
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, **place, **extra}
        model, info = load.from_pretrained(name, output_loading_info=True, **options)
        outer = _outer_name(info)
        if outer is not None:
            options["key_mapping"] = {f"^{re.escape(outer)}": ""}
            model, info = load.from_pretrained(name, output_loading_info=True, **options)
    _check_complete(source, model, info)
    if source.gguf_file is not None:
        forget_gguf_quantization(model)
        stored = torch.bfloat16  # a quantized file has no dtype to go back to
    return model, stored if isinstance(stored, torch.dtype) else torch.bfloat16


def _outer_name(info: Any) -> str | None:
    """What stands before the names of all missing weights in the files; None: nothing does.

    Some releases of vision-language models hold the language model under a name of its own, for
    which `transformers` has no rule where that half alone is loaded.
    """
    missing, stored = sorted(info["missing_keys"]), set(info["unexpected_keys"])
    if not missing:
        return None
    fitting = {name.removesuffix(missing[0]) for name in stored if name.endswith(f".{missing[0]}")}
    return next((outer for outer in fitting if {outer + m for m in missing} <= stored), None)


def _check_complete(source: ModelSource, model: Any, info: Any) -> None:
    """Weights that a checkpoint lacks are random after loading, and ones on no device unusable."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise UnsupportedModelError(
            f"{source.name!r} lacks {len(missing)} of the model's weights, for instance "
            f"{missing[0]}: the download is incomplete, or of another layout"
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ModelError(
            f"{source.name!r} does not fit in memory: parts of it would be offloaded, which is "
            "not supported"
        )


def _refuse_encoder_decoder(source: ModelSource, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{source.name!r} ({config.model_type}) is an encoder-decoder; "
            "only decoder-only language models can be edited"
        )


@torch.no_grad()
def _refuse_two_way(source: ModelSource, model: Any) -> None:
    """Refuse encoders, whose earlier tokens see later ones."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    device = model.get_input_embeddings().weight.device
    tokens = (torch.arange(PROBE_TOKENS) * 97 % vocabulary).repeat(2, 1)
    tokens[1, -1] = (tokens[1, -1] + 1) % vocabulary
    first, second = model(input_ids=tokens.to(device), use_cache=False).logits[:, 0].float()
    if float((first - second).norm()) > 0.05 * float(first.norm()):
        raise UnsupportedModelError(
            f"{source.name!r} ({model.config.model_type}) reads in both directions, as encoders "
            "do; only decoder-only language models can be edited"
        )


def _moved(model: Any, device: torch.device, source: ModelSource) -> Any:
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{source.name!r} does not fit on {device}: try --device-map auto or --device cpu"
        ) from error


@torch.no_grad()
def _gives_finite_logits(model: Any) -> bool:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(PROBE_TOKENS) * 97 % vocabulary
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=tokens[None].to(device), use_cache=False).logits
    return bool(torch.isfinite(logits).all())
