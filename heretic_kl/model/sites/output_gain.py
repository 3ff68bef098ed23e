"""What lies between a site and the residual stream: norms, gains, scales, seen by sending through.

Signs are put in place of the site's output, into a layer whose stream is zero and whose other
sites are silent. What the layer gives tells the gain of every channel, whether a norm does it or
a parameter of the layer, in whatever form it is stored. Knows no names of modules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heretic_kl.model.sites.probe import OutputHook, Placed, Probe

STEADY = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Gains of different tokens that differ by less than this share are one."""
STEADY_LOW_PRECISION = 0.005
MOST_GAINS = 8
"""Short convolutions have four taps or so."""


@dataclass(frozen=True)
class OutputGain:
    """`y -> gain * y`, up to a scale of the token; of the centred `y` where a LayerNorm does it.

    Several gains where a short convolution adds what was given for earlier tokens, each with its
    own gain.
    """

    gains: Tensor | None
    """(G, D) float32, largest magnitude 1; None: all channels alike."""
    centred: bool = False
    problem: str | None = None
    """Why there is no such gain."""


def find_output_gains(
    probe: Probe,
    modules: Mapping[int, Sequence[nn.Module]],
    ablated: Collection[Placed],
    quiet: Sequence[Tensor],
) -> dict[int, OutputGain]:
    """What the output of modules of one place passes, by layer.

    Args:
        probe: the layers under examination.
        modules: by layer; those of one layer are sent through together.
        ablated: all other sites.
        quiet: what the layers give for a stream of zeros with all sites silent.
    """
    signs = sign_vector(probe.width)
    zeros = [torch.zeros_like(call.before) for call in probe.calls]

    def through(vector: Tensor) -> dict[int, Tensor]:
        def give(output: Tensor) -> Tensor:
            return vector.to(output).expand_as(output).clone()

        sent = [((layer, m), give) for layer, group in modules.items() for m in group]
        return rows(probe.run(ablated, inputs=zeros, hooks=sent))

    def rows(after: Sequence[Tensor]) -> dict[int, Tensor]:
        return {
            call.layer: probe.tokens_first(given).float().flatten(0, 2).cpu()
            for call, given in zip(probe.calls, after, strict=True)
            if call.layer in modules
        }

    sent, ones, nothing = through(signs), through(torch.ones_like(signs)), rows(quiet)
    steady = STEADY.get(probe.dtype, STEADY_LOW_PRECISION)
    return {
        layer: _output_gain(
            sent[layer] - nothing[layer], ones[layer] - nothing[layer], signs, steady
        )
        for layer in modules
    }


def stream_gains(probe: Probe, ablated: Collection[Placed]) -> dict[int, list[Tensor]]:
    """By which gains of the channels a layer passes its stream on, or gives it to its modules.

    Args:
        probe: the layers under examination.
        ablated: all sites.

    Returns:
        By layer, vectors (D,): of the layer itself and of each of its norms, ones left out.
    """
    signs = sign_vector(probe.width)
    found: dict[int, list[Tensor]] = {}

    def note(layer: int, given: Tensor) -> None:
        rows = given.reshape(-1, probe.width).float().cpu() / signs
        sizes = rows.abs().amax(dim=1)
        if not bool(torch.isfinite(rows).all()) or float(sizes.max()) == 0:
            return
        gain = rows[int(sizes.argmax())] / sizes.max()
        known = [torch.ones(probe.width), *found.get(layer, [])]
        if all(float((gain - other).abs().max()) > 1e-3 for other in known):
            found.setdefault(layer, []).append(gain)

    def keep(layer: int) -> OutputHook:
        def hook(output: Tensor) -> None:
            note(layer, output)

        return hook

    inputs = []
    for call in probe.calls:
        given = torch.zeros_like(call.before)
        probe.tokens_first(given).copy_(signs.to(given))
        inputs.append(given)
    simple = [((layer, module), keep(layer)) for layer, module in probe.simple_modules]
    after = probe.run(ablated, inputs=inputs, hooks=simple)
    for call, given in zip(probe.calls, after, strict=True):
        note(call.layer, probe.tokens_first(given))
    return found


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
    sent: Tensor,  # (tokens, D) what came of the signs
    ones: Tensor,  # (tokens, D) what came of ones
    signs: Tensor,  # (D,)
    steady: float,
) -> OutputGain:
    gains = sent / signs
    size = gains.abs().mean(dim=1, keepdim=True)
    reached = size[:, 0] > 1e-3 * size.max()  # experts get some tokens only
    if not bool(torch.isfinite(gains).all()) or not bool(reached.any()) or float(size.max()) == 0:
        return OutputGain(None, problem="what it gives does not reach the stream")
    own = (gains / size)[reached].double()
    _, values, basis = torch.linalg.svd(own, full_matrices=False)
    count = int((values > steady * values[0]).sum())
    if count > MOST_GAINS:
        return OutputGain(None, problem="what it gives is scaled differently from token to token")
    centred = bool(ones[reached].abs().mean() < 0.1 * sent[reached].abs().mean())
    # One gain as it was measured, several as what they span.
    found = own[:1] if count == 1 else basis[:count]
    found = (found / found.abs().amax(dim=1, keepdim=True)).float()
    alike = count == 1 and bool((found - found[0, 0]).abs().max() < 1e-6)
    return OutputGain(None if alike and not centred else found, centred)
