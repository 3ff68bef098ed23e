"""A tiny config of any model type. Builds no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heretic_kl.model.transformers_logging import quiet_transformers
from heretic_kl.testing.zoo.families import LEAVE, OVERRIDES, UNDECLARED_HEAD_SIZE
from heretic_kl.testing.zoo.shrink import DEPTHS, LAYERS, SIZES, VOCABULARY, tiny_settings

WIDTH = 64


def model_types() -> tuple[str, ...]:
    """Every model type that the installed transformers has a causal language model class for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(
    model_type: str,
    *,
    layers: int = LAYERS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
) -> Any:
    """A config whose model is tiny and still has every kind of layer that its family mixes.

    `layers` is exceeded where a family has more kinds of layers; `families.py` gives some families
    a number of their own. `width` must be a multiple of 16.
    """
    from transformers import CONFIG_MAPPING

    sizes = {"layers": layers, "width": width, "vocabulary": vocabulary}
    with quiet_transformers():  # some classes complain about their own defaults
        return _tiny(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}), sizes)


def _tiny(config_class: Any, overrides: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    default = config_class()
    nested_classes = config_class.sub_configs
    settings = tiny_settings(
        {
            name: value
            for name, value in default.to_dict().items()
            if name not in overrides and name not in nested_classes
        },
        **sizes,
    )
    for name in nested_classes:
        nested = getattr(default, name, None)
        if nested is not None:
            changes = {**OVERRIDES.get(nested.model_type, {}), **overrides.get(name, {})}
            settings[name] = _tiny(type(nested), changes, sizes)
    if config_class.model_type in UNDECLARED_HEAD_SIZE:
        settings["head_dim"] = SIZES["head_dim"]
    fixed_depth = any(name in overrides for name in DEPTHS)
    for name, value in overrides.items():
        if value is LEAVE or name in nested_classes:
            continue
        if isinstance(value, list) and len(value) == LAYERS and not fixed_depth:
            value = [value[index % LAYERS] for index in range(max(LAYERS, sizes["layers"]))]
        settings[name] = value
    return config_class(**settings)
