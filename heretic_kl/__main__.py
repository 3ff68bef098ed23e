"""`python -m heretic_kl` is the command `heretic-kl`. Holds nothing else."""

import sys

from heretic_kl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
