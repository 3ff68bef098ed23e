"""PEFT adapters put on a loaded model, to be measured. Writes none (`export.lora` does)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from heretic_kl.errors import ModelError, UnsupportedModelError
from heretic_kl.quiet import quiet_transformers

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that could not be read safely, before its base is loaded.

    Raises:
        UnsupportedModelError: its weights are pickled, or there are none.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UnsupportedModelError(
            f"adapter {str(folder)!r} has no {ADAPTER_WEIGHTS}; pickled weights are not read "
            "because they can run code: convert them first"
        )


def adapter_base(folder: Path) -> str | None:
    """The base model that an adapter names, a hub id or a path; None: it names none."""
    try:
        stated = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {str(folder / ADAPTER_CONFIG)!r}: {error}") from error
    name = stated.get("base_model_name_or_path") if isinstance(stated, dict) else None
    return name if isinstance(name, str) and name else None


def with_adapter(model: Any, folder: Path, base_name: str) -> Any:
    """The model with an adapter in force, its weights as they were.

    Raises:
        UnsupportedModelError: it is not an adapter of this model.
    """
    from peft import PeftModel

    try:
        with quiet_transformers(), warnings.catch_warnings():
            # PEFT asks the model a question that transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"adapter {str(folder)!r} does not fit {base_name!r}: {first}"
        ) from error
    return wrapped.eval().requires_grad_(False)
