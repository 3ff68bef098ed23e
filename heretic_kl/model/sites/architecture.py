"""A causal language model seen as layers and sites. Knows nothing about prompts or edits.

Nothing is declared by family. Forward passes over a few tokens find the layers (`stack`), the
sites (`discovery`), the gain between a site and the residual stream (`output_gain`) and the
tensors that write (`writing_tensors`); `verification` checks them. What cannot be edited exactly
raises an error; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heretic_kl.ablation import Component, SiteFacts, SiteKey
from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.placement import device_of, in_memory, whole
from heretic_kl.model.sites.discovery import DiscoveredSite, find_sites, layer_constants
from heretic_kl.model.sites.output_gain import OutputGain
from heretic_kl.model.sites.probe import ROWS, TOKENS, Probe, probe_tokens
from heretic_kl.model.sites.stack import LayerStack, find_stack
from heretic_kl.model.sites.writing_tensors import Located, WritingTensor, writing_tensors

MAX_UNIT_INPUTS = 1024
"""Unit inputs in one call where a quantized weight is measured."""
Streams = Literal["one", "first", "third", "side by side"]


@dataclass(frozen=True)
class Site:
    """A module whose output is added to the residual stream."""

    key: SiteKey
    module: nn.Module
    tensors: tuple[WritingTensor, ...] = ()
    """Its weights and biases that write to the stream; none where they are quantized."""
    output_gain: OutputGain = OutputGain(None)
    """What is applied to its output on the way to the stream."""
    by_rows: bool = True
    """Its output is laid out sequence by sequence."""

    @property
    def device(self) -> torch.device:
        """Of its output."""
        return device_of(self.module)

    def matrix(self) -> WritingTensor | None:
        """The weight, where the site is one matrix; None: experts in one tensor, or quantized."""
        weights = [t for t in self.tensors if self.module.get_parameter(t.name).ndim > 1]
        if len(weights) != 1 or not weights[0].name.endswith("weight"):
            return None  # such as the experts of DBRX, one below the other in a tensor "w2"
        return weights[0] if self.module.get_parameter(weights[0].name).ndim == 2 else None

    def weight(self) -> Tensor:
        """(D, F): rows write to the residual stream; of a quantized site, the dequantized weight.

        Raises:
            UnsupportedModelError: the site is not one matrix.
        """
        matrix = self.matrix()
        if matrix is None and self.quantized_inputs:
            return self._measured_weight()
        if matrix is None:
            kind = type(self.module).__name__
            what = "is quantized" if not self.tensors else "holds several experts in one tensor"
            raise UnsupportedModelError(f"{self.key.path} ({kind}) {what}: it has no one weight")
        return matrix.vectors(self.stored(matrix)).T

    def stored(self, tensor: WritingTensor) -> Tensor:
        """One of the site's tensors, whole; where it is sharded, every process asks for it."""
        with in_memory(self.module):
            return whole(self.module.get_parameter(tensor.name).detach())

    @property
    def quantized_inputs(self) -> int:
        """F of a quantized matrix; 0: the site is not one."""
        plain = any(self.module.get_parameter(t.name).ndim > 1 for t in self.tensors)
        return 0 if plain else int(getattr(self.module, "in_features", 0))

    @torch.no_grad()
    def _measured_weight(self) -> Tensor:
        """(D, F) float32, from the outputs for unit inputs, whatever format the weight is in."""
        inputs = self.quantized_inputs
        dtype = getattr(self.module, "compute_dtype", None) or torch.float32
        units = torch.eye(inputs, dtype=dtype, device=self.device)
        constant = self.module(torch.zeros_like(units[:1])).float()
        columns = [
            self.module(block).float() - constant for block in torch.split(units, MAX_UNIT_INPUTS)
        ]
        return torch.cat(columns).T

    def bias(self) -> Tensor | None:
        """(D,), or None."""
        for tensor in self.tensors:
            if self.module.get_parameter(tensor.name).ndim == 1:
                return self.stored(tensor)
        return None

    def facts(self) -> SiteFacts:
        """What building an operator needs to know of this site."""
        return SiteFacts(self.weight, self.bias, self.output_gain.gains, self.output_gain.centred)


@dataclass(frozen=True)
class Architecture:
    """Where a model's layers and sites are."""

    layers_path: str
    layer_names: tuple[str, ...]
    """Dotted path of each layer."""
    layers: tuple[nn.Module, ...]
    sites: tuple[Site, ...]
    width: int
    """D, the width of the residual stream."""
    streams: Streams = "one"
    """How layers pass the stream to each other: one stream, or several, along the first or third of
    four dimensions or side by side in the last of three."""
    shared: frozenset[SiteKey] = frozenset()
    """Sites whose module is part of several layers."""
    constant_layers: tuple[int, ...] = ()
    """Layers that also add a constant which no site writes, such as the bias of a norm on the
    stream: the same for every token, and not edited."""
    idle_layers: tuple[int, ...] = ()
    """Layers that do not run on text, such as those that attend to images."""
    _by_key: dict[SiteKey, Site] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._by_key.update({site.key: site for site in self.sites})

    def facts(self) -> dict[SiteKey, SiteFacts]:
        """Of every site, in layer order."""
        return {site.key: site.facts() for site in self.sites}

    def site(self, key: SiteKey) -> Site:
        """The site with this key."""
        return self._by_key[key]

    @property
    def components(self) -> frozenset[Component]:
        """The components that have sites."""
        return frozenset(site.key.component for site in self.sites)

    def norm_problem(self, components: Collection[Component]) -> str | None:
        """Why the row norms of the components' weights cannot be restored; None: they can."""
        for site in self.sites:
            if site.key.component not in components:
                continue
            if site.output_gain.gains is not None or site.output_gain.centred:
                return f"{site.key.path} writes through a norm or scale, which undoes row norms"
            if site.matrix() is None:
                quantized = site.quantized_inputs or not site.tensors
                what = "is quantized" if quantized else "holds many experts in one tensor"
                return f"{site.key.path} {what}"
        return None

    def editable(
        self, components: Sequence[Component], *, restore_norms: bool
    ) -> tuple[Component, ...]:
        """Those of the components that this model has.

        Raises:
            UnsupportedModelError: it has none of them, or row norms cannot be restored.
        """
        present = tuple(component for component in components if component in self.components)
        if not present:
            raise UnsupportedModelError(
                f"this model has no {' or '.join(components)} modules to edit, only "
                f"{' and '.join(sorted(self.components))}: set edit.components"
            )
        problem = self.norm_problem(present) if restore_norms else None
        if problem is not None:
            raise UnsupportedModelError(f"only edit.norm none is possible here: {problem}")
        return present

    def remarks(self) -> list[str]:
        """What a user should know about how this model can be edited."""
        remarks = []
        if not self.by_rows:
            remarks.append("this model mixes the rows of a batch: candidates run one by one")
        if self.constant_layers:
            remarks.append(
                f"{len(self.constant_layers)} layers add a constant that no site writes (biases "
                "outside the sites); it is not edited"
            )
        if self.idle_layers:
            remarks.append(
                f"{len(self.idle_layers)} layers do not run on text; they are not edited"
            )
        return remarks

    @cached_property
    def by_rows(self) -> bool:
        """Whether sequences of one batch can be edited differently."""
        return all(site.by_rows for site in self.sites)

    def stream(self, hidden: Tensor) -> Tensor:
        """A layer's output as one stream (B, T, D): the mean, where there are several."""
        if self.streams == "one":
            return hidden
        if self.streams == "side by side":
            return hidden.reshape(*hidden.shape[:-1], -1, self.width).mean(dim=-2)
        return hidden.mean(dim=0 if self.streams == "first" else 2)


def find_architecture(
    model: Any, width: int, *, layers: str | None = None, sites: Sequence[str] = ()
) -> Architecture:
    """Locate layers and sites.

    Args:
        model: a `transformers` causal LM in evaluation mode.
        width: D, the width of its residual stream.
        layers: dotted path of the list of layers; None: it is found.
        sites: shell patterns of module paths inside a layer; where given, no other module is
            considered.

    Raises:
        UnsupportedModelError: there is no list of layers, or a layer changes the residual stream
            by other means than modules that can be edited.
    """
    probe = probe_layers(model, width, layers)
    discovered = find_sites(probe, tuple(sites))
    if not discovered:
        raise UnsupportedModelError(
            f"no module of {type(model).__name__} writes to its residual stream"
            + (f" among {', '.join(sites)}" if sites else "")
        )
    tensors = writing_tensors(probe, [Located(site.layer, site.path) for site in discovered])
    by_module: dict[nn.Module, Site] = {}
    shared: set[SiteKey] = set()
    for writer in discovered:
        site = _site(probe.stack, writer, tensors[Located(writer.layer, writer.path)])
        if site.module in by_module:  # a module of several layers is one site, of the first layer
            shared.add(by_module[site.module].key)
        else:
            by_module[site.module] = site
    return Architecture(
        layers_path=probe.stack.path,
        layer_names=probe.stack.names,
        layers=probe.stack.layers,
        sites=tuple(by_module.values()),
        width=width,
        streams=_streams(probe),
        shared=frozenset(shared),
        constant_layers=_constant_layers(probe, discovered),
        idle_layers=tuple(
            sorted(set(range(len(probe.stack.layers))) - {c.layer for c in probe.calls})
        ),
    )


def probe_layers(model: Any, width: int, layers: str | None = None) -> Probe:
    """The model's layers, ready for examination."""
    tokens = probe_tokens(model)

    @torch.no_grad()
    def run() -> None:
        model.base_model(input_ids=tokens, use_cache=False)

    return Probe(model, find_stack(model, width, run, path=layers), width)


def _site(
    stack: LayerStack, discovered: DiscoveredSite, tensors: tuple[WritingTensor, ...]
) -> Site:
    path = f"{stack.names[discovered.layer]}.{discovered.path}"
    if discovered.output_gain.problem is not None:
        raise UnsupportedModelError(
            f"{path} ({type(discovered.module).__name__}) writes to the residual stream, but "
            f"{discovered.output_gain.problem}: it cannot be edited exactly"
        )
    key = SiteKey(discovered.layer, discovered.component, path)
    return Site(key, discovered.module, tensors, discovered.output_gain, discovered.by_rows)


def _constant_layers(probe: Probe, sites: Sequence[DiscoveredSite]) -> tuple[int, ...]:
    constants = layer_constants(probe, {(site.layer, site.module) for site in sites})
    pairs = zip(probe.calls, constants, strict=True)
    return tuple(sorted({call.layer for call, constant in pairs if constant is not None}))


def _streams(probe: Probe) -> Streams:
    stream = probe.calls[0].stream_in
    if stream.ndim == 3:
        return "one" if stream.shape[-1] == probe.width else "side by side"
    return "third" if stream.shape[:2] == (ROWS, TOKENS) else "first"
