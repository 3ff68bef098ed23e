"""Shows that the sites found are all that write to the residual stream. Builds no search edits."""

from __future__ import annotations

import torch
from torch import Tensor

from heretic_kl.ablation import ablation_operator
from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.hooks import edited, on_layer_outputs
from heretic_kl.model.loading import LanguageModel

PROBE_TOKENS = 32
TOLERANCE = 0.3
"""Largest share that may stay. A missing site leaves about 0.7; rounding in bfloat16, where the
stream is far larger than what a late layer adds to it, can leave 0.1; in float32 it is 1e-5."""


@torch.no_grad()
def direction_residue(lm: LanguageModel, *, seed: int = 0) -> Tensor:
    """What stays of a random direction in each layer's contribution once all sites remove it.

    Returns:
        (L,) root mean square of `added . v` over tokens, edited over unedited; 0 is a full removal.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(lm.architecture.width, generator=generator)
    direction = direction / direction.norm()
    vocabulary = int(lm.head.weight.shape[0])
    tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator).to(lm.device)
    plan = {}
    for key, facts in lm.architecture.facts().items():
        pulled = direction if facts.gain is None else direction * facts.gain.cpu()
        plan[key] = ablation_operator(pulled, 1.0)
    before = (_contributions(lm, tokens) @ direction).square().mean(dim=1).sqrt()
    with edited(lm.architecture, plan):
        after = (_contributions(lm, tokens) @ direction).square().mean(dim=1).sqrt()
    residue: Tensor = after / before.clamp_min(torch.finfo(torch.float32).tiny)
    return residue


def prove_sites(lm: LanguageModel) -> float:
    """Check the residue of every layer.

    Returns:
        The largest residue.

    Raises:
        UnsupportedModelError: a layer adds more of the direction than rounding explains.
    """
    residue = direction_residue(lm)
    worst = int(residue.argmax())
    if not float(residue[worst]) < TOLERANCE:
        raise UnsupportedModelError(
            f"layer {worst} still adds {float(residue[worst]):.0%} of a direction removed at all "
            "its known outputs: something else in it writes to the residual stream"
        )
    return float(residue[worst])


def _contributions(lm: LanguageModel, tokens: Tensor) -> Tensor:
    """What each layer adds to the residual stream, (L, T, D) float32."""
    streams: list[Tensor] = []

    def before_first_layer(_module: object, inputs: tuple[Tensor, ...]) -> None:
        streams.append(inputs[0][0].float().cpu())

    def keep(_layer: int, hidden: Tensor) -> None:
        streams.append(hidden[0].float().cpu())

    handle = lm.architecture.layers[0].register_forward_pre_hook(before_first_layer)
    try:
        with on_layer_outputs(lm.architecture.layers, keep):
            lm.body(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    stacked = torch.stack(streams)
    return stacked[1:] - stacked[:-1]
