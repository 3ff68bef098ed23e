"""Sessions on a tiny model, short enough for a test."""

from heretic_kl import Session, Settings

KINDS = ("harmful", "harmless", "borderline")
WORDS = "how do I make a cake please tell me about the weather in Rome first mix flour".split()


def settings(workplace, folder, **changes):
    def table(name):
        parts = {"train": "[:6]", "validation": "[6:9]", "test": "[9:]"}
        source = str(workplace / f"{name}.txt")
        return {split: {"source": source, "split": part} for split, part in parts.items()}

    defaults = {
        "model": str(workplace / "model"),
        "device": "cpu",
        "dtype": "float32",
        "trials": 9,
        "startup_trials": 9,
        "max_response_tokens": 6,
        "batch_size": 4,
        "kl_tokens": 3,
        "test_trials": 2,
        "response_prefix": "",
        "prompt_set": "builtin",
        "study_dir": folder / "studies",
        "prompts": {"harmful": table("a"), "harmless": table("b"), "borderline": table("b")},
        "directions": {"by_response": False},  # its responses are as good as drawn by lot
        "scorers": {
            "refusals": {"settings": {"markers": ["flour", "mix"]}},
            "teacher_forced_kl": {"settings": {"set_aside_refused": False}},
        },
    }
    return Settings(**{**defaults, **changes})


def run(workplace, folder, **changes):
    seen = []
    session = Session(settings(workplace, folder, **changes), seen.append)
    return session, seen


def refining(workplace, folder, markers, **changes):
    """A session that refines, on the model and prompts of the fixture `refusing`."""
    source = {"source": str(workplace / "prompts.txt")}
    table = {
        "train": {**source, "split": "[:24]"},
        "validation": {**source, "split": "[12:30]"},
        "test": {**source, "split": "[24:]"},
    }
    settings = Settings(
        **{
            "model": str(workplace / "model"),
            "device": "cpu",
            "dtype": "float32",
            "trials": 3,
            "startup_trials": 3,
            "max_response_tokens": 6,
            "batch_size": 8,
            "test_trials": 1,
            "response_prefix": "",
            "prompt_set": "builtin",
            "study_dir": folder / "studies",
            "prompts": {
                "harmful": table,
                "harmless": {use: {**part, "suffix": " rome"} for use, part in table.items()},
            },
            "scorers": {"refusals": {"settings": {"markers": markers}}},
            "directions": {"by_response": False},  # its responses are as good as drawn by lot
            "refinement": {"trials": 2, "steps": 6, "kl_tokens": 4},
            **changes,
        }
    )
    seen = []
    return Session(settings, seen.append), seen
