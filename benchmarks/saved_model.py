"""A saved model against what it was saved from, with plain transformers. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heretic_kl.ablation import Plan
from heretic_kl.export import MergedSaved
from heretic_kl.export.shards import open_shard
from heretic_kl.model import LanguageModel, edited
from heretic_kl.testing import WORDS


def tensor_problem(saved: MergedSaved, original: Path) -> str | None:
    """Which tensors were lost, added, reshaped or retyped; None: none were."""
    before, after = _tensors(original), _tensors(saved.folder)
    if before.keys() != after.keys():
        return f"tensors lost or added: {', '.join(sorted(before.keys() ^ after.keys())[:4])}"
    changed = [name for name in before if before[name] != after[name]]
    return f"shape or type changed: {', '.join(changed[:4])}" if changed else None


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        name: (stored.type_name, stored.shape)
        for file in folder.glob("*.safetensors")
        for name, stored in open_shard(file).tensors.items()
    }


def reloaded_model(folder: Path) -> Any:
    """The saved model, loaded by `transformers` alone."""
    import transformers

    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        load: Any = getattr(transformers, name)
        model, info = load.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if not info["missing_keys"]:  # some releases can only be loaded with all their towers
            return model.eval()
    raise AssertionError(f"weights are missing: {sorted(info['missing_keys'])[:3]}")


@torch.no_grad()
def sample_logits(model: Any) -> Tensor:
    """(2, 12, V) for fixed random tokens."""
    tokens = torch.randint(4, len(WORDS), (2, 12), generator=torch.Generator().manual_seed(7))
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def edited_logits(lm: LanguageModel, plan: Plan) -> Tensor:
    """`sample_logits` under the plan's operators."""
    with edited(lm.architecture, plan):
        return sample_logits(lm.model)


def _prefills(model: Any, ids: Tensor) -> bool:
    """Whether the model's own forward pass runs with the cache that it creates."""
    try:
        model(input_ids=ids, use_cache=True)
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def generated(model: Any, prompt: Sequence[int], stop: frozenset[int], *, most: int) -> list[int]:
    """Greedy response tokens of `generate`, without the end token."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        # Some decoders cannot read their prompt with a cache at all; ours decodes without one too.
        use_cache=_prefills(model, ids),
        eos_token_id=sorted(stop),
        pad_token_id=1,
    )
    response = out[0, len(prompt) :].tolist()
    return response[: next((i for i, token in enumerate(response) if token in stop), len(response))]
