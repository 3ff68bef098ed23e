"""A plan made permanent: merged model, LoRA adapter, card, reproduction file, upload to the hub.

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
from heretic_kl.export.folder import check_target, readable_size
from heretic_kl.export.hub.folder import saved_folder
from heretic_kl.export.hub.upload import Target, check_upload, upload
from heretic_kl.export.lora import portable_base, save_lora
from heretic_kl.export.merge import MergedSaved, save_merged
from heretic_kl.export.portable import portable, portable_text
from heretic_kl.export.reload import SavedForm, other_model, saved_model
from heretic_kl.export.reproduction_reader import Reproduction, read_reproduction
from heretic_kl.export.reproduction_writer import (
    LEARNED_FILE,
    file_index,
    write_card,
    write_reproduction,
)

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
    "Target",
    "check_target",
    "check_upload",
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
    "readable_size",
    "save_lora",
    "save_merged",
    "saved_folder",
    "saved_model",
    "stated_license",
    "upload",
    "write_card",
    "write_reproduction",
]
