"""A causal language model seen as layers and sites. Knows nothing about prompts or edits.

Families are declared: where their layers stand, which modules of a layer write to the residual
stream, and which norm, if any, stands between. A layout that is not declared raises, listing
what was tried; nothing is skipped in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heretic_kl.ablation import Component, SiteFacts, SiteKey
from heretic_kl.errors import UnsupportedModelError

LAYER_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "model.decoder.layers",
    "transformer.h",
    "gpt_neox.layers",
    "transformer.layers",
    "transformer.blocks",
    "backbone.layers",
)
"""Where the list of layers stands, tried in order."""

SITE_PATHS: dict[Component, tuple[str, ...]] = {
    "attention": (
        "self_attn.o_proj",
        "self_attn.out_proj",
        "self_attn.dense",
        "self_attention.dense",
        "attention.o_proj",
        "attention.dense",
        "attention.wo",
        "attn.o_proj",
        "attn.c_proj",
        "attn.out_proj",
    ),
    "mlp": (
        "mlp.down_proj",
        "mlp.c_proj",
        "mlp.fc2",
        "mlp.fc_out",
        "mlp.dense_4h_to_h",
        "feed_forward.w2",
        "feed_forward.down_proj",
        "fc2",
    ),
}
"""Modules of a layer that write to the residual stream, tried in order."""

POST_NORM_PATHS: tuple[dict[Component, str], ...] = (
    # Gemma 2 and 3, OLMo 2 and 3
    {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    # GLM-4
    {"attention": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"},
)
"""Norms between a site and the residual stream; a layer has them if it has both of a pair."""


@dataclass(frozen=True)
class Site:
    """A module whose output is added to the residual stream."""

    key: SiteKey
    module: nn.Module
    post_norm: nn.Module | None = None

    def weight(self) -> Tensor:
        """(D, F): rows write to the residual stream."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)  # checked when the site was found
        return weight.detach().T if _is_conv1d(self.module) else weight.detach()

    def bias(self) -> Tensor | None:
        """(D,), or None."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @torch.no_grad()
    def facts(self) -> SiteFacts:
        """What building an operator needs to know of this site."""
        gain = None
        if self.post_norm is not None:
            # A root-mean-square norm maps the all-ones vector to its gain, whatever form the
            # gain is stored in (Gemma stores gain - 1).
            width = self.weight().shape[0]
            ones = torch.ones(1, width, dtype=self.weight().dtype, device=self.weight().device)
            gain = self.post_norm(ones)[0].float()
        return SiteFacts(weight=self.weight, bias=self.bias, gain=gain)


@dataclass(frozen=True)
class Architecture:
    """Where a model's layers and sites are."""

    layers_path: str
    layers: tuple[nn.Module, ...]
    sites: tuple[Site, ...]
    width: int
    """D, the width of the residual stream."""

    def facts(self) -> dict[SiteKey, SiteFacts]:
        """Facts of every site, in layer order."""
        return {site.key: site.facts() for site in self.sites}

    def site(self, key: SiteKey) -> Site:
        """The site of a key."""
        for site in self.sites:
            if site.key == key:
                return site
        raise KeyError(key)

    @property
    def components(self) -> frozenset[Component]:
        """The components that have sites."""
        return frozenset(site.key.component for site in self.sites)


def find_architecture(model: nn.Module, width: int) -> Architecture:
    """Locate layers and sites.

    Args:
        model: a causal language model.
        width: D, the width of its residual stream.

    Raises:
        UnsupportedModelError: no declared path leads to a list of layers, or a layer has no
            module of a component under a declared name, or such a module is not D wide.
    """
    layers_path, layers = _find_layers(model)
    sites = tuple(_find_sites(layers_path, list(layers), width))
    return Architecture(layers_path, tuple(layers), sites, width)


def find_layers(model: nn.Module) -> tuple[nn.Module, ...] | None:
    """The layers at a declared path, else the longest list of modules; None: there is none.

    Good enough to watch what passes from layer to layer; editing asks `find_architecture`.
    """
    try:
        return tuple(_find_layers(model)[1])
    except UnsupportedModelError:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        longest = max(lists, key=len, default=None)
        return tuple(longest) if longest is not None and _is_layer_list(longest) else None


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None."""
    current: nn.Module = root
    for name in path.split("."):
        child = getattr(current, name, None)
        if not isinstance(child, nn.Module):
            return None
        current = child
    return current


def _find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    for path in LAYER_PATHS:
        found = submodule(model, path)
        if isinstance(found, nn.ModuleList) and len(found) > 0:
            return path, found
    lists = [f"{name} ({len(m)})" for name, m in model.named_modules() if _is_layer_list(m)]
    raise UnsupportedModelError(
        f"no list of layers found in {type(model).__name__}: tried {', '.join(LAYER_PATHS)}; "
        f"its module lists are {', '.join(lists[:8]) or 'none'}"
    )


def _is_layer_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 1


def _find_sites(layers_path: str, layers: Sequence[nn.Module], width: int) -> Iterator[Site]:
    for index, layer in enumerate(layers):
        norms = _post_norms(layer)
        for component, paths in SITE_PATHS.items():
            found = [path for path in paths if submodule(layer, path) is not None]
            if not found:
                named = ", ".join(name for name, _ in layer.named_children())
                raise UnsupportedModelError(
                    f"layer {index} ({type(layer).__name__}) has no known {component} output: "
                    f"tried {', '.join(paths)}; the layer holds {named}"
                )
            module = submodule(layer, found[0])
            assert module is not None
            key = SiteKey(index, component, f"{layers_path}.{index}.{found[0]}")
            site = Site(key, module, norms.get(component))
            _check_width(site, width)
            yield site


def _post_norms(layer: nn.Module) -> dict[Component, nn.Module]:
    for pair in POST_NORM_PATHS:
        found = {component: submodule(layer, path) for component, path in pair.items()}
        present = {component: norm for component, norm in found.items() if norm is not None}
        if len(present) == len(pair):
            return present
    return {}


def _check_width(site: Site, width: int) -> None:
    weight = getattr(site.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"{site.key.path} ({type(site.module).__name__}) has no plain floating-point weight "
            "matrix; quantized checkpoints and fused experts are not supported yet"
        )
    if site.weight().shape[0] != width:
        raise UnsupportedModelError(
            f"{site.key.path} writes {site.weight().shape[0]} features, "
            f"but the residual stream has {width}"
        )


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D (GPT-2) stores (F, D); importing the class would load pytorch_utils.
    return type(module).__name__ == "Conv1D"
