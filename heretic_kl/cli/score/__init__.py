"""`heretic-kl score`: its flags in `settings.py`, measuring in `run.py`, results in `output.py`."""

from heretic_kl.cli.score.run import COMMAND

__all__ = ["COMMAND"]
