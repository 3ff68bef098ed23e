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
