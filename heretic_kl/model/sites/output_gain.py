"""The gain between a site's output and the residual stream, measured. Reads no module names.

Signs replace the site's output in a layer whose stream is zero and whose other sites are
zero-ablated. The layer's output is then the gain of every channel, whether a norm applies it or a
parameter of the layer, in whatever form it is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heretic_kl.model.sites.probe import OutputHook, PlacedModule, Probe

STEADY = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Gains of different tokens that differ by less than this share are one."""
STEADY_LOW_PRECISION = 0.005
MOST_GAINS = 8
"""Short convolutions have four taps or so."""


@dataclass(frozen=True)
class OutputGain:
    """`y -> gain * y`, up to a scale for each token; of the centred `y` where it is a LayerNorm's.

    There are several gains where a short convolution adds outputs for earlier tokens, each with a
    gain of its own.
    """

    gains: Tensor | None
    """(G, D) float32, largest magnitude 1; None: all channels alike."""
    centred: bool = False
    problem: str | None = None
    """Why there is no such gain."""


def find_output_gains(
    probe: Probe,
    modules: Mapping[int, Sequence[nn.Module]],
    ablated: Collection[PlacedModule],
    zero_outputs: Sequence[Tensor],  # of the layers, for streams of zeros without any site
) -> dict[int, OutputGain]:
    """The gain that is applied to the output of modules of one place, by layer.

    All other sites are zero-ablated. Modules of one layer are measured together.
    """
    signs = sign_vector(probe.width)
    zero_streams = [torch.zeros_like(call.stream_in) for call in probe.calls]

    def outputs_for(vector: Tensor) -> dict[int, Tensor]:
        def replace_output(output: Tensor) -> Tensor:
            return vector.to(output).expand_as(output).clone()

        hooks = [((layer, m), replace_output) for layer, group in modules.items() for m in group]
        return token_rows(probe.run(ablated, inputs=zero_streams, hooks=hooks))

    def token_rows(outputs: Sequence[Tensor]) -> dict[int, Tensor]:
        return {
            call.layer: probe.tokens_first(output).float().flatten(0, 2).cpu()
            for call, output in zip(probe.calls, outputs, strict=True)
            if call.layer in modules
        }

    of_signs, of_ones = outputs_for(signs), outputs_for(torch.ones_like(signs))
    of_zeros = token_rows(zero_outputs)
    steady = STEADY.get(probe.dtype, STEADY_LOW_PRECISION)
    return {
        layer: _output_gain(
            of_signs[layer] - of_zeros[layer], of_ones[layer] - of_zeros[layer], signs, steady
        )
        for layer in modules
    }


def stream_gains(probe: Probe, ablated: Collection[PlacedModule]) -> dict[int, list[Tensor]]:
    """Gains of the channels with which a layer passes on its stream or feeds it to its modules.

    All sites are zero-ablated.

    Returns:
        By layer, vectors (D,): of the layer itself and of each of its norms, without gains of 1.
    """
    signs = sign_vector(probe.width)
    gains: dict[int, list[Tensor]] = {}

    def add_gain(layer: int, output: Tensor) -> None:
        rows = output.reshape(-1, probe.width).float().cpu() / signs
        sizes = rows.abs().amax(dim=1)
        if not bool(torch.isfinite(rows).all()) or float(sizes.max()) == 0:
            return
        gain = rows[int(sizes.argmax())] / sizes.max()
        others = [torch.ones(probe.width), *gains.get(layer, [])]
        if all(float((gain - other).abs().max()) > 1e-3 for other in others):
            gains.setdefault(layer, []).append(gain)

    def recorder(layer: int) -> OutputHook:
        def hook(output: Tensor) -> None:
            add_gain(layer, output)

        return hook

    inputs = []
    for call in probe.calls:
        stream = torch.zeros_like(call.stream_in)
        probe.tokens_first(stream).copy_(signs.to(stream))
        inputs.append(stream)
    hooks = [((layer, module), recorder(layer)) for layer, module in probe.simple_modules]
    outputs = probe.run(ablated, inputs=inputs, hooks=hooks)
    for call, output in zip(probe.calls, outputs, strict=True):
        add_gain(call.layer, probe.tokens_first(output))
    return gains


def sign_vector(width: int) -> Tensor:
    """(D,) about half 1 and half -1, of mean zero."""
    signs = torch.ones(width)
    signs[1::2] = -1.0
    if width % 2:
        signs[-1] = -1.0
        signs[-2] = 0.5
        signs[-3] = 0.5
    return signs


def _output_gain(
    of_signs: Tensor,  # (tokens, D) the layer's output for signs
    of_ones: Tensor,  # (tokens, D) the layer's output for ones
    signs: Tensor,  # (D,)
    steady: float,
) -> OutputGain:
    gains = of_signs / signs
    size = gains.abs().mean(dim=1, keepdim=True)
    reached = size[:, 0] > 1e-3 * size.max()  # experts get only some of the tokens
    if not bool(torch.isfinite(gains).all()) or not bool(reached.any()) or float(size.max()) == 0:
        return OutputGain(None, problem="its output does not reach the stream")
    relative = (gains / size)[reached].double()
    _, values, basis = torch.linalg.svd(relative, full_matrices=False)
    count = int((values > steady * values[0]).sum())
    if count > MOST_GAINS:
        return OutputGain(None, problem="its output is scaled differently from token to token")
    centred = bool(of_ones[reached].abs().mean() < 0.1 * of_signs[reached].abs().mean())
    # One gain as it was measured, several as what they span.
    rows = relative[:1] if count == 1 else basis[:count]
    rows = (rows / rows.abs().amax(dim=1, keepdim=True)).float()
    alike = count == 1 and bool((rows - rows[0, 0]).abs().max() < 1e-6)
    return OutputGain(None if alike and not centred else rows, centred)
