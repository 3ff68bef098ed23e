"""Settings that a command has in place of the defaults. Reads nothing."""

from typing import Any, Final

DEMO_PRESET: Final[dict[str, Any]] = {
    "kl_tokens": 3,
    "trials": 16,
    "startup_trials": 11,
    "minutes": 8,  # what is left undone then on a slow machine; a fast one needs less
    "max_response_tokens": 32,
    "prompt_set": "builtin",
    "prompts": {
        kind: {"train": {"limit": 96}, "validation": {"limit": 40}}
        for kind in ("harmful", "harmless", "borderline")
    },
    "test_trials": 3,
    "study_dir": "heretic-kl-demo/studies",
    "save": "heretic-kl-demo/model",
    "overwrite": True,
    "pick": "likely-refusals=0.05",
}
"""What `heretic-kl demo` sets below config.toml, the environment and the command line."""
