"""Modules that could write to the residual stream, grouped with their like. Runs no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from heretic_kl.model.sites.probe import PlacedModule, Probe
from heretic_kl.model.sites.stack import submodule


class ModuleGroup(NamedTuple):
    """Modules of one layer whose paths differ by numbers only: one, or a layer's experts."""

    layer: int
    pattern: str
    """The path inside the layer, a star for the number of an expert."""
    modules: dict[str, nn.Module]
    """By path inside the layer."""

    @property
    def placed(self) -> set[PlacedModule]:
        """The modules as parts of the layer."""
        return {(self.layer, module) for module in self.modules.values()}


def placed_modules(groups: Iterable[ModuleGroup]) -> set[PlacedModule]:
    """The modules of several groups."""
    return {placed for group in groups for placed in group.placed}


def candidate_groups(
    probe: Probe, patterns: tuple[str, ...], layers: set[int], *, deep: bool
) -> Iterator[ModuleGroup]:
    """Modules that hold a weight matrix and have an output D wide, and their like.

    `deep`: also modules that hold matrices only further down. Patterns as in `find_sites`.
    """
    classes: dict[tuple[int, str], type[nn.Module]] = {}
    for layer, path, module in probe.modules:
        if layer in layers and _holds_matrix(module, deep) and _allowed(path, patterns):
            place = layer, _pattern(probe.stack.layers[layer], path)
            classes.setdefault(place, type(module))
    members: dict[tuple[int, str], dict[str, nn.Module]] = {}
    for layer in layers:
        for path, module in probe.stack.layers[layer].named_modules():
            # Experts that got no token of the probe are like those that were called.
            place = layer, _pattern(probe.stack.layers[layer], path)
            if classes.get(place) is type(module):
                members.setdefault(place, {})[path] = module
    for place in classes:
        yield ModuleGroup(*place, members[place])


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
    tensors = (*module.parameters(recurse=deep), *module.buffers(recurse=deep))
    return any(tensor.ndim >= 2 for tensor in tensors)
