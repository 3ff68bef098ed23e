"""Which modules write to the residual stream, found by zero-ablating them. Reads no module names.

With every module that could write zero-ablated, a layer returns its input unchanged. A module is a
writer if restoring it changes the layer's output. The comparison is for equality: it holds in
every dtype and however little the module adds. Whether a writer mixes tokens, and what stands
between it and the stream, is found in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from heretic_kl.ablation import Component
from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.sites.candidate_modules import ModuleGroup, candidate_groups, placed_modules
from heretic_kl.model.sites.output_gain import OutputGain, find_output_gains, stream_gains
from heretic_kl.model.sites.passes_through import passes_through
from heretic_kl.model.sites.probe import ROWS, TOKENS, OutputHook, PlacedModule, Probe

MIXES = 0.02
"""A module whose contribution to a token changes by more than this share when only earlier tokens
change is a token mixer. What does not mix changes by rounding: 1e-6, in bfloat16 up to 1e-2."""
ROUNDS = 3
"""How often layers are examined again whose input also comes from other layers than the last."""


@dataclass(frozen=True)
class DiscoveredSite:
    """A module that writes to the residual stream."""

    layer: int
    path: str
    """Inside the layer."""
    module: nn.Module
    component: Component
    output_gain: OutputGain
    """What is applied to its output on the way to the stream."""
    by_rows: bool
    """Its output is laid out sequence by sequence, so that sequences can be edited differently."""


def find_sites(probe: Probe, patterns: tuple[str, ...] = ()) -> list[DiscoveredSite]:
    """Every module that writes to the residual stream, in layer order.

    `patterns`: of paths inside a layer, as in a shell; where given, no other module is considered.

    Raises:
        UnsupportedModelError: with all modules zero-ablated, a layer still changes the stream.
    """
    groups, ablated_outputs = _ablatable_groups(probe, patterns)
    writers, ablated = _writers(probe, groups, ablated_outputs)
    zero_streams = [torch.zeros_like(call.stream_in) for call in probe.calls]
    zero_outputs = probe.run(ablated, inputs=zero_streams)
    sites: list[DiscoveredSite] = []
    for round_groups in _one_group_per_layer(writers):
        sites += _described(probe, round_groups, ablated, ablated_outputs, zero_outputs)
    # By layer, and there in the order of the calls: the sort is stable.
    return sorted(sites, key=lambda site: site.layer)


def _writers(
    probe: Probe, groups: Sequence[ModuleGroup], ablated_outputs: Sequence[Tensor]
) -> tuple[list[ModuleGroup], set[PlacedModule]]:
    """The groups that must be zero-ablated for every layer to add nothing, and their modules."""
    ablated: set[PlacedModule] = set()
    writers: dict[tuple[int, str], ModuleGroup] = {}
    layers = {group.layer for group in groups}
    for _ in range(ROUNDS):
        ablated |= placed_modules(group for group in groups if group.layer in layers)
        # In the order of the calls: what feeds a writer is restored before the writer is, and so
        # is a module that calls the writer.
        for round_groups in _one_group_per_layer(g for g in groups if g.layer in layers):
            outputs = probe.run(ablated - placed_modules(round_groups))
            changed = _changed_layers(probe, ablated_outputs, outputs)
            for group in round_groups:
                if group.layer in changed:
                    writers[group.layer, group.pattern] = group
                else:
                    writers.pop((group.layer, group.pattern), None)
                    ablated -= group.placed
        # A layer that shares its keys and values with a later one was examined when the later one
        # was still zero-ablated.
        layers = _changed_layers(probe, ablated_outputs, probe.run(ablated))
        if not layers:
            return [group for group in groups if (group.layer, group.pattern) in writers], ablated
    raise UnsupportedModelError(_still_changes(probe, min(layers), groups))


def _one_group_per_layer(groups: Iterable[ModuleGroup]) -> Iterator[list[ModuleGroup]]:
    """The first group of every layer, then the second, and so on.

    A probe's layers are independent of each other: one run examines one group of each.
    """
    by_layer: dict[int, list[ModuleGroup]] = {}
    for group in groups:
        by_layer.setdefault(group.layer, []).append(group)
    for round_groups in zip_longest(*by_layer.values()):
        yield [group for group in round_groups if group is not None]


def _changed_layers(probe: Probe, before: Sequence[Tensor], after: Sequence[Tensor]) -> set[int]:
    """Layers whose outputs differ between two runs."""
    pairs = zip(probe.calls, before, after, strict=True)
    return {call.layer for call, one, two in pairs if not torch.equal(one, two)}


# --- what could write ----------------------------------------------------------------------------


def _ablatable_groups(
    probe: Probe, patterns: tuple[str, ...]
) -> tuple[list[ModuleGroup], list[Tensor]]:
    """Modules without which every layer passes its stream through, and the layers' outputs then."""
    layers = set(range(len(probe.stack.layers)))
    groups = list(candidate_groups(probe, patterns, layers, deep=False))
    outputs = probe.run(placed_modules(groups))
    failing = layers_that_write(probe, groups, outputs)
    if failing:
        # A module may use weights without calling the module that holds them.
        rest = [group for group in groups if group.layer not in failing]
        groups = rest + list(candidate_groups(probe, patterns, failing, deep=True))
        outputs = probe.run(placed_modules(groups))
        failing = layers_that_write(probe, groups, outputs)
    if failing:
        raise UnsupportedModelError(_still_changes(probe, min(failing), groups))
    return groups, outputs


def _still_changes(probe: Probe, layer: int, groups: Sequence[ModuleGroup]) -> str:
    module = probe.stack.layers[layer]
    children = ", ".join(name for name, _ in module.named_children())
    tried = ", ".join(group.pattern for group in groups if group.layer == layer) or "none"
    return (
        f"layer {layer} ({type(module).__name__}) changes the residual stream even with all its "
        f"writing modules zero-ablated (tried {tried}; it holds {children}): it cannot be edited "
        "exactly"
    )


def layers_that_write(
    probe: Probe, groups: Iterable[ModuleGroup], outputs: Sequence[Tensor]
) -> set[int]:
    """Layers that, with groups zero-ablated, do more than pass the stream and add a constant."""
    ablated = placed_modules(groups)
    constants = layer_constants(probe, ablated)
    failing: set[int] = set()
    gains: dict[int, list[Tensor]] | None = None
    for call, output, constant in zip(probe.calls, outputs, constants, strict=True):
        after = output if constant is None else output - constant
        views = probe.tokens_first(call.stream_in), probe.tokens_first(after.to(call.stream_in))
        if passes_through(*views, dtype=probe.dtype):
            continue
        if not bool(after.any()) and any(other.ndim == 4 for other in call.other_inputs):
            continue  # the stream so far is held among the states of earlier blocks
        gains = stream_gains(probe, ablated) if gains is None else gains
        others = [probe.tokens_first(o) for o in call.other_inputs if o.ndim == call.stream_in.ndim]
        # Some layers add a normed form of the stream to it.
        others += [views[0] * gain.to(views[0]) for gain in gains.get(call.layer, [])]
        if not passes_through(*views, others, dtype=probe.dtype):
            failing.add(call.layer)
    return failing


def layer_constants(probe: Probe, ablated: set[PlacedModule]) -> list[Tensor | None]:
    """Each layer's output for a stream of zeros while its sites are zero-ablated; None: zeros.

    Biases that stand outside the sites: the same for every token, whatever the prompt.
    """
    zero_streams = [torch.zeros_like(call.stream_in) for call in probe.calls]
    outputs = probe.run(ablated, inputs=zero_streams)
    return [output if bool(output.any()) else None for output in outputs]


# --- what a writer is like -----------------------------------------------------------------------


def _described(
    probe: Probe,
    groups: Sequence[ModuleGroup],
    ablated: set[PlacedModule],
    ablated_outputs: Sequence[Tensor],
    zero_outputs: Sequence[Tensor],
) -> list[DiscoveredSite]:
    """Sites of writing groups, at most one group a layer."""
    others = ablated - placed_modules(groups)
    mixing, by_rows = _mixing(probe, groups, others, ablated_outputs)
    modules = {group.layer: list(group.modules.values()) for group in groups}
    output_gains = find_output_gains(probe, modules, others, zero_outputs)
    return [
        DiscoveredSite(
            group.layer,
            path,
            module,
            "attention" if group.layer in mixing else "mlp",
            output_gains[group.layer],
            group.layer in by_rows,
        )
        for group in groups
        for path, module in group.modules.items()
    ]


def _mixing(
    probe: Probe,
    groups: Sequence[ModuleGroup],
    others: set[PlacedModule],
    ablated_outputs: Sequence[Tensor],
) -> tuple[set[int], set[int]]:
    """Layers where the group mixes tokens, and layers where its output is laid out by rows."""
    module_outputs: tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]] = ({}, {})

    def recorders(run: int) -> list[tuple[PlacedModule, OutputHook]]:
        def recorder(layer: int) -> OutputHook:
            def hook(output: Tensor) -> None:
                module_outputs[run].setdefault(layer, []).append(output.clone())

            return hook

        return [(placed, recorder(group.layer)) for group in groups for placed in group.placed]

    plain = probe.run(others, hooks=recorders(0))
    inputs = [_earlier_changed(probe, call.stream_in) for call in probe.calls]
    changed = probe.run(others, inputs=inputs, hooks=recorders(1))
    by_rows = {
        layer
        for layer, outputs in module_outputs[0].items()
        if len(outputs) == len(module_outputs[1].get(layer, ()))
        and all(map(_laid_out_by_rows, outputs, module_outputs[1][layer]))
    }
    mixing: set[int] = set()
    for call, *runs in zip(probe.calls, ablated_outputs, plain, changed, strict=True):
        without, first, second = (probe.tokens_first(output.float())[0, -1] for output in runs)
        if call.layer in by_rows:  # the module's own output: what follows it may mix tokens too
            without = torch.zeros(())
            first, second = (_last_of_first(run[call.layer][0]) for run in module_outputs)
        if float((second - first).norm()) > MIXES * float((first - without).norm()):
            mixing.add(call.layer)
    return mixing, by_rows


def _last_of_first(output: Tensor) -> Tensor:
    """A module's output for the last token of the first sequence."""
    flat = output.float().cpu().reshape(-1, output.shape[-1])
    return flat[TOKENS - 1] if len(flat) == ROWS * TOKENS else flat[len(flat) // ROWS - 1]


def _earlier_changed(probe: Probe, stream: Tensor) -> Tensor:
    """The stream with all tokens of the first sequence but its last one changed.

    Channels move on by one: a sign would cancel where a module multiplies its input by itself.
    """
    changed = stream.clone()
    earlier = probe.tokens_first(changed)[0, :-1]
    earlier.copy_(earlier.roll(1, dims=-1))
    return changed


def _laid_out_by_rows(first: Tensor, second: Tensor) -> bool:
    """Whether the second half holds the second sequence, which is the same in both runs."""
    if first.shape != second.shape:
        return False
    if first.shape[0] == ROWS:
        return True
    if first.shape[0] != ROWS * TOKENS:
        return False
    scale = first[TOKENS:].float().abs().mean()
    return bool((first[TOKENS:].float() - second[TOKENS:].float()).abs().max() <= 0.1 * scale)
