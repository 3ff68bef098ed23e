"""Which model types are decoder-only text language models, and why the others are not.

The rule, in this order:

1. `DECLARED`, for facts that no config states: byte models, drafters that read another model's
   cache, models that only transcribe or caption, permutation and masked language models, a decoder
   for images without a vision config;
2. `is_encoder_decoder` in the config: the causal class is the decoder half of a pair;
3. `is_decoder` *and* `add_cross_attention` among the config's settings: an encoder that attends
   both ways unless `is_decoder` is set (GPT-NeoX has only the first, GPT-2 the second);
4. everything else is a decoder. Its class may carry towers for images or sound (`towers`): then it
   still runs on text alone, and its language model is a decoder nested in it.

The tests measure that decoders are causal and encoders are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from heretic_kl.model.transformers_logging import quiet_transformers

KindName = Literal["decoder", "encoder_decoder", "encoder_only", "other"]


class Kind(NamedTuple):
    """What a model type is, and the reason in words."""

    name: KindName
    reason: str
    towers: bool = False
    """Its causal class also holds encoders of images or sound, unused when it runs on text."""


DECLARED: Mapping[str, Kind] = {
    "blt": Kind("other", "reads bytes: patches them with an entropy model, has no vocabulary"),
    "cpmant": Kind("other", "positions of one segment attend to each other both ways"),
    "fuyu": Kind("decoder", "a decoder inside a class that also sees", towers=True),
    "gemma4_assistant": Kind("other", "drafts for another model, whose keys and values it reads"),
    "gemma4_unified_assistant": Kind(
        "other", "drafts for another model, whose keys and values it reads"
    ),
    "git": Kind("other", "captions images", towers=True),
    "got_ocr2": Kind("other", "reads the text in images", towers=True),
    "moshi": Kind("other", "one stream of a spoken dialogue"),
    "moss_transcribe_diarize": Kind("other", "transcribes speech", towers=True),
    "reformer": Kind("encoder_only", "attends both ways unless `is_decoder`; hashes its attention"),
    "trocr": Kind("encoder_decoder", "the decoder half of a reader of images"),
    "xlm": Kind("other", "a masked language model, causal only if its config says so"),
    "xlnet": Kind("other", "a permutation language model, attends both ways by default"),
}
"""Model type -> what its config does not state."""

_TOWERS = ("vision_config", "audio_config")


@cache
def kind_of(model_type: str) -> Kind:
    """What the causal language model class of a model type is; the module states the rule."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if model_type in DECLARED:
        return DECLARED[model_type]
    config_class: Any = CONFIG_MAPPING[model_type]
    with quiet_transformers():  # some classes complain about their own defaults
        config = config_class()
    settings = config.to_dict()
    if config.is_encoder_decoder:
        return Kind("encoder_decoder", "the decoder half of an encoder-decoder")
    if "is_decoder" in settings and "add_cross_attention" in settings:
        return Kind("encoder_only", "an encoder, causal only with `is_decoder`")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    if model_class.config_class is config_class and any(
        name in config_class.sub_configs for name in _TOWERS
    ):
        return Kind("decoder", "a decoder inside a class that also sees or hears", towers=True)
    return Kind("decoder", "decoder-only text language model")
