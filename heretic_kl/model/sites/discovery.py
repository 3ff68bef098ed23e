"""Which modules write to the residual stream, found by silencing. Knows no names of modules.

With every module that could write silenced, a layer passes its input on and adds nothing. A module
is a writer where letting it speak again changes what the layer gives: a comparison for equality,
exact in every dtype and however little the module adds. Which modules mix tokens, and what lies
between a module and the stream, is found in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heretic_kl.ablation import Component
from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.sites.output_gain import OutputGain, find_output_gains, stream_gains
from heretic_kl.model.sites.passes_through import passes_through
from heretic_kl.model.sites.probe import ROWS, TOKENS, OutputHook, Placed, Probe
from heretic_kl.model.sites.stack import submodule

MIXES = 0.02
"""A module whose contribution to a token changes by more than this share when only earlier tokens
change is a token mixer. What does not mix changes by rounding: 1e-6, in bfloat16 up to 1e-2."""
ROUNDS = 3
"""Layers that are given something by others than the stream are asked again so often."""


@dataclass(frozen=True)
class FoundSite:
    """A module that writes to the residual stream."""

    layer: int
    path: str
    """Inside the layer."""
    module: nn.Module
    component: Component
    output_gain: OutputGain
    """What its output passes on its way to the stream."""
    by_rows: bool
    """Its output is laid out sequence by sequence, so that sequences can be edited differently."""


class Group(NamedTuple):
    """Modules of one layer whose paths differ by numbers only: one, or a layer's experts."""

    layer: int
    pattern: str
    modules: dict[str, nn.Module]
    """By path inside the layer."""

    @property
    def placed(self) -> set[Placed]:
        """As what is silenced."""
        return {(self.layer, module) for module in self.modules.values()}


def find_sites(probe: Probe, patterns: tuple[str, ...] = ()) -> list[FoundSite]:
    """Every module that writes to the residual stream, in layer order.

    Args:
        probe: the layers under examination.
        patterns: shell patterns of paths inside a layer; where given, no other module is
            considered.

    Raises:
        UnsupportedModelError: with all modules silenced, a layer still changes the stream.
    """
    groups, base = _zero_ablated(probe, patterns)
    writers, ablated = _writers(probe, groups, base)
    quiet = probe.run(ablated, inputs=[torch.zeros_like(call.before) for call in probe.calls])
    found: list[FoundSite] = []
    for turn in _turns(writers):
        found += _described(probe, turn, ablated, base, quiet)
    # By layer, and there in the order of the calls: the sort is stable.
    return sorted(found, key=lambda site: site.layer)


def _writers(
    probe: Probe, groups: Sequence[Group], base: Sequence[Tensor]
) -> tuple[list[Group], set[Placed]]:
    """The groups that must be silent for every layer to be, and the same as what is silenced."""
    ablated: set[Placed] = set()
    writers: dict[tuple[int, str], Group] = {}
    layers = {group.layer for group in groups}
    for _ in range(ROUNDS):
        ablated |= {p for group in groups if group.layer in layers for p in group.placed}
        # In the order of the calls: what a writer is fed by speaks again before the writer is
        # asked, and a module that calls the writer before it.
        for turn in _turns(group for group in groups if group.layer in layers):
            speaking = {placed for group in turn for placed in group.placed}
            changed = _changed(probe, base, probe.run(ablated - speaking))
            for group in turn:
                if group.layer in changed:
                    writers[group.layer, group.pattern] = group
                else:
                    writers.pop((group.layer, group.pattern), None)
                    ablated -= group.placed
        # Layers that share keys and values with a later one were asked when it was still silent.
        layers = _changed(probe, base, probe.run(ablated))
        if not layers:
            return [group for group in groups if (group.layer, group.pattern) in writers], ablated
    raise UnsupportedModelError(_still_changes(probe, min(layers), groups))


def _turns(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """The first group of every layer, then the second, and so on: layers do not meet in a probe."""
    by_layer: dict[int, list[Group]] = {}
    for group in groups:
        by_layer.setdefault(group.layer, []).append(group)
    for turn in zip_longest(*by_layer.values()):
        yield [group for group in turn if group is not None]


def _changed(probe: Probe, before: Sequence[Tensor], after: Sequence[Tensor]) -> set[int]:
    """Layers that give something else than before."""
    pairs = zip(probe.calls, before, after, strict=True)
    return {call.layer for call, one, two in pairs if not torch.equal(one, two)}


# --- what could write ----------------------------------------------------------------------------


def _zero_ablated(probe: Probe, patterns: tuple[str, ...]) -> tuple[list[Group], list[Tensor]]:
    """Modules whose silence leaves the stream alone, and what layers give meanwhile."""
    layers = set(range(len(probe.stack.layers)))
    groups = list(_candidates(probe, patterns, layers, deep=False))
    base = probe.run({placed for group in groups for placed in group.placed})
    failing = not_passed_through(probe, groups, base)
    if failing:
        # Weights that a module uses without calling the module that holds them.
        kept = [group for group in groups if group.layer not in failing]
        groups = kept + list(_candidates(probe, patterns, failing, deep=True))
        base = probe.run({placed for group in groups for placed in group.placed})
        failing = not_passed_through(probe, groups, base)
    if failing:
        raise UnsupportedModelError(_still_changes(probe, min(failing), groups))
    return groups, base


def _still_changes(probe: Probe, layer: int, groups: Sequence[Group]) -> str:
    module = probe.stack.layers[layer]
    named = ", ".join(name for name, _ in module.named_children())
    tried = ", ".join(group.pattern for group in groups if group.layer == layer) or "none"
    return (
        f"layer {layer} ({type(module).__name__}) changes the residual stream even while all of "
        f"its writing modules are silenced (tried {tried}; it holds {named}): it cannot be edited "
        "exactly"
    )


def not_passed_through(probe: Probe, groups: Iterable[Group], base: Sequence[Tensor]) -> set[int]:
    """Layers that do more than pass the stream on and add a constant, though groups are silent."""
    ablated = {placed for group in groups for placed in group.placed}
    constants = layer_constants(probe, ablated)
    failing: set[int] = set()
    gains: dict[int, list[Tensor]] | None = None
    for call, given, constant in zip(probe.calls, base, constants, strict=True):
        after = given if constant is None else given - constant
        views = probe.tokens_first(call.before), probe.tokens_first(after.to(call.before))
        if passes_through(*views, dtype=probe.dtype):
            continue
        if not bool(after.any()) and any(other.ndim == 4 for other in call.others):
            continue  # what came so far is kept among the states of earlier blocks
        gains = stream_gains(probe, ablated) if gains is None else gains
        others = [probe.tokens_first(o) for o in call.others if o.ndim == call.before.ndim]
        # What a norm made of the stream may be added to it.
        others += [views[0] * gain.to(views[0]) for gain in gains.get(call.layer, [])]
        if not passes_through(*views, others, dtype=probe.dtype):
            failing.add(call.layer)
    return failing


def layer_constants(probe: Probe, ablated: set[Placed]) -> list[Tensor | None]:
    """What each layer gives for a stream of zeros while its sites are silent; None: zeros.

    Biases that stand outside the sites: the same for every token, whatever the prompt.
    """
    after = probe.run(ablated, inputs=[torch.zeros_like(call.before) for call in probe.calls])
    return [given if bool(given.any()) else None for given in after]


def _candidates(
    probe: Probe, patterns: tuple[str, ...], layers: set[int], *, deep: bool
) -> Iterator[Group]:
    """Modules that hold a weight matrix and give something D wide, and their like.

    Args:
        probe: the layers under examination.
        patterns: see `find_sites`.
        layers: to look in.
        deep: also modules that hold matrices only further down.
    """
    chosen: dict[tuple[int, str], type[nn.Module]] = {}
    for layer, path, module in probe.modules:
        if layer in layers and _holds_matrix(module, deep) and _allowed(path, patterns):
            place = layer, _pattern(probe.stack.layers[layer], path)
            chosen.setdefault(place, type(module))
    members: dict[tuple[int, str], dict[str, nn.Module]] = {}
    for layer in layers:
        for path, module in probe.stack.layers[layer].named_modules():
            # Experts that no token of the probe was sent to are like those that were called.
            place = layer, _pattern(probe.stack.layers[layer], path)
            if chosen.get(place) is type(module):
                members.setdefault(place, {})[path] = module
    for place in chosen:
        yield Group(*place, members[place])


def _pattern(layer: nn.Module, path: str) -> str:
    """The path with a star for the place in a list of modules, such as that of the experts."""
    parts: list[str] = []
    outer: nn.Module | None = layer
    for part in filter(None, path.split(".")):
        parts.append("*" if isinstance(outer, nn.ModuleList) else part)
        outer = None if outer is None else submodule(outer, part)
    return ".".join(parts)


def _allowed(path: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(path, pattern) for pattern in patterns)


def _holds_matrix(module: nn.Module, deep: bool) -> bool:
    own = (*module.parameters(recurse=deep), *module.buffers(recurse=deep))
    return any(tensor.ndim >= 2 for tensor in own)


# --- what a writer is like -----------------------------------------------------------------------


def _described(
    probe: Probe,
    turn: Sequence[Group],
    ablated: set[Placed],
    base: Sequence[Tensor],
    quiet: Sequence[Tensor],
) -> list[FoundSite]:
    """Sites of writing groups, at most one of them a layer."""
    others = ablated - {placed for group in turn for placed in group.placed}
    mixing, by_rows = _mixing(probe, turn, others, base)
    modules = {group.layer: list(group.modules.values()) for group in turn}
    output_gains = find_output_gains(probe, modules, others, quiet)
    return [
        FoundSite(
            group.layer,
            path,
            module,
            "attention" if group.layer in mixing else "mlp",
            output_gains[group.layer],
            group.layer in by_rows,
        )
        for group in turn
        for path, module in group.modules.items()
    ]


def _mixing(
    probe: Probe, turn: Sequence[Group], others: set[Placed], base: Sequence[Tensor]
) -> tuple[set[int], set[int]]:
    """Layers where the group mixes tokens, and layers where its output is laid out by rows."""
    given: tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]] = ({}, {})

    def watch(run: int) -> list[tuple[Placed, OutputHook]]:
        def keep(layer: int) -> OutputHook:
            def hook(output: Tensor) -> None:
                given[run].setdefault(layer, []).append(output.clone())

            return hook

        return [(placed, keep(group.layer)) for group in turn for placed in group.placed]

    plain = probe.run(others, hooks=watch(0))
    inputs = [_earlier_changed(probe, call.before) for call in probe.calls]
    changed = probe.run(others, inputs=inputs, hooks=watch(1))
    by_rows = {
        layer
        for layer, outputs in given[0].items()
        if len(outputs) == len(given[1].get(layer, ()))
        and all(map(_laid_out_by_rows, outputs, given[1][layer]))
    }
    mixing: set[int] = set()
    for call, *runs in zip(probe.calls, base, plain, changed, strict=True):
        quiet, first, second = (probe.tokens_first(after.float())[0, -1] for after in runs)
        if call.layer in by_rows:  # its own output: what it passes may mix tokens too
            quiet = torch.zeros(())
            first, second = (_last_of_first(run[call.layer][0]) for run in given)
        if float((second - first).norm()) > MIXES * float((first - quiet).norm()):
            mixing.add(call.layer)
    return mixing, by_rows


def _last_of_first(output: Tensor) -> Tensor:
    """What a module gave for the last token of the first sequence."""
    flat = output.float().cpu().reshape(-1, output.shape[-1])
    return flat[TOKENS - 1] if len(flat) == ROWS * TOKENS else flat[len(flat) // ROWS - 1]


def _earlier_changed(probe: Probe, before: Tensor) -> Tensor:
    """The stream with all tokens of the first sequence but its last one changed.

    Channels move on by one: a sign would cancel where a module multiplies its input by itself.
    """
    changed = before.clone()
    earlier = probe.tokens_first(changed)[0, :-1]
    earlier.copy_(earlier.roll(1, dims=-1))
    return changed


def _laid_out_by_rows(first: Tensor, second: Tensor) -> bool:
    """Whether the second sequence, which did not change, stands in the second half."""
    if first.shape != second.shape:
        return False
    if first.shape[0] == ROWS:
        return True
    if first.shape[0] != ROWS * TOKENS:
        return False
    scale = first[TOKENS:].float().abs().mean()
    return bool((first[TOKENS:].float() - second[TOKENS:].float()).abs().max() <= 0.1 * scale)
