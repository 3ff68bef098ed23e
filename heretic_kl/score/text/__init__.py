"""KL over plain text, as quantizers measure it: files cut into windows of tokens."""

from heretic_kl.score.text.documents import Document, load_documents
from heretic_kl.score.text.text_kl import TextKL

__all__ = ["Document", "TextKL", "load_documents"]
