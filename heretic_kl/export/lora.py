"""A plan as a LoRA adapter in PEFT's format, written without PEFT. Touches no weight.

Where an operator has no row scale, the change it makes is of the operator's own rank and the
adapter is exact. Row scales change the weight in full rank: there the adapter is the best one of
its rank, and how much it misses is measured. A bias is mapped exactly in every case.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from heretic_kl.ablation import Operator, Plan
from heretic_kl.errors import ExportError
from heretic_kl.export.facts import LoraFacts
from heretic_kl.export.folder import check_target, new_folder
from heretic_kl.model import LanguageModel, ModelSource, Site
from heretic_kl.model.transformers_logging import quiet_transformers
from heretic_kl.ranks import from_first

DEFAULT_RANK = 16
EXACT_SVD_SIZE = 256
"""Matrices whose smaller side is at most this are decomposed exactly."""
OVERSAMPLING = 16
POWER_ITERATIONS = 4
ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
KEY_PREFIX = "base_model.model."
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Endings of targets that PEFT redirects to fused experts, where a model has any."""


@dataclass(frozen=True)
class LoraFactors:
    """`y -> y + b (a x) + bias` for one module with input x."""

    a: Tensor
    """(r, F) float32."""
    b: Tensor
    """(D, r) float32."""
    bias: Tensor | None = None
    """(D,) float32; None: 0."""


@dataclass(frozen=True)
class _Fit:
    factors: LoraFactors
    missed: float
    """Frobenius norm of the change less the factors' product."""
    change: float
    """Frobenius norm of the change."""

    @property
    def relative(self) -> float:
        return self.missed / self.change if self.change > 0 else 0.0


def save_lora(
    lm: LanguageModel,
    plan: Plan,
    folder: Path,
    *,
    rank: int | None = None,
    overwrite: bool = False,
) -> LoraFacts:
    """Write the edit as an adapter for the original model.

    Args:
        lm: the model; not changed.
        plan: the edit.
        folder: where to; see `save_merged`.
        rank: of the adapter; None: the operators' own where that is exact, else 16. A lower rank
            than an exact adapter needs gives an approximation, a higher one is not used.
        overwrite: replace a saved model that stands there.

    Raises:
        ExportError: the target is taken, the disk is full, the edit is empty, or PEFT could not
            address its modules.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    from_first(lambda: check_target(folder, overwrite=overwrite, source=lm.source.folder))
    if not plan:
        raise ExportError("this edit changes nothing, so there is no adapter to save")
    _check_sites(lm, plan)
    _refuse_fused_experts(lm, plan)
    wanted = _rank(lm, plan, rank)
    fits = {
        key.path: _fit(lm.architecture.site(key), operator, wanted)
        for key, operator in plan.items()
    }
    tensors = _tensors({path: fit.factors for path, fit in fits.items()})
    from_first(lambda: _write(lm, plan, tensors, folder, wanted, overwrite))
    missed = math.hypot(*(fit.missed for fit in fits.values()))
    change = math.hypot(*(fit.change for fit in fits.values()))
    return LoraFacts(
        rank=wanted,
        exact=all(_is_exact(operator, wanted) for operator in plan.values()),
        relative_error=missed / change if change > 0 else 0.0,
        worst_relative_error=max(fit.relative for fit in fits.values()),
    )


def _write(
    lm: LanguageModel,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    folder: Path,
    rank: int,
    overwrite: bool,
) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_folder(folder, overwrite=overwrite, needed_bytes=needed) as partial_folder:
        save_file(dict(tensors), partial_folder / ADAPTER_FILE, metadata={"format": "pt"})
        config = _config(lm, plan, rank, has_bias=any(key.endswith(".bias") for key in tensors))
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial_folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        with quiet_transformers():
            lm.chat.tokenizer.save_pretrained(partial_folder)


def read_lora(folder: Path) -> dict[str, LoraFactors]:
    """The adapter in a folder, by module path, its scaling applied.

    Raises:
        ExportError: the files are not there or not an adapter of ours.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_FILE)
        scaling = config["lora_alpha"] / config["r"]
        paths = [str(path) for path in config["target_modules"]]
        factors = {}
        for path in paths:
            stem = KEY_PREFIX + path
            bias = tensors.get(f"{stem}.lora_B.bias")
            factors[path] = LoraFactors(
                a=tensors[f"{stem}.lora_A.weight"],
                b=tensors[f"{stem}.lora_B.weight"] * scaling,
                bias=None if bias is None else bias * scaling,
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ExportError(f"the adapter in {str(folder)!r} cannot be read: {error}") from error
    return factors


def portable_base(source: ModelSource) -> str:
    """What a saved file calls the original: its hub id, or the bare name of folder or file."""
    if source.gguf_file is not None or source.folder is not None:
        return source.short_name
    return source.name


def _rank(lm: LanguageModel, plan: Plan, rank: int | None) -> int:
    plan_rank = max(operator.rank for operator in plan.values())
    if all(operator.scale is None for operator in plan.values()):
        return plan_rank if rank is None else min(rank, plan_rank)
    smallest = min(min(lm.architecture.site(key).weight().shape) for key in plan)
    return min(DEFAULT_RANK if rank is None else rank, smallest)


def _is_exact(operator: Operator, rank: int) -> bool:
    return operator.scale is None and operator.rank <= rank


@torch.no_grad()
def _fit(site: Site, operator: Operator, rank: int) -> _Fit:
    weight = site.weight().float()
    operator = operator.to(weight.device)
    bias = site.bias()
    constant = None
    if bias is not None:
        constant = (operator(bias.float()) - bias.float()).cpu()
    elif operator.shift is not None:
        constant = operator.shift.cpu()
    if _is_exact(operator, rank):
        pad = rank - operator.rank
        a = torch.nn.functional.pad(operator.right.T @ weight, (0, 0, 0, pad))
        b = torch.nn.functional.pad(operator.left, (0, pad))
        change = float(torch.linalg.matrix_norm(b @ a))
        return _Fit(LoraFactors(a.cpu(), b.cpu(), constant), 0.0, change)
    baked, _ = operator.bake(weight)
    delta = baked - weight
    a, b = _best_factors(delta, rank)
    missed, change = (float(torch.linalg.matrix_norm(m)) for m in (delta - b @ a, delta))
    return _Fit(LoraFactors(a.cpu(), b.cpu(), constant), missed, change)


def _best_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(r, F) and (D, r) whose product is nearest to delta (D, F); the same on every run."""
    smaller = min(delta.shape)
    if smaller <= max(EXACT_SVD_SIZE, 2 * rank):
        left, values, right_t = torch.linalg.svd(delta, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right_t[:rank].T
    else:
        devices = [delta.device] if delta.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(
                delta, q=min(rank + OVERSAMPLING, smaller), niter=POWER_ITERATIONS
            )
        left, values, right = left[:, :rank], values[:rank], right[:, :rank]
    root = values.sqrt()
    return root[:, None] * right.T, left * root


def _tensors(factors: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """As PEFT names them; if one module has a bias, PEFT expects one on all."""
    constants = [f.bias for f in factors.values() if f.bias is not None]
    has_bias = any(bool(constant.any()) for constant in constants)
    tensors = {}
    for path, factor in factors.items():
        stem = KEY_PREFIX + path
        tensors[f"{stem}.lora_A.weight"] = factor.a.contiguous()
        tensors[f"{stem}.lora_B.weight"] = factor.b.contiguous()
        if has_bias:
            empty = torch.zeros(factor.b.shape[0])
            constant = empty if factor.bias is None else factor.bias
            tensors[f"{stem}.lora_B.bias"] = constant.contiguous()
    return tensors


def _config(lm: LanguageModel, plan: Plan, rank: int, *, has_bias: bool) -> dict[str, Any]:
    conv1d = all(type(lm.architecture.site(key).module).__name__ == "Conv1D" for key in plan)
    return {
        "base_model_name_or_path": portable_base(lm.source),
        "revision": lm.source.revision,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # a scaling of 1
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": has_bias,
        "fan_in_fan_out": conv1d,
        "target_modules": sorted(key.path for key in plan),
    }


def _check_sites(lm: LanguageModel, plan: Plan) -> None:
    """An adapter is a product of two matrices added to one, of a model that others can load."""
    if lm.source.adapter is not None:
        raise ExportError(
            f"{lm.source.name!r} is an adapter, and an adapter cannot be put on another: save the "
            "merged model"
        )
    for key in plan:
        site = lm.architecture.site(key)
        if site.matrix() is None and not site.quantized_inputs:
            raise ExportError(
                f"an adapter cannot hold the edit of {key.path}, which is no single matrix: save "
                "the merged model"
            )


def _refuse_fused_experts(lm: LanguageModel, plan: Plan) -> None:
    """PEFT would take a dense projection's path for that of the experts beside it."""
    fused = any(
        parameter.ndim == 3 and "experts" in name for name, parameter in lm.model.named_parameters()
    )
    dense = [key.path for key in plan if key.path.rpartition(".")[2] in EXPERT_PROJECTIONS]
    if fused and dense:
        raise ExportError(
            f"an adapter cannot address {dense[0]} beside fused experts: save the merged model"
        )
