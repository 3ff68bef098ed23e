"""Tiny saved models, plans that edit every site of them, and the logits to compare by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heretic_kl.ablation import Directions, EditParameters, NormMode, WeightKernel, build_plan
from heretic_kl.ablation.plan import Plan
from heretic_kl.model import LanguageModel, edited
from heretic_kl.testing import LAYERS, TINY_CONFIGS, WIDTH, load_tiny_model, save_tiny_model

BUILD = Callable[..., LanguageModel]


@pytest.fixture
def build(tmp_path: Path) -> BUILD:
    """build(family, **config changes) -> a tiny model loaded from tmp_path/original."""

    def build(
        family: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "50GB",
        name: str = "original",
        **changes: object,
    ) -> LanguageModel:
        config = TINY_CONFIGS[family](**changes)
        folder = save_tiny_model(
            tmp_path / name, config, dtype=dtype, max_shard_size=max_shard_size
        )
        return load_tiny_model(folder)

    return build


def make_plan(lm: LanguageModel, norm: NormMode = "none", seed: int = 1) -> Plan:
    """Every site edited, each layer with a direction and a weight of its own."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(LAYERS, WIDTH, generator=generator)
    kernel = WeightKernel(peak_weight=1.1, peak_position=1.0, floor_weight=0.4, reach=3.0)
    parameters = EditParameters(None, {"attention": kernel, "mlp": kernel}, norm)
    directions = Directions(vectors / vectors.norm(dim=1, keepdim=True))
    return build_plan(parameters, directions, lm.architecture.facts())


@torch.inference_mode()
def logits(model: torch.nn.Module) -> Tensor:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(vocabulary, (2, 9), generator=generator)
    return model(input_ids=tokens, use_cache=False).logits.float()


def edited_logits(lm: LanguageModel, plan: Plan | None) -> Tensor:
    with edited(lm.architecture, plan) if plan else nullcontext():
        return logits(lm.model)


def bits(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


@pytest.fixture
def unchanged() -> Iterator[Callable[[LanguageModel], None]]:
    """Called with a model, checks at the end that not a bit of it nor its config changed."""
    watched: list[tuple[LanguageModel, dict[str, Tensor], str]] = []

    def watch(lm: LanguageModel) -> None:
        watched.append((lm, bits(lm), lm.model.config.to_json_string(use_diff=False)))

    yield watch
    for lm, before, config in watched:
        after = lm.model.state_dict()
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
        assert lm.model.config.to_json_string(use_diff=False) == config
        assert not any(module._forward_hooks for module in lm.model.modules())
