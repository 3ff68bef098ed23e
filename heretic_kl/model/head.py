"""The output head of a transformers model as a `heretic_kl.kl.Head`, checked against the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.kl import Head

PROBE_TOKENS = 6


def find_head(model: Any, *, vocabulary_size: int | None = None) -> Head:
    """The head, with bias, logit scale and soft-capping as the model's config declares them.

    Args:
        model: a `transformers` causal LM.
        vocabulary_size: tokens that count; columns beyond are padding. None: all count.

    Raises:
        UnsupportedModelError: the model has no linear output head, or the head does not
            reproduce the model's own logits.
    """
    output = model.get_output_embeddings()
    weight, bias = getattr(output, "weight", None), getattr(output, "bias", None)
    if not isinstance(weight, torch.Tensor):
        raise UnsupportedModelError(f"{type(model).__name__} has no linear output head")
    config = model.config.get_text_config()
    head = Head(
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    _check(model, head)
    return head if vocabulary_size is None else replace(head, vocabulary_size=vocabulary_size)


def _logit_scale(config: Any) -> float:
    """What the config says logits are multiplied by."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        value = getattr(config, name, None)
        if isinstance(value, (int, float)):
            scale *= float(value)
    divisor = getattr(config, "logits_scaling", None)  # Granite
    if isinstance(divisor, (int, float)) and divisor:
        scale /= float(divisor)
    return scale


@torch.no_grad()
def _check(model: Any, head: Head) -> None:
    device = model.get_input_embeddings().weight.device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = (torch.arange(PROBE_TOKENS) * 89 % vocabulary)[None].to(device)
    # Mixed precision is put around the outermost forward only: the body runs without it.
    forward = getattr(model, "_original_forward", model)
    own = forward(input_ids=tokens, use_cache=False).logits[0].float()
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    ours = head.logits(hidden.to(head.weight.device)).to(own.device)
    if ours.shape != own.shape:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the output head gives {tuple(ours.shape)} logits, "
            f"the model {tuple(own.shape)}"
        )
    if bool((own.isnan() & ours.isnan()).any()):
        return  # a broken model, not a wrong head: its measurement says so
    scale = own.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1e-6)
    # A token that both exclude differs by nothing; -inf less -inf would be NaN.
    error = float(torch.where(ours == own, 0.0, (ours - own).abs()).max() / scale)
    if not error < 0.02:
        raise UnsupportedModelError(
            f"{type(model).__name__}: logits computed from its final hidden states differ from "
            f"its own by {error:.1%}; its head has a step that is not declared"
        )
