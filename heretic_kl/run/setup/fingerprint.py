"""What makes two trials comparable: the facts a study is tied to. Opens no storage."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from heretic_kl.config import Settings
from heretic_kl.engine import Calibration
from heretic_kl.export import installed_versions
from heretic_kl.kl import METRIC_VERSION
from heretic_kl.model import LanguageModel, ModelSource
from heretic_kl.model.placement import in_memory, is_offloaded, is_sharded, whole
from heretic_kl.prompts.sets import PromptSets
from heretic_kl.scoring import Suite, scorer_code

SPACE_VERSION = 1
"""Raised when the search space or the meaning of a parameter changes."""
UNIMPORTANT_CONFIG = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
"""Entries of a model's config that say where it is and who wrote it."""


def study_facts(
    settings: Settings, lm: LanguageModel, prompts: PromptSets, suite: Suite
) -> dict[str, Any]:
    """What is known before calibration of all that trials depend on, JSON-ready.

    A model is known by its content, not by its path: moved folders resume.
    """
    return {
        "model weights": weights_fingerprint(lm),
        "model config": config_fingerprint(lm),
        "tokenizer": tokenizer_fingerprint(lm),
        "dtype": lm.dtype_name,
        "quantization": lm.quantization,
        "chat template": _sha256(str(lm.chat.template)),
        "enable_thinking": settings.enable_thinking,
        # Only where it is set: studies from before the setting have no such key.
        **({"chat_template_kwargs": v} if (v := settings.chat_template_kwargs) else {}),
        "seed": settings.seed,
        "kl_tokens": settings.kl_tokens,
        "max_response_tokens": settings.max_response_tokens,
        "edit": settings.edit.model_dump(mode="json"),
        "directions": settings.directions.model_dump(mode="json"),
        "scorers": {
            spec.name: {
                "role": spec.role,
                "code": scorer_code(spec.use),
                "settings": suite.scorers[spec.name].settings.model_dump(mode="json"),
            }
            for spec in suite.specs
        },
        "prompts": prompts.fingerprints(),
        "screening": settings.screens,
        "metric version": METRIC_VERSION,
        "space version": SPACE_VERSION,
        "response_prefix": settings.response_prefix,
    }


def study_fingerprint(
    facts: Mapping[str, Any], calibration: Calibration, suite: Suite | None
) -> dict[str, Any]:
    """Everything that a trial's parameters or scores depend on.

    The suite is prepared, so that scorers know what their own prompts hold; None: none measures.
    """
    scorers = {} if suite is None else suite.scorers
    return {
        **facts,
        "response_prefix": calibration.response_prefix,
        "scorers' data": {name: dict(s.identity()) for name, s in scorers.items()},
    }


def reference_identity(facts: Mapping[str, Any], lm: LanguageModel) -> dict[str, Any]:
    """What all results of the unedited model depend on besides prompts, which are token ids."""
    names = ("model weights", "model config", "tokenizer", "dtype", "quantization")
    of_model = {name: facts[name] for name in (*names, "metric version")}
    return {**of_model, "device": lm.device.type, "versions": installed_versions()}


def default_study_name(source: ModelSource, facts: Mapping[str, Any]) -> str:
    """A name that differs whenever the facts do: other settings make another study."""
    return f"{source.short_name}-{_sha256(json.dumps(facts, sort_keys=True))[:8]}"


def weights_fingerprint(lm: LanguageModel) -> str:
    """A hash over every tensor that the model computes with, parameters and buffers, by name.

    xxh3 is as fast as memory, so that nothing need be kept or sampled; it guards against mixing
    models by accident, not against forgery.
    """
    named = {**dict(lm.model.named_parameters()), **dict(lm.model.named_buffers())}
    names = sorted(named)
    if is_offloaded(lm.model) or any(map(is_sharded, named.values())):
        digests = [_scattered_digest(lm.model, name) for name in names]
    else:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            digests = list(threads.map(lambda name: _tensor_digest(named[name]), names))
    return _sha256(json.dumps(list(zip(names, digests, strict=True))))


def config_fingerprint(lm: LanguageModel) -> str:
    """sha256 of the model's config, end tokens and, where it brings its own, code."""
    config = lm.model.config.to_dict()
    content = {key: value for key, value in config.items() if key not in UNIMPORTANT_CONFIG}
    code = ""
    if type(lm.model).__module__.startswith("transformers_modules"):
        code = Path(inspect.getfile(type(lm.model))).read_text(encoding="utf-8")
    return _sha256(json.dumps([content, sorted(lm.stop_ids), code], sort_keys=True, default=str))


def tokenizer_fingerprint(lm: LanguageModel) -> str:
    """sha256 of the tokenizer: its rules too where the fast library can state them."""
    tokenizer = lm.chat.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _sha256(backend.to_str())
    return _sha256(json.dumps(sorted(tokenizer.get_vocab().items())))


def _scattered_digest(model: nn.Module, name: str) -> str:
    """Of a tensor that is brought from where it is; every process of a split model asks for it."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    with in_memory(owner):
        return _tensor_digest(whole(getattr(owner, leaf).detach()))


def _tensor_digest(tensor: Tensor) -> str:
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
