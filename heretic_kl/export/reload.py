"""What was saved, read back from disk as a model to measure. Compares nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from heretic_kl import ranks
from heretic_kl.errors import ExportError, MeasurementError, ModelError
from heretic_kl.export.lora import LoraFactors, read_lora
from heretic_kl.model import LanguageModel, ModelSource, load_model
from heretic_kl.model.loading.devices import DtypeName
from heretic_kl.model.placement import (
    device_of,
    is_offloaded,
    is_sharded,
    local_part,
    on_accelerator,
    placed_like,
)
from heretic_kl.model.sites.stack import submodule

SavedForm = Literal["merged", "lora"]


@contextmanager
def saved_model(folder: Path, form: SavedForm, like: LanguageModel) -> Iterator[LanguageModel]:
    """The saved model until the block is left, prompted and computed as the model it came from.

    A merged model is loaded beside the original, with the saved tokenizer. An adapter is applied
    to the original in memory by hooks that compute what PEFT computes; while the block lasts
    `like` is edited, and measuring it as the original is wrong.

    `like` is the original and gives dtype, device, chat template and response prefix.

    Raises:
        ExportError: what is on disk does not load or does not fit.
    """
    if form == "lora":
        with _adapter_applied(like, read_lora(folder)):
            yield like
        return
    with _loaded_meanwhile(like, lambda device: load_merged(folder, like, device)) as loaded:
        yield loaded


@contextmanager
def other_model(
    source: ModelSource,
    like: LanguageModel,
    *,
    base: ModelSource | None = None,
    trust_remote_code: bool = False,
) -> Iterator[LanguageModel]:
    """Any model with the tokenizer of another, prompted and computed as that one.

    Args:
        source: where it comes from; the folder of a PEFT adapter counts.
        like: the original, which gives dtype, device, chat template and response prefix.
        base: what an adapter is put on; None: the original.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: it does not load.
        MeasurementError: its tokenizer is another one.
    """

    def load(device: torch.device) -> LanguageModel:
        loaded = _load_like(source, like, device, base or like.source, trust_remote_code)
        if loaded.chat.tokenizer.get_vocab() != like.chat.tokenizer.get_vocab():
            raise MeasurementError(
                f"{source.name!r} cannot be compared with the original: another tokenizer"
            )
        return replace(loaded, chat=like.chat)

    with _loaded_meanwhile(like, load) as loaded:
        yield loaded


@contextmanager
def _loaded_meanwhile(
    like: LanguageModel, load: Callable[[torch.device], LanguageModel]
) -> Iterator[LanguageModel]:
    device = like.device
    with _out_of_the_way(like):
        loaded = load(device)
        try:
            yield loaded
        finally:
            if not _stays(loaded):
                loaded.model.to("cpu")  # frees the device before the original comes back


@contextmanager
def _out_of_the_way(lm: LanguageModel) -> Iterator[None]:
    """Keep a model off a GPU meanwhile: two whole models rarely fit beside each other."""
    if _stays(lm) or not any(map(on_accelerator, lm.model.parameters())):
        yield
        return
    home = lm.device
    lm.model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        lm.model.to(home)


def _stays(lm: LanguageModel) -> bool:
    """Whether it cannot be moved: quantized, on several devices, offloaded, or by processes."""
    return _is_spread(lm) or any(map(is_sharded, lm.model.parameters()))


def _is_spread(lm: LanguageModel) -> bool:
    """Whether accelerate placed it, as it was loaded or when memory ran out."""
    return getattr(lm.model, "hf_device_map", None) is not None or is_offloaded(lm.model)


def load_merged(folder: Path, like: LanguageModel, device: torch.device) -> LanguageModel:
    """A saved merged model on a device, in the dtype and with the prompting of another.

    Raises:
        ExportError: it does not load.
    """
    own_code = type(like.model).__module__.startswith("transformers_modules")
    try:
        loaded = _load_like(ModelSource(str(folder)), like, device, None, own_code)
    except ModelError as error:
        raise ExportError(f"the saved model does not load again: {error}") from error
    _check_same_shape(loaded, like)
    return replace(loaded, chat=replace(like.chat, tokenizer=loaded.chat.tokenizer))


def _load_like(
    source: ModelSource,
    like: LanguageModel,
    device: torch.device,
    base: ModelSource | None,
    trust_remote_code: bool,
) -> LanguageModel:
    return load_model(
        source,
        base=base,
        dtype=cast(DtypeName, str(like.dtype).removeprefix("torch.")),
        device="auto" if ranks.count() > 1 else str(device),
        device_map="auto" if _is_spread(like) else None,
        quantization=like.quantization,
        trust_remote_code=trust_remote_code,
        template="none",
    )


def _check_same_shape(loaded: LanguageModel, like: LanguageModel) -> None:
    if loaded.parameter_count != like.parameter_count or type(loaded.model) is not type(like.model):
        raise ExportError(
            f"the saved model is another one: {type(loaded.model).__name__} with "
            f"{loaded.parameter_count} parameters instead of {type(like.model).__name__} with "
            f"{like.parameter_count}"
        )


@contextmanager
def _adapter_applied(lm: LanguageModel, adapter: dict[str, LoraFactors]) -> Iterator[None]:
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for path, factors in adapter.items():
            module = submodule(lm.model, path)
            if module is None:
                raise ExportError(f"the saved adapter addresses {path}, which the model lacks")
            handles.append(module.register_forward_hook(_adapter_hook(module, factors)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adapter_hook(
    module: nn.Module, factors: LoraFactors
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    device = device_of(module)
    a, b = factors.a.float().to(device), factors.b.float().to(device)
    bias = None if factors.bias is None else factors.bias.float().to(device)
    sharded = [p for p in module.parameters(recurse=False) if p.ndim == 2 and is_sharded(p)]
    if sharded:  # this process is given its part of the inputs
        a = local_part(placed_like(a, sharded[0]))

    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        inner = inputs[0].float() @ a.T
        if sharded:
            torch.distributed.all_reduce(inner)
        added = inner @ b.T
        if bias is not None:
            added = added + bias
        edited: Tensor = (output.float() + added).to(output.dtype)
        return edited

    return hook
