"""Where the plug-in for Heretic is: `python -m heretic_kl.integrations`. Imports no Heretic."""

import sys

from heretic_kl.integrations import HERETIC_PLUGIN

if __name__ == "__main__":
    sys.stdout.write(f"{HERETIC_PLUGIN}\n")
