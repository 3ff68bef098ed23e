"""A tiny random model of any model type, the same for the same seed. Downloads nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from heretic_kl.model.transformers_logging import quiet_transformers
from heretic_kl.testing.zoo.configs import tiny_config

NOISE = 0.1
"""Standard deviation of what is added to parameters that start constant."""


def tiny_model(
    model_type: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    auto_class: str = "AutoModelForCausalLM",
) -> Any:
    """The causal language model of `tiny_config(model_type)`, in eval mode.

    Gains and biases, which start at 1 and 0, and whatever else starts constant or is left
    uninitialised, are made random, so that a wrong one shows.

    Args:
        model_type: of the model.
        seed: of its weights.
        dtype: of its weights.
        auto_class: the class of `transformers` that builds it. `AutoModelForImageTextToText` builds
            vision-language models as they are released; the causal class builds their text half.
    """
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        model = _built(model_type, torch.float32, auto_class)
        _randomise(model)
        if dtype != torch.float32:
            model = _copied(model, _built(model_type, dtype, auto_class), dtype)
    return model.eval()


def _built(model_type: str, dtype: torch.dtype, auto_class: str) -> Any:
    import transformers

    build: Callable[..., Any] = getattr(transformers, auto_class).from_config
    with _uninitialised_memory_is_nan():
        return build(tiny_config(model_type), dtype=dtype)


def _randomise(model: Any) -> None:
    """Noise on every parameter that is 1-D, constant or uninitialised, and on stored biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            undefined = ~torch.isfinite(parameter)
            if undefined.any():
                parameter[undefined] = NOISE * torch.randn(int(undefined.sum()))
            if parameter.ndim < 2 or parameter.std() < 1e-3:
                parameter.add_(NOISE * torch.randn_like(parameter))
        for name, buffer in _stored_buffers(model):
            if "bias" in name:  # what is not 0 is a constant that loading sets again
                buffer.add_(NOISE * torch.randn_like(buffer) * (buffer == 0))


def _copied(source: Any, target: Any, dtype: torch.dtype) -> Any:
    """`target` with the weights of `source` in `dtype`, except those the family keeps in float32.

    `source.to(dtype)` would also round what is computed and never stored, such as the frequencies
    of rotary positions. Loading does not.
    """
    patterns = list(target._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        patterns += target._keep_in_fp32_modules or ()
    keep_in_float32 = re.compile(
        "|".join(rf"(?:^|\.){pattern}(?:$|\.)" for pattern in patterns) or r"(?!)"
    )
    weights = dict([*source.named_parameters(), *_stored_buffers(source)])
    for name, tensor in [*target.named_parameters(), *_stored_buffers(target)]:
        target_dtype = torch.float32 if keep_in_float32.search(name) else tensor.dtype
        tensor.data = weights[name].data.to(target_dtype)
    return target


def _stored_buffers(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Floating-point buffers that saving writes."""
    stored = model.state_dict()
    return [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if name in stored and buffer.is_floating_point()
    ]


@contextmanager
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN, which shows what a library never initialises."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fills = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        filling.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
