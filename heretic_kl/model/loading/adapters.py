"""PEFT adapters on a loaded model. Writes none (`export.lora` does)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from textwrap import shorten
from typing import Any

from heretic_kl.errors import ModelError, UnsupportedModelError
from heretic_kl.model.loading.headers import check_safetensors
from heretic_kl.model.out_of_memory import is_out_of_memory
from heretic_kl.model.transformers_logging import quiet_transformers

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROMPT_KINDS = frozenset(
    {"CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}
)
"""PEFT's names of adapters that act on the prompt or the cache instead of the layers."""


def check_adapter(folder: Path) -> None:
    """Reject an adapter that cannot be read safely, before its base is loaded.

    Raises:
        UnsupportedModelError: its weights are pickled or missing, or it does not work inside the
            layers.
    """
    config = _adapter_config(folder)
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind in PROMPT_KINDS:
        raise UnsupportedModelError(
            f"adapter {str(folder)!r} is of kind {kind}, which puts learned tokens before the "
            "prompt; only adapters inside the layers (such as LoRA) can be measured"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UnsupportedModelError(
            f"adapter {str(folder)!r} has no {ADAPTER_WEIGHTS}; pickled weights are not read "
            "because they can run code: convert them first"
        )
    if config.get("megatron_config"):
        raise UnsupportedModelError(
            f"adapter {str(folder)!r} names a module of Python (megatron_core) to be imported, "
            "which no file may"
        )
    largest = check_safetensors(folder / ADAPTER_WEIGHTS)
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    if kind == "LORA" and any(isinstance(r, int | float) and r > largest for r in ranks):
        raise UnsupportedModelError(
            f"adapter {str(folder)!r}: {ADAPTER_CONFIG} claims a rank that no tensor of its file "
            "has"
        )


def adapter_base(folder: Path) -> str | None:
    """The base model that an adapter names, a hub id or a path; None: it names none."""
    name = _adapter_config(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def adapter_rank(folder: Path) -> int:
    """The largest rank of a LoRA adapter's sites, as its config says; 8 where it says nothing."""
    config = _adapter_config(folder)
    pattern = config.get("rank_pattern")
    ranks = [config.get("r", 8), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int) and rank > 0), default=8)


def with_adapter(model: Any, folder: Path, base_name: str) -> Any:
    """The model with an active adapter; its own weights stay as they are.

    Raises:
        UnsupportedModelError: it is not an adapter of this model.
    """
    from peft import PeftModel

    try:
        with quiet_transformers(), warnings.catch_warnings(record=True) as caught:
            # Read below: a warning of PEFT is an error here, or does not concern the user.
            warnings.simplefilter("always")
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except Exception as error:  # its config may hold anything
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"adapter {str(folder)!r} does not fit {base_name!r}: {shorten(str(error), 200)}"
        ) from error
    if any("missing adapter keys" in str(warning.message) for warning in caught):
        # Weights that are missing stay as they were initialized, which is no edit at all.
        raise UnsupportedModelError(
            f"adapter {str(folder)!r} does not fit {base_name!r}: its file lacks weights that its "
            "config asks for"
        )
    return wrapped.eval().requires_grad_(False)


def merged_adapter(model: Any, folder: Path, base_name: str) -> Any:
    """The model with an adapter merged into its weights.

    Raises:
        UnsupportedModelError: it is not an adapter of this model, or of a kind that cannot be
            merged.
    """
    wrapped = with_adapter(model, folder, base_name)
    try:
        with quiet_transformers():
            merged = wrapped.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError, RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f"adapter {str(folder)!r} cannot be merged into {base_name!r}: "
            f"{shorten(str(error), 200)}"
        ) from error
    return merged.eval().requires_grad_(False)


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {str(folder / ADAPTER_CONFIG)!r}: {error}") from error
    return config if isinstance(config, dict) else {}
