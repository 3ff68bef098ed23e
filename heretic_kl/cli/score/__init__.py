"""`heretic-kl score`: any models against one reference. `settings.py` its flags, `run.py` the run,
`output.py` what comes out."""

from heretic_kl.cli.score.run import COMMAND

__all__ = ["COMMAND"]
