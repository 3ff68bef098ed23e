"""How a model is spread over the processes of `torchrun`, by the plan that transformers has for it.

Layers are split; embeddings and output head are whole on every process, so that final hidden
states become logits as they do in one process. Loads no weight.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

import torch

from heretic_kl import ranks
from heretic_kl.errors import ModelError, UnsupportedModelError
from heretic_kl.model.loading.quantization import Quantization, is_quantized
from heretic_kl.model.loading.source import ModelSource, hub_arguments, readable_errors
from heretic_kl.model.transformers_logging import quiet_transformers

WHOLE = "replicate"
"""The style of a module that every process holds."""


def tensor_parallel(
    source: ModelSource,
    *,
    device: str,
    device_map: object,
    quantization: Quantization,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that give each process its part of a model.

    Raises:
        ModelError: a setting excludes it, or this transformers cannot do it.
        UnsupportedModelError: the model cannot be split among so many processes.
    """
    if device_map is not None:
        raise ModelError("--device-map spreads a model over one process: leave torchrun or it out")
    if quantization != "none" or source.gguf_file or is_quantized(source, trust_remote_code):
        raise ModelError(
            f"{source.name!r} is quantized, and quantized weights are not split among processes: "
            "run it without torchrun, with --device-map auto"
        )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("auto", here):
        raise ModelError(f"under torchrun each process takes its own {here}: leave --device out")
    config_class: Any = _distributed_config()
    plan = _plan(source, trust_remote_code)
    whole = {rule: WHOLE for rule in plan if "*" not in rule}
    return {"distributed_config": config_class(tp_size=ranks.count(), tp_plan=whole)}


@torch.no_grad()
def check_alike(source: ModelSource, logits: torch.Tensor) -> None:
    """Reject a model whose processes do not agree: a part of it is not put together again.

    Raises:
        UnsupportedModelError: they do not.
    """
    if ranks.count() > 1:
        theirs = ranks.from_first(lambda: logits.float().cpu())
        parts = [torch.empty(1) for _ in range(ranks.count())]
        apart = (logits.float().cpu() - theirs).abs().max().reshape(1)
        torch.distributed.all_gather(parts, apart)
        if float(torch.cat(parts).max()) > 0:
            raise UnsupportedModelError(
                f"{source.name!r}: its processes compute different logits, so it cannot be split "
                "among them: run it without torchrun, with --device-map auto"
            )


def _distributed_config() -> Any:
    import transformers

    with suppress(ImportError, AttributeError):
        config: Any = import_module("transformers.distributed.configuration_utils")
        styles: Any = import_module("transformers.distributed.tensor_parallel")
        fields = config.DistributedConfig.__dataclass_fields__
        if "tp_plan" in fields and WHOLE in styles.ALL_PARALLEL_STYLES:
            return config.DistributedConfig
    raise ModelError(
        f"transformers {transformers.__version__} cannot split a model as it is needed here: "
        "install 5.24 or later, or run without torchrun"
    )


def _plan(source: ModelSource, trust_remote_code: bool) -> dict[str, str]:
    """The rules for the model's modules, as transformers has them: module path -> style."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, extra = hub_arguments(source)
    count = ranks.count()
    with quiet_transformers(), readable_errors(source, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config
            model = build(config, trust_remote_code=trust_remote_code)
    plan: dict[str, str] = dict(model.tp_plan)
    if not any("*" in rule for rule in plan):
        raise UnsupportedModelError(
            f"{source.name!r} ({config.model_type}) has no tensor-parallel plan in transformers: "
            "run it without torchrun, with --device-map auto"
        )
    text = config.get_text_config()
    for heads in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(text, heads, None)
        if isinstance(number, int) and number % count:
            raise UnsupportedModelError(
                f"{source.name!r} cannot be split among {count} processes: its {number} "
                f"{heads.removeprefix('num_').replace('_', ' ')} do not divide by {count}"
            )
    return plan
