"""Where a transformers model ends and its output head begins, checked against its own logits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.kl import Head

PROBE_TOKENS = 6


class Headless:
    """A causal LM up to its output head, for models whose body alone does less than that.

    Some scale or transform what their body gives, some have no body of the declared name. Called
    as a body is; gives what enters the head as `last_hidden_state`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, **arguments: Any) -> Any:
        """Run the model."""
        head = self._model.get_output_embeddings()
        entered: list[Tensor] = []

        def instead(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            entered.append(hidden)
            return hidden[..., :1]  # what comes behind the head is not needed

        own = vars(head).get("forward")
        head.forward = instead
        try:
            # Mixed precision is put around the outermost forward only: bodies run without it.
            getattr(self._model, "_original_forward", self._model)(**arguments)
        finally:
            if own is None:
                del head.forward
            else:
                head.forward = own
        if not entered:
            raise UnsupportedModelError(f"{type(self._model).__name__} does not call its head")
        return SimpleNamespace(last_hidden_state=entered[0])


def find_body_and_head(model: Any, *, vocabulary_size: int | None = None) -> tuple[Any, Head]:
    """What gives final hidden states, and the head: bias, scale and soft-capping as declared.

    Args:
        model: a `transformers` causal LM.
        vocabulary_size: tokens that count; columns beyond are padding. None: all that the model
            gives logits for.

    Raises:
        UnsupportedModelError: the model has no linear output head, or the head does not
            reproduce the model's own logits.
    """
    output = model.get_output_embeddings()
    weight, bias = getattr(output, "weight", None), getattr(output, "bias", None)
    if not isinstance(weight, torch.Tensor):
        raise UnsupportedModelError(f"{type(model).__name__} has no linear output head")
    config = model.config.get_text_config()
    tokens, own = _own_logits(model)
    rows = int(weight.shape[0])
    head = Head(
        weight=_scaled_by_token(output, weight.detach()),
        bias=None if bias is None else bias.detach(),
        scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
        vocabulary_size=own.shape[-1] if own.shape[-1] < rows else None,
    )
    body: Any = model.base_model
    if body is model or _problem(model, body, head, tokens, own) is not None:
        body = Headless(model)
        problem = _problem(model, body, head, tokens, own)
        if problem is not None:
            raise UnsupportedModelError(f"{type(model).__name__}: {problem}")
    if vocabulary_size is not None:
        head = replace(head, vocabulary_size=vocabulary_size)
    return body, head


def _scaled_by_token(output: Any, weight: Tensor) -> Tensor:
    """The head's weight, each token's row times what its logit is multiplied by (Dory)."""
    scale = getattr(output, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.shape != weight.shape[:1]:
        return weight
    scale = scale.detach().float() * getattr(output, "logit_scale_factor", 1.0)
    return (weight.float() * scale.unsqueeze(-1)).to(weight.dtype)


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
def _own_logits(model: Any) -> tuple[Tensor, Tensor]:
    """A few token ids (1, T) and the model's own logits for them, (T, V)."""
    device = model.get_input_embeddings().weight.device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = (torch.arange(PROBE_TOKENS) * 89 % vocabulary)[None].to(device)
    # Mixed precision is put around the outermost forward only: the body runs without it.
    forward = getattr(model, "_original_forward", model)
    return tokens, forward(input_ids=tokens, use_cache=False).logits[0].float()


@torch.no_grad()
def _problem(model: Any, body: Any, head: Head, tokens: Tensor, own: Tensor) -> str | None:
    """Why body and head together are not the model; None: they are."""
    hidden = body(input_ids=tokens, use_cache=False).last_hidden_state[0]
    if hidden.shape[-1] != head.weight.shape[-1]:
        return f"its head takes {head.weight.shape[-1]} channels, its body gives {hidden.shape[-1]}"
    ours = head.logits(hidden.to(head.weight.device)).to(own.device)
    if ours.shape != own.shape:
        return f"the output head gives {tuple(ours.shape)} logits, the model {tuple(own.shape)}"
    if bool((own.isnan() & ours.isnan()).any()):
        return None  # a broken model, not a wrong head: its measurement says so
    scale = own.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1e-6)
    # A token that both exclude differs by nothing; -inf less -inf would be NaN.
    error = float(torch.where(ours == own, 0.0, (ours - own).abs()).max() / scale)
    if error < 0.02:
        return None
    return (
        f"logits computed from its final hidden states differ from its own by {error:.1%}; its "
        "head has a step that is not declared"
    )
