"""A model's linear weights rounded to few bits in memory, and put back. Measures nothing.

Round-to-nearest, symmetric: each block of `BLOCK` weights along a row's inputs has one scale, its
largest magnitude over `2 ** (bits - 1) - 1`. Embeddings, the head, norms and biases stay as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from heretic_kl.errors import ModelError
from heretic_kl.model.placement import is_sharded

BLOCK: Final = 32
"""Weights that share a scale."""


class LinearWeight(NamedTuple):
    """A weight that multiplies what a module is given."""

    weight: nn.Parameter
    input_dim: int
    """Its dimension over the inputs."""


@contextmanager
def rounded_weights(model: nn.Module, bits: int) -> Iterator[None]:
    """Round every linear weight until the block is left, then put it back to the last bit.

    The originals wait in the CPU's memory meanwhile.

    Args:
        model: a `transformers` model with floating-point weights.
        bits: 2 or more, of each weight.

    Raises:
        ModelError: weights are packed or not in memory, or there are none.
    """
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for weight, input_dim in linear_weights(model):
                originals.append((weight, weight.detach().to("cpu", copy=True)))
                weight.copy_(round_to_nearest(weight, bits, input_dim))
        yield
    finally:
        with torch.no_grad():
            for rounded, original in originals:
                rounded.copy_(original)


def linear_weights(model: nn.Module) -> list[LinearWeight]:
    """The weights of linear layers and of stacked experts, each once; not those of the head.

    Raises:
        ModelError: weights are packed or not in memory, or there are none.
    """
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    seen = {id(module.weight) for module in embeddings if module is not None}
    weights = []
    for module in model.modules():
        if isinstance(module, nn.Embedding | _ConvNd):
            continue
        for parameter in module.parameters(recurse=False):
            linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            stacked = parameter.dim() == 3  # experts in one tensor
            if id(parameter) in seen or not (stacked or (linear and parameter.dim() == 2)):
                continue
            seen.add(id(parameter))
            absent = parameter.device.type == "meta" or is_sharded(parameter)
            if not parameter.is_floating_point() or absent:
                raise ModelError(
                    "the reference's weights cannot be rounded: they are packed or not in memory; "
                    "load it whole, without quantization, or leave out --bands"
                )
            transposed = type(module).__name__ == "Conv1D"  # GPT-2 stores (inputs, outputs)
            weights.append(LinearWeight(parameter, 0 if transposed else -1))
    if not weights:
        raise ModelError("the reference has no linear weights to round: leave out --bands")
    return weights


def round_to_nearest(weight: Tensor, bits: int, input_dim: int = -1) -> Tensor:
    """The nearest values of so many bits, in the weight's shape and dtype."""
    most = 2 ** (bits - 1) - 1
    rows = weight.detach().float().movedim(input_dim, -1)
    inputs = rows.shape[-1]
    padded = nn.functional.pad(rows, (0, -inputs % BLOCK))
    blocks = padded.reshape(*rows.shape[:-1], -1, BLOCK)
    scale = blocks.abs().amax(dim=-1, keepdim=True).div(most).clamp_min(1e-30)
    rounded = (blocks / scale).round_().mul_(scale).flatten(-2)[..., :inputs]
    return rounded.movedim(-1, input_dim).to(weight.dtype)
