"""Plans that edit every site of a tiny model, and the logits to compare by."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from heretic_kl.ablation import (
    Directions,
    EditParameters,
    NormMode,
    Plan,
    WeightKernel,
    build_plan,
)
from heretic_kl.model import LanguageModel, edited
from heretic_kl.testing import LAYERS, WIDTH


def make_plan(
    lm: LanguageModel, norm: NormMode = "none", seed: int = 1, width: int = WIDTH
) -> Plan:
    """Every site edited, each layer with a direction and a weight of its own."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(LAYERS, width, generator=generator)
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
