"""The command on a card, read by the real parser, gives the settings that made the trial."""

import shlex

import pytest

from heretic_kl import Settings
from heretic_kl.config import load_settings
from heretic_kl.engine import Calibration, NoiseFloor
from heretic_kl.run.saving.command import NOT_THE_TRIAL, reproducing_command

SETTINGS = {
    "plain": {},
    "values": {
        "startup_trials": 7,
        "seed": 3,
        "max_response_tokens": 17,
        "parallel_candidates": 4,
        "enable_thinking": False,
        "chat_template": "none",
        "chat_template_kwargs": {"effort": "low", "tools": ["a b"]},
        "quantization": "bnb_4bit",
        "save_dtype": "bfloat16",
    },
    "tables": {
        "edit": {"norm": "row", "components": ("mlp",), "sites": ("*.o_proj", "mlp.down_proj")},
        "directions": {"winsorize_quantile": 0.95, "project_off_harmless": True},
        "prompts": {
            "harmful": {"train": {"limit": 40, "prefix": "> ", "more": [{"source": "org/b"}]}},
            "harmless": {"validation": {"source": "org/set", "split": "test[:9]", "column": "q"}},
        },
    },
    "scorers": {
        "scorers": {
            "refusals": {"settings": {"markers": ["no, thanks", 'it\'s "out"']}},
            "teacher_forced_kl": {"settings": {"kl_target": 0.02, "response": "sampled(3)"}},
            "false_refusals": {"enabled": False},
            "my_kl_2": {
                "use": "teacher_forced_kl",
                "role": "monitor",
                "settings": {"kl_tokens": 8, "set_aside_refused": False},
            },
        }
    },
    "awkward text": {
        "response_prefix": "<think>\n</think>\n",
        "prompts": {"harmful": {"train": {"suffix": " /no_think", "system": "-5"}}},
    },
}


def calibration(**changes):
    values = {
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": 2,
        "batch_size": 24,
        "response_prefix": "",
        "noise_floor": NoiseFloor(1e-9, 1e-6),
        "site_residue": 0.0,
    }
    return Calibration(**{**values, **changes})


def command(settings, **changes):
    values = {
        "base": "org/model",
        "revision": "abc123",
        "prompt_set": "builtin",
        "trial": 12,
        "refined": False,
        "name": "edited",
        "form": "merged",
    }
    prefix = settings.response_prefix or ""
    return reproducing_command(
        settings, calibration(response_prefix=prefix), **{**values, **changes}
    )


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_printed_command_reproduces_the_trial(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings(model="org/model", trials=40, racing=False, **changes)
    program, *words = shlex.split(command(settings))
    assert program == "heretic-kl"
    again = load_settings(words)
    expected = settings.model_dump()
    expected.update(dtype="bfloat16", batch_size=24, prompt_set="builtin")
    expected["response_prefix"] = settings.response_prefix or ""
    ours = again.model_dump()
    for name in expected.keys() - NOT_THE_TRIAL:
        assert ours[name] == expected[name], name
    assert (again.model, again.revision, again.trials) == ("org/model", "abc123", 40)
    assert (again.pick, str(again.save)) == ("trial=12", "edited")


def test_the_study_of_the_command_is_long_enough_to_hold_the_trial():
    words = shlex.split(command(Settings(model="m", trials=5), trial=30, form="lora"))
    again = load_settings(words[1:])
    assert again.trials == 31
    refined = command(Settings(model="m", trials=5), trial=30, refined=True)
    assert load_settings(shlex.split(refined)[1:]).trials == 5  # refined trials come on top
    assert again.save_as == "lora"


def test_the_command_names_no_folder_of_this_machine():
    settings = Settings(
        model="m",
        chat_template="/home/me/templates/chat.jinja",
        scorers={"mine": {"use": "/home/me/scorers/mine.py:Mine"}},
        study_dir="/home/me/studies",
        storage="postgresql://me:secret@host/db",
    )
    line = command(settings)
    assert "/home" not in line and "secret" not in line
    assert "--chat-template chat.jinja" in line and "mine.py:Mine" in line
