"""The model that a run edits: a causal model whose layers and sites are known. Loads nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from heretic_kl.model.causal_model import CausalModel
from heretic_kl.model.loading.quantization import Quantization
from heretic_kl.model.loading.source import ModelSource
from heretic_kl.model.placement import is_offloaded
from heretic_kl.model.sites.architecture import Architecture


@dataclass(frozen=True)
class LanguageModel(CausalModel):
    """A causal model in evaluation mode, gradients off, whose layers and sites are known."""

    source: ModelSource
    architecture: Architecture
    stored_dtype: torch.dtype
    """What its checkpoint is stored in."""
    quantization: Quantization = "none"
    """Applied as it was loaded; its checkpoint is not quantized."""

    def remarks(self, *, plain_text_wanted: bool = False) -> list[str]:
        """What a user should know about how this model is prompted and can be edited."""
        remarks = self.architecture.remarks()
        if is_offloaded(self.model):
            share = sum(p.numel() for p in self.model.parameters() if p.device.type == "meta")
            remarks.append(
                f"parts of the model are offloaded ({share / self.parameter_count:.0%} of its "
                "weights): every pass loads them, which is slow"
            )
        if self.chat.template is None and not plain_text_wanted:
            remarks.insert(
                0,
                "this model has no chat template: it is prompted with plain text "
                "(--chat-template FILE for a Jinja template, none to hide this remark)",
            )
        return remarks
