"""A run, from settings to a saved edit. Prints nothing; observers are told what happens."""

from heretic_kl.run.session import Session

__all__ = ["Session"]
