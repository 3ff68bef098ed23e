"""A plan made permanent: operators baked into weights, written to disk. Searches nothing.

The original's files are rewritten one by one and everything in them that is not edited is kept
as it is. Where that cannot be done (a GGUF file, weights that `transformers` stores in another
form than it holds) the model in memory is written out instead. Neither touches it.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heretic_kl.ablation import Operator, Plan
from heretic_kl.errors import ExportError
from heretic_kl.export.checkpoint import Checkpoint, find_checkpoint, other_files
from heretic_kl.export.folder import check_target, new_folder
from heretic_kl.export.shards import FLOAT_TYPES, TensorEdit, fitted, rewrite, rewritten_bytes
from heretic_kl.model import LanguageModel
from heretic_kl.model.placement import is_offloaded, is_sharded, whole
from heretic_kl.model.transformers_logging import quiet_transformers
from heretic_kl.ranks import from_first

QUANTIZATION_ERROR = 0.25
"""Largest relative difference between a weight and what quantization made of it."""


@dataclass(frozen=True)
class MergedSaved:
    """What `save_merged` wrote."""

    folder: Path
    route: Literal["streamed", "rewritten"]
    """`streamed`: from the original's files; `rewritten`: from the model in memory."""
    edited_tensors: tuple[str, ...]
    """Names in the files."""


def save_merged(
    lm: LanguageModel,
    plan: Plan,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> MergedSaved:
    """Write the edited model so that plain `transformers` loads it.

    Args:
        lm: the model; not changed.
        plan: the edit; baked in float32, then rounded to the saved type.
        folder: where to; there is no such folder until the model in it is complete.
        dtype: the type of every saved weight; None: each keeps the type it is stored in.
        overwrite: replace a saved model that stands there, once the new one is complete.

    Raises:
        ExportError: the target is taken, the disk is full, the model's weights cannot be baked.
    """
    from_first(lambda: check_target(folder, overwrite=overwrite, source=lm.source.folder))
    edits = _parameter_edits(lm, plan)
    checkpoint = find_checkpoint(lm)
    stored = None if checkpoint is None else _stored_edits(lm, checkpoint, edits)
    if checkpoint is None or stored is None:
        _refuse_scattered(lm)
        return _save_from_memory(lm, edits, folder, checkpoint, dtype, overwrite)
    return from_first(lambda: _save_streamed(stored, folder, checkpoint, dtype, overwrite))


@dataclass(frozen=True)
class _Bake:
    """An operator made permanent in a tensor that writes along one of its axes."""

    operator: Operator
    axis: int

    def __call__(self, stored: Tensor) -> Tensor:
        """The edited tensor, float32; many experts are edited one after the other."""
        if stored.ndim > 2 and self.axis != 0:
            inner = replace(self, axis=self.axis - 1)
            return torch.stack([inner(part) for part in stored])
        vectors = stored.float().movedim(self.axis, -1)
        edited = self.operator(vectors) if stored.ndim == 1 else self.operator.linear(vectors)
        return edited.movedim(-1, self.axis)


def _parameter_edits(lm: LanguageModel, plan: Plan) -> dict[str, _Bake]:
    """What to do with each parameter of the model, by its name in the model."""
    edits: dict[str, _Bake] = {}
    for key, operator in plan.items():
        site = lm.architecture.site(key)
        placed = operator.to(torch.device("cpu"))
        quantized = bool(site.quantized_inputs)
        if (quantized and lm.quantization == "none") or not (quantized or site.tensors):
            raise ExportError(
                f"the weights of {key.path} are quantized, and an edit cannot be written into "
                "them: save an adapter, or search on the unquantized original (with "
                "--quantization if memory is short)"
            )
        if operator.shift is not None and site.bias() is None:
            raise ExportError(
                f"{key.path} has no bias, which the norm mode of this edit needs: "
                "use norm mode none"
            )
        for tensor in site.tensors:
            edits[f"{key.path}.{tensor.name}"] = _Bake(placed, tensor.axis)
        if quantized:  # as it was loaded: the files hold it (D, F)
            edits[f"{key.path}.weight"] = _Bake(placed, 0)
    return edits


# --- from the original's files ---------------------------------------------------------------


def _stored_edits(
    lm: LanguageModel, checkpoint: Checkpoint, edits: Mapping[str, _Bake]
) -> dict[str, TensorEdit] | None:
    """What to do with each tensor in the files; None where one cannot be found there.

    Files may hold a parameter under another name, or in parts: a tensor of many experts is
    stored expert by expert.
    """
    placed: dict[str, TensorEdit] = {}
    sites = {f"{site.key.path}.weight": site for site in lm.architecture.sites}
    for parameter, edit in edits.items():
        held = whole(lm.model.get_parameter(parameter).detach())
        if parameter in sites and sites[parameter].quantized_inputs:
            held = sites[parameter].weight()
            names = _possible_names(lm.model, checkpoint, parameter)
            place = next((name for name in names if _alike(checkpoint, name, held)), None)
            parts: dict[str, TensorEdit] | None = None if place is None else {place: edit}
        else:
            parts = _stored_parts(lm.model, checkpoint, parameter, held, edit)
        if parts is None:
            return None
        placed.update(parts)
    return placed


def _stored_parts(
    model: Any, checkpoint: Checkpoint, parameter: str, held: Tensor, edit: _Bake
) -> dict[str, TensorEdit] | None:
    """The tensors of the files that make up one parameter, each with its own axis."""
    for name in _possible_names(model, checkpoint, parameter):
        if _same(checkpoint, name, held):
            return {name: edit}
    parts, axes = _reverted(model, parameter, held), _axes(model, parameter, held, edit.axis)
    if parts is None or axes is None or parts.keys() != axes.keys():
        return None
    placed: dict[str, TensorEdit] = {}
    for name, part in parts.items():
        names = _possible_names(model, checkpoint, name)
        place = next((n for n in names if _same(checkpoint, n, part)), None)
        if place is None:
            return None
        placed[place] = replace(edit, axis=axes[name])
    return placed


def _reverted(model: Any, parameter: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """A parameter as `transformers` stores it: by name in the files; None: it cannot say."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(model, {parameter: tensor})
    except (ImportError, AttributeError, KeyError, ValueError, TypeError, RuntimeError):
        # Not a public function of transformers, and some conversions need several parameters
        # at once: then the model is written from memory.
        return None
    return reverted


def _axes(model: Any, parameter: str, held: Tensor, axis: int) -> dict[str, int] | None:
    """Along which axis each stored part of a parameter writes, seen by where coordinates go."""
    width = held.shape[axis]
    shape = [width if index == axis else 1 for index in range(held.ndim)]
    coordinates = torch.arange(width, dtype=torch.int32)
    parts = _reverted(model, parameter, coordinates.reshape(shape).expand(held.shape))
    placed: dict[str, int] = {}
    for name, part in ({} if parts is None else parts).items():
        for place, size in enumerate(part.shape):
            if size == width and bool((part.movedim(place, -1) == coordinates).all()):
                placed[name] = place
    return placed or None


def _possible_names(model: Any, checkpoint: Checkpoint, name: str) -> Iterator[str]:
    """Checkpoints of a bare body carry no prefix, those of a whole model may, or one of more."""
    prefix = f"{model.base_model_prefix}."
    yield name
    yield name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
    yield from sorted(stored for stored in checkpoint.tensors if stored.endswith(f".{name}"))


def _same(checkpoint: Checkpoint, name: str, held: Tensor) -> bool:
    """Whether the files hold this very tensor under the name."""
    shard = checkpoint.shard_of(name)
    if shard is None:
        return False
    stored = shard.tensors[name]
    if stored.type_name not in FLOAT_TYPES or stored.shape != tuple(held.shape):
        return False
    if held.device.type == "meta":  # offloaded: nothing in memory to compare with
        return True
    return torch.equal(shard.read(name).to(held.dtype), held.detach().cpu())


def _alike(checkpoint: Checkpoint, name: str, measured: Tensor) -> bool:
    """Whether the files hold what a weight was before it was quantized."""
    shard = checkpoint.shard_of(name)
    if shard is None or shard.tensors[name].type_name not in FLOAT_TYPES:
        return False
    if shard.tensors[name].shape != tuple(measured.shape):
        return False
    stored = shard.read(name).float()
    return bool((stored - measured.cpu()).norm() <= QUANTIZATION_ERROR * stored.norm())


def _save_streamed(
    edits: Mapping[str, TensorEdit],
    folder: Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    overwrite: bool,
) -> MergedSaved:
    others = other_files(checkpoint, edits.keys(), folder)
    needed = sum(rewritten_bytes(shard, dtype) for shard in checkpoint.shards.values())
    needed += sum(path.stat().st_size for path in others.values())
    with new_folder(folder, overwrite=overwrite, needed_bytes=needed) as partial_folder:
        for name, shard in checkpoint.shards.items():
            target = partial_folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            rewrite(shard, target, edits, dtype)
        _copy_files(others, partial_folder)
        if dtype is not None:
            _declare_dtype(partial_folder / "config.json", dtype)
            _correct_total_size(partial_folder, checkpoint, dtype)
    return MergedSaved(folder, "streamed", tuple(sorted(edits)))


def _copy_files(others: Mapping[str, Path], folder: Path) -> None:
    for name, path in others.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _declare_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Say in the config, and in the configs inside it, what the weights are stored in."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")

    def declare(table: dict[str, Any]) -> bool:
        said = False
        for key, value in table.items():
            if key in ("dtype", "torch_dtype"):
                table[key] = name
                said = True
            elif isinstance(value, dict):
                declare(value)
        return said

    if not declare(config):
        config["dtype"] = name
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _correct_total_size(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    index_file = folder / "model.safetensors.index.json"
    if not index_file.is_file():
        return
    index = json.loads(index_file.read_text(encoding="utf-8"))
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] = sum(
            rewritten_bytes(shard, dtype) - shard.data_start for shard in checkpoint.shards.values()
        )
        index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# --- from the model in memory ----------------------------------------------------------------


def _save_from_memory(
    lm: LanguageModel,
    edits: Mapping[str, TensorEdit],
    folder: Path,
    checkpoint: Checkpoint | None,
    dtype: torch.dtype | None,
    overwrite: bool,
) -> MergedSaved:
    saved_dtype = dtype or lm.stored_dtype
    if lm.quantization != "none":
        raise ExportError(
            "the original's files hold weights in another form than the model, so the edit cannot "
            "be written into them: search without --quantization to save it merged"
        )
    # Edited tensors have names of the model here; another copy of the weights has the files'.
    others = None if checkpoint is None else other_files(checkpoint, checkpoint.tensors, folder)
    needed = lm.parameter_count * saved_dtype.itemsize
    with new_folder(folder, overwrite=overwrite, needed_bytes=needed) as partial_folder:
        _save_pretrained(lm.model, _edited_state(lm.model, edits, saved_dtype), partial_folder)
        _declare_dtype(partial_folder / "config.json", saved_dtype)
        if others is None:
            with quiet_transformers():
                lm.chat.tokenizer.save_pretrained(partial_folder)
        else:
            ours = {"config.json", "model.safetensors.index.json"}
            copies = {name: path for name, path in others.items() if name not in ours}
            _copy_files(copies, partial_folder)
    return MergedSaved(folder, "rewritten", tuple(sorted(edits)))


def _refuse_scattered(lm: LanguageModel) -> None:
    """A model that is not whole in memory can be saved only by rewriting its files."""
    if is_offloaded(lm.model) or any(map(is_sharded, lm.model.parameters())):
        raise ExportError(
            "parts of the model are offloaded or on other processes, and its files cannot be "
            "rewritten as they are: load it without that to save it merged, or save an adapter"
        )


def _edited_state(
    model: nn.Module, edits: Mapping[str, TensorEdit], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The model's state, edited and cast; what shares memory goes on sharing it."""
    state: dict[str, Tensor] = {}
    cast: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    for name, tensor in model.state_dict().items():
        edit = edits.get(name)
        if edit is not None:
            baked = edit(tensor.detach().cpu())
            state[name] = fitted(name, baked, dtype).contiguous()
        elif tensor.is_floating_point():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if key not in cast:
                cast[key] = fitted(name, tensor.detach().cpu(), dtype)
            state[name] = cast[key]
        else:
            state[name] = tensor.detach().cpu()
    missing = edits.keys() - state.keys()
    if missing:
        raise ExportError(f"the model's state holds no {', '.join(sorted(missing))}")
    return state


def _save_pretrained(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """`save_pretrained`, which writes into the model's config as it goes, undone there."""
    config = copy.deepcopy(model.config.__dict__)
    quantizer = getattr(model, "hf_quantizer", None)
    marked = getattr(model, "is_quantized", False)
    if quantizer is not None:
        _refuse_quantized(model)
        # Dequantized as it was loaded: what is saved is in full precision.
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
    try:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=state)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"transformers cannot write this model: {first}") from error
    finally:
        if quantizer is not None:
            model.hf_quantizer, model.is_quantized = quantizer, marked
        model.config.__dict__.clear()
        model.config.__dict__.update(config)


def _refuse_quantized(model: nn.Module) -> None:
    """Weights left in a quantized form cannot go into a file of full precision."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise ExportError(
                f"{name} is quantized, so the model cannot be saved merged: save an adapter, or "
                "search on the unquantized original"
            )
