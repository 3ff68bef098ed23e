"""What a loaded model is made of and what an edit of it reaches, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from heretic_kl.ablation import Component
from heretic_kl.model.forward.prefix_cache import layer_bytes, new_cache
from heretic_kl.model.language_model import LanguageModel
from heretic_kl.model.sites.architecture import Site
from heretic_kl.model.sites.probe import probe_tokens
from heretic_kl.model.sites.verification import verify_sites


@dataclass(frozen=True)
class TensorFacts:
    """A tensor that writes to the residual stream."""

    name: str
    """Inside its module."""
    shape: tuple[int, ...]
    dtype: str
    axis: int
    """The axis that is D long and writes."""


@dataclass(frozen=True)
class SiteGroup:
    """Sites that have the same path in their layers."""

    place: str
    """Path inside a layer, a star for the number of an expert."""
    module: str
    """Class."""
    component: Component
    layers: tuple[int, ...]
    sites: int
    tensors: tuple[TensorFacts, ...]
    """Of the first site; no weight where it is quantized."""
    quantized: bool
    gains: int
    """Vectors of gains between site and stream: 0 for none, 1 for a norm or a scale, more for a
    short convolution."""
    centred: bool
    """One of them is a LayerNorm."""
    by_rows: bool
    """Different sequences of a batch can be edited differently."""


@dataclass(frozen=True)
class ModelInspection:
    """Everything `heretic-kl inspect` shows."""

    model: str
    """Class."""
    model_type: str
    parameters: int
    width: int
    vocabulary: int
    dtype: str
    stored_dtype: str
    device: str
    chat_template: bool
    layers_path: str
    layers: int
    streams: str
    constant_layers: tuple[int, ...]
    sites: tuple[SiteGroup, ...]
    residue: float
    """Largest share of a removed direction that any layer still adds."""
    residue_layer: int
    norm_problem: str | None
    """Why the norm-restoring modes are not possible; None: they are."""
    edited_parameters: int
    """Numbers in the writing tensors."""
    weight_bytes: int
    cache_bytes_per_token: int | None
    """Keys, values and states of one more token of one sequence; None: no cache to measure."""
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def inspect_model(lm: LanguageModel) -> ModelInspection:
    """Verify the sites and describe them.

    Raises:
        UnsupportedModelError: see `verify_sites`.
    """
    architecture = lm.architecture
    verification = verify_sites(lm)
    config = lm.model.config
    parameters = list(lm.model.parameters())
    return ModelInspection(
        model=type(lm.model).__name__,
        model_type=str(config.model_type),
        parameters=lm.parameter_count,
        width=architecture.width,
        vocabulary=int(lm.head.weight.shape[0]),
        dtype=lm.dtype_name,
        stored_dtype=str(lm.stored_dtype).removeprefix("torch."),
        device=str(lm.device),
        chat_template=lm.chat.template is not None,
        layers_path=architecture.layers_path,
        layers=len(architecture.layers),
        streams=architecture.streams,
        constant_layers=architecture.constant_layers,
        sites=_groups(architecture.sites, architecture.layer_names),
        residue=verification.residue,
        residue_layer=verification.layer,
        norm_problem=architecture.norm_problem(architecture.components),
        edited_parameters=sum(
            site.module.get_parameter(tensor.name).numel()
            for site in architecture.sites
            for tensor in site.tensors
        ),
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        cache_bytes_per_token=_cache_bytes_per_token(lm),
        remarks=tuple(lm.remarks()),
    )


def _groups(sites: Sequence[Site], names: Sequence[str]) -> tuple[SiteGroup, ...]:
    grouped: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        inside = site.key.path.removeprefix(f"{names[site.key.layer]}.")
        place = ".".join("*" if part.isdigit() else part for part in inside.split("."))
        kind = (place, type(site.module), site.key.component, _tensor_facts(site))
        grouped.setdefault((*kind, _gain_count(site), site.by_rows), []).append(site)
    return tuple(
        SiteGroup(
            place=str(kind[0]),
            module=type(group[0].module).__name__,
            component=group[0].key.component,
            layers=tuple(sorted({site.key.layer for site in group})),
            sites=len(group),
            tensors=_tensor_facts(group[0]),
            quantized=bool(group[0].quantized_inputs) or not group[0].tensors,
            gains=_gain_count(group[0]),
            centred=group[0].output_gain.centred,
            by_rows=group[0].by_rows,
        )
        for kind, group in grouped.items()
    )


def _gain_count(site: Site) -> int:
    return 0 if site.output_gain.gains is None else len(site.output_gain.gains)


def _tensor_facts(site: Site) -> tuple[TensorFacts, ...]:
    facts = []
    for tensor in site.tensors:
        stored = site.module.get_parameter(tensor.name)
        dtype = str(stored.dtype).removeprefix("torch.")
        facts.append(TensorFacts(tensor.name, tuple(stored.shape), dtype, tensor.axis))
    return tuple(facts)


@torch.no_grad()
def _cache_bytes_per_token(lm: LanguageModel) -> int | None:
    """Measured as the growth of a cache; recurrent states do not grow and count 0."""

    def size(tokens: int) -> int:
        cache = new_cache(lm)
        ids = probe_tokens(lm.model)[:1, :tokens]
        lm.body(input_ids=ids, use_cache=True, **{lm.capabilities.cache_argument: cache})
        return layer_bytes(cache.layers)

    try:
        return (size(10) - size(5)) // 5
    except Exception:  # caches of unusual models raise whatever they like
        return None
