"""A plan made permanent on disk: merged model, LoRA adapter, model card, reproduction file.

Dimensions: D residual width, F input width of a site, r rank of an adapter.
"""

from heretic_kl.export.card import model_card
from heretic_kl.export.card_figures import CardPicture, add_figures
from heretic_kl.export.checkpoint import original_commit
from heretic_kl.export.facts import (
    ExportFacts,
    LoraFacts,
    PromptFacts,
    ScoreFacts,
    installed_versions,
    machine,
    stated_license,
)
from heretic_kl.export.folder import check_target
from heretic_kl.export.lora import portable_base, save_lora
from heretic_kl.export.merge import MergedSaved, save_merged
from heretic_kl.export.portable import portable, portable_text
from heretic_kl.export.reload import SavedForm, other_model, saved_model
from heretic_kl.export.reproduce import LEARNED_FILE, file_index, write_card, write_reproduction
from heretic_kl.export.reproduction import Reproduction, read_reproduction

__all__ = [
    "CardPicture",
    "add_figures",
    "LEARNED_FILE",
    "ExportFacts",
    "LoraFacts",
    "MergedSaved",
    "PromptFacts",
    "Reproduction",
    "SavedForm",
    "ScoreFacts",
    "check_target",
    "file_index",
    "installed_versions",
    "machine",
    "model_card",
    "original_commit",
    "other_model",
    "portable",
    "portable_base",
    "portable_text",
    "read_reproduction",
    "save_lora",
    "save_merged",
    "saved_model",
    "stated_license",
    "write_card",
    "write_reproduction",
]
