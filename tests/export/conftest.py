"""Tiny models, saved and loaded; a watch over what must not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_edits import bits
from torch import Tensor

from heretic_kl.model import LanguageModel
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model

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
