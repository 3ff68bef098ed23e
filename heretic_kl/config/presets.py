"""Settings that a command has in place of the defaults. Reads nothing."""

from typing import Any, Final

DEMO_PRESET: Final[dict[str, Any]] = {
    "kl_tokens": 3,
    "trials": 16,
    "minutes": 8,  # what is left undone then on a slow machine; a fast one needs less
    "max_response_tokens": 32,
    "prompt_set": "builtin",
    # Of 100 responses three may refuse where 5% must be likely, of 64 one, of fewer none.
    "prompts": {
        kind: {"train": {"limit": 96}, "validation": {"limit": count}}
        for kind, count in (("harmful", 100), ("harmless", 40), ("borderline", 40))
    },
    "test_trials": 3,
    "study_dir": "heretic-kl-demo/studies",
    "save": "heretic-kl-demo/model",
    "overwrite": True,
    "pick": "likely-refusals=0.05",
}
"""What `heretic-kl demo` sets below config.toml, the environment and the command line."""
