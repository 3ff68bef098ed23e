"""Quantized weights: by bitsandbytes as a model is loaded, or in its checkpoint. Loads none."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch

from heretic_kl.errors import ModelError, UnsupportedModelError
from heretic_kl.model.loading.source import ModelSource, hub_arguments, readable_errors
from heretic_kl.model.transformers_logging import quiet_transformers

Quantization = Literal["none", "bnb_4bit", "bnb_8bit"]


def is_quantized(source: ModelSource, trust_remote_code: bool) -> bool:
    """Whether the checkpoint itself is stored quantized (GGUF apart, which is dequantized)."""
    from transformers import AutoConfig

    if source.gguf_file is not None:
        return False
    name, extra = hub_arguments(source)
    with quiet_transformers(), readable_errors(source, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)
    return getattr(config, "quantization_config", None) is not None


def quantization_arguments(
    source: ModelSource, quantization: Quantization, dtype: torch.dtype, trust_remote_code: bool
) -> dict[str, Any]:
    """Arguments that make transformers quantize as it loads.

    Raises:
        ModelError: the checkpoint is quantized already, or bitsandbytes is not installed.
    """
    if quantization == "none":
        return {}
    if source.gguf_file is not None or is_quantized(source, trust_remote_code):
        raise UnsupportedModelError(
            f"{source.name!r} is quantized already: leave out --quantization"
        )
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"--quantization {quantization} needs bitsandbytes: pip install bitsandbytes"
        )
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    if quantization == "bnb_8bit":
        return {"quantization_config": make(load_in_8bit=True)}
    return {
        "quantization_config": make(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    }


def forget_gguf_quantization(model: Any) -> None:
    """Remove the marks that loading a GGUF file leaves on a model.

    Its weights are dequantized, but `save_pretrained` rejects a model with these marks.
    """
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def keep_gradients(model: Any) -> None:
    """Have products of 4-bit weights pass gradients on, on every CPU.

    On one that multiplies bfloat16, bitsandbytes lays weights out anew in the first pass without
    gradients. The product with that layout has no gradient: an edit would learn as if nothing
    came after its site but the residual stream.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
