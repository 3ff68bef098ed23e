"""Where a transformers model ends and its output head begins. Reads no config.

The head is measured by running the model, because its steps have different names in the configs of
different families. Chosen rows go through the head's module, which shows its bias and its weight.
Chosen logits replace the module's output, which shows the scale, the bias and the soft cap that
follow it, whatever the size of the model's own logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.kl import Head
from heretic_kl.model.forward.layer_inputs import forward_replaced
from heretic_kl.model.placement import device_of, in_memory

TOLERANCE: Final = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest difference between computed logits and the model's own, relative to the largest logit."""
LOW_PRECISION_TOLERANCE: Final = 0.02
"""In bfloat16 a scale and a soft cap round four times, to 0.004 each."""

SMALL_LOGITS: Final = (0.0, 1.0, -1.0, 3.0, -3.0, 12.0, -12.0, 50.0, -50.0)
"""Logits put in place of the head's output; any soft cap is still invertible at 1."""
LINEAR_ROWS: Final = 8
"""Random rows that show whether the head's module is its weight and bias."""
UNITS_AT_ONCE: Final = 256
"""Unit rows put through a head's module whose weight is measured."""

HeadModule = Callable[[Tensor], Tensor]
"""(..., D) -> (..., V): the head's module."""


class Headless:
    """A causal LM up to its output head, for models whose declared body is not all of that.

    Some scale or transform the output of their body, some have no body of the declared name.
    Called as a body is; returns the input of the head as `last_hidden_state`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, **arguments: Any) -> Any:
        """Run the model."""
        inputs: list[Tensor] = []

        def skip_head(hidden: Tensor, _module: HeadModule) -> Tensor:
            inputs.append(hidden)
            return hidden[..., :1]  # what follows the head is not needed

        with _replaced_head(self._model, skip_head):
            _forward(self._model)(**arguments)
        if not inputs:
            raise UnsupportedModelError(f"{type(self._model).__name__} does not call its head")
        return SimpleNamespace(last_hidden_state=inputs[0])


class _Run(NamedTuple):
    """One run of the model on the probe's tokens."""

    tokens: Tensor
    """(1, T) ids."""
    hidden: Tensor
    """(T, D) what enters the head's module."""
    module: HeadModule
    logits: Tensor
    """(T, V) the model's own, in the dtype that it returns."""


class _Steps(NamedTuple):
    """`softcap * tanh((scale * x + bias) / softcap)`: what follows the head's module."""

    scale: Tensor
    """(V,) float64."""
    bias: Tensor
    """(V,) float64."""
    softcap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        """(T, 1) or (T, V), the module's output -> (T, V)."""
        linear = logits * self.scale + self.bias
        return linear if self.softcap is None else torch.tanh(linear / self.softcap) * self.softcap


@torch.no_grad()
def find_body_and_head(model: Any) -> tuple[Any, Head]:
    """The body, which returns final hidden states, and the head with bias, scale and soft cap.

    Raises:
        UnsupportedModelError: the model has no linear output head, or body and head together do
            not give the model's own logits.
    """
    name = type(model).__name__
    output = model.get_output_embeddings()
    with in_memory(output) if isinstance(output, nn.Module) else nullcontext():
        weight = getattr(output, "weight", None)
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(f"{name} has no linear output head")
    run = _run(model)
    weight, bias = _linear_part(name, run, weight.detach())
    steps = _steps_after_head(model, run, rows=len(weight), dtype=weight.dtype)
    head = _head(weight, bias, steps)
    problem = _problem(head, run)
    if problem is not None:
        raise UnsupportedModelError(f"{name}: {problem}")
    return _body(model, run), head


def _forward(model: Any) -> Any:
    """The forward pass without mixed precision, which is put around the outermost one only.

    Bodies run without it.
    """
    return getattr(model, "_original_forward", model)


@contextmanager
def _replaced_head(
    model: Any, replacement: Callable[[Tensor, HeadModule], Tensor]
) -> Iterator[None]:
    """Until the block is left, the model's logits come from `replacement(hidden, module)`."""
    head = model.get_output_embeddings()
    original = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return replacement(hidden, lambda rows: original(rows, *args, **kwargs))

    with forward_replaced(head, forward):
        yield


def _run(model: Any) -> _Run:
    embeddings = model.get_input_embeddings()
    positions = len(SMALL_LOGITS) + 2  # two more for the soft cap
    tokens = (torch.arange(positions) * 89 % len(embeddings.weight))[None]
    tokens = tokens.to(device_of(embeddings))
    calls: list[tuple[Tensor, HeadModule]] = []

    def observe(hidden: Tensor, module: HeadModule) -> Tensor:
        calls.append((hidden, module))
        return module(hidden)

    with _replaced_head(model, observe):
        logits = _forward(model)(input_ids=tokens, use_cache=False).logits[0]
    if not calls:
        raise UnsupportedModelError(f"{type(model).__name__} does not call its output head")
    hidden, module = calls[0]
    return _Run(tokens, hidden.reshape(-1, hidden.shape[-1]), module, logits)


def _body(model: Any, run: _Run) -> Any:
    """The model's declared body, where its output is exactly what enters the head."""
    body: Any = model.base_model
    if body is not model:
        hidden = body(input_ids=run.tokens, use_cache=False).last_hidden_state[0]
        if torch.equal(hidden.to(run.hidden), run.hidden):
            return body
    return Headless(model)


def _linear_part(
    name: str,
    run: _Run,
    weight: Tensor,  # as the head's module stores it
) -> tuple[Tensor, Tensor | None]:
    """(V, D) and (V,) or None: what the head's module computes.

    The stored weight where the module is the product with it; else the module's outputs for unit
    rows, such as where each token has a scale of its own (Dory) or an adapter is added.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(LINEAR_ROWS, run.hidden.shape[-1], generator=generator).to(run.hidden)
    bias, outputs = run.module(torch.zeros_like(rows[:1]))[0], run.module(rows)

    def product(weight: Tensor) -> Tensor:
        return nn.functional.linear(rows.to(weight), weight, bias.to(weight))

    shape = (outputs.shape[-1], rows.shape[-1])
    if weight.shape != shape or _difference(product(weight), outputs) > 0.0:  # the same kernel
        weight = _measured_weight(run, bias)
        if not _difference(product(weight), outputs) < _tolerance(weight.dtype):
            raise UnsupportedModelError(f"{name} has an output head that is not linear")
    return weight, bias.to(weight) if bias.any() else None


def _measured_weight(run: _Run, bias: Tensor) -> Tensor:
    width = run.hidden.shape[-1]
    weight = run.hidden.new_empty(len(bias), width)
    for start in range(0, width, UNITS_AT_ONCE):
        units = torch.eye(width, dtype=run.hidden.dtype, device=run.hidden.device)
        block = units[start : start + UNITS_AT_ONCE]
        weight[:, start : start + len(block)] = (run.module(block) - bias).T
    return weight


def _steps_after_head(model: Any, run: _Run, *, rows: int, dtype: torch.dtype) -> _Steps:
    """Fit the steps to what the model makes of chosen logits, one value a position."""
    largest = 2.0**14 if dtype == torch.float16 else 2.0**30
    values = torch.tensor([*SMALL_LOGITS, largest / 2, largest])

    def chosen_logits(hidden: Tensor, _module: HeadModule) -> Tensor:
        logits = values.to(hidden.device)[:, None].expand(-1, rows)
        return logits.reshape(*hidden.shape[:-1], rows)

    with _replaced_head(model, chosen_logits):
        after = _forward(model)(input_ids=run.tokens, use_cache=False).logits[0].double()
    softcap = _softcap(after[-2], after[-1])
    small, inputs = after[: len(SMALL_LOGITS)], values[: len(SMALL_LOGITS), None].to(after)
    linear = small if softcap is None else softcap * torch.atanh(small / softcap)
    steps = _Steps((linear[1] - linear[2]) / 2, linear[0], softcap)
    # The chosen logits are float32, and most models keep them so, whatever their own dtype is.
    rounded = torch.equal(after, after.to(dtype).double())
    if not _difference(steps(inputs), small) < _tolerance(dtype if rounded else torch.float32):
        raise UnsupportedModelError(
            f"{type(model).__name__} changes its logits after the output head by other steps than "
            "a scale, a bias and a soft cap"
        )
    return steps


def _softcap(half: Tensor, whole: Tensor) -> float | None:
    """The bound at which logits saturate: doubling huge ones no longer changes them."""
    bound = float(whole.abs().median())
    if not math.isfinite(bound) or float((whole - half).abs().median()) > 0.01 * bound:
        return None
    return bound


def _head(weight: Tensor, bias: Tensor | None, steps: _Steps) -> Head:
    tokens = len(steps.scale)
    spread = float((steps.scale - steps.scale[0]).abs().max())
    scale = float(steps.scale.median())
    if abs(scale - 1.0) < 1e-6:
        scale = 1.0  # read through a soft cap, it is rounded
    if spread > 1e-3 * abs(scale):
        weight = (weight[:tokens].double() * steps.scale[:, None]).to(weight.dtype)
        bias = None if bias is None else (bias[:tokens].double() * steps.scale).to(bias.dtype)
        scale = 1.0
    if steps.bias.any():
        added = weight.new_zeros(len(weight)).double()
        added[:tokens] = steps.bias / scale
        bias = (added if bias is None else bias.double() + added).to(weight.dtype)
    return Head(
        weight=weight,
        bias=bias,
        scale=scale,
        softcap=steps.softcap,
        vocabulary_size=tokens if tokens < len(weight) else None,
    )


def _problem(head: Head, run: _Run) -> str | None:
    """Why the head does not give the model's own logits; None: it does."""
    logits = head.logits(run.hidden.to(head.weight.device))
    if logits.shape != run.logits.shape:
        shapes = f"{tuple(logits.shape)} logits, the model {tuple(run.logits.shape)}"
        return f"the output head gives {shapes}"
    difference = _difference(logits, run.logits)
    if difference < _tolerance(head.weight.dtype):
        return None
    return (
        f"logits computed from its final hidden states differ from its own by {difference:.1%}: "
        "its output head has a step that is neither a scale, a bias nor a soft cap"
    )


def _difference(computed: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest finite value expected.

    What is equal, or NaN in both, differs by nothing: such a model is broken, not its head.
    """
    expected = expected.double()
    computed = computed.to(expected)
    alike = (computed == expected) | (computed.isnan() & expected.isnan())
    difference = torch.where(alike, 0.0, (computed - expected).abs()).max()
    largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1e-6)
    return float(difference / largest)


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
