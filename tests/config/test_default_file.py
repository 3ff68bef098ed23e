"""config.default.toml and both helps say what the code does."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from loading import load

from heretic_kl.cli.config import default_configuration
from heretic_kl.cli.edits.evaluate import EvaluateSettings
from heretic_kl.cli.edits.reproduce import ReproduceSettings
from heretic_kl.cli.inspect import InspectSettings
from heretic_kl.cli.score.settings import ScoreSettings
from heretic_kl.cli.study.settings import BenchSettings, SaveSettings, ShowSettings, TrialsSettings
from heretic_kl.config import ProgramSettings, Settings, load_settings
from heretic_kl.config.default_file import default_config_toml, toml_value
from heretic_kl.config.help import settings_help
from heretic_kl.config.keys import leaves, spell_flag, spell_key
from heretic_kl.config.presets import DEMO_PRESET

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


ROOT = Path(__file__).parents[2]


def test_config_default_toml_is_what_the_code_says() -> None:
    """After a change: `python -m heretic_kl config > config.default.toml`."""
    assert (ROOT / "config.default.toml").read_text(encoding="utf-8") == default_configuration()


def test_the_documented_defaults_are_the_defaults() -> None:
    assert load(toml=default_config_toml()) == load_settings([])
    # Optional settings are there too, commented out, with an example that is valid.
    examples = re.sub(r"^# (?=[\w.]+ = )", "", default_config_toml(), flags=re.MULTILINE)
    settings = load(toml=examples)
    assert (settings.model, settings.prompts.harmful.train.limit) == (
        "Qwen/Qwen3-4B-Instruct-2507",
        100,
    )
    for path, info in leaves(Settings):
        key = spell_key(path).replace("NAME", "refusals").replace("s.harmless", "s.harmful")
        key = (
            key.replace("borderline", "harmful")
            .replace("validation", "train")
            .replace("test.", "train.")
        )
        elsewhere = path[-1] in ("settings", "more")  # docs/settings.md
        assert f"\n{key} = " in examples or elsewhere, key
        assert info.description, path


def test_the_default_file_fits_on_two_screens() -> None:
    lines = default_configuration().splitlines()
    assert len(lines) <= 128 and max(map(len, lines)) <= 100
    assert next(line for line in lines if " = " in line).startswith("# model = ")
    headings = [line.split()[2] for line in lines if line.startswith("# ---- ")]
    assert headings[0] == "Basics" and headings[-1] == "Performance"


def test_scorers_settings_are_documented_by_the_hook() -> None:
    text = default_config_toml(
        {"refusals": {"markers": (["a", 'b "c"'], "Phrases."), "limit": (None, "No limit.")}}
    )
    assert tomllib.loads(text)["scorers"]["refusals"]["settings"] == {"markers": ["a", 'b "c"']}
    assert re.search(r'settings.markers = \["a", "b \\"c\\""\] +# Phrases\n', text)
    assert re.search(r"# scorers.refusals.settings.limit = +# No limit\n", text)


@pytest.mark.parametrize(
    "value",
    [True, 0, 1.5, 1e-9, "", 'a"\\\n\x7fé', [], ["a" * 60, "b" * 60], {"a": [1], "b c": {}}],
)
def test_toml_values_read_back(value: Any) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


def test_help_all_lists_every_setting_with_its_default() -> None:
    text = settings_help(Settings, everything=True)
    for path, info in leaves(Settings):
        if path[0] == "prompts":
            path = ("prompts", "KIND", "USE", path[-1])
        flag = spell_flag(path if path[-1] != "source" else path[:-1])
        assert (f"--no-{flag[2:]}" if info.default is True else flag) in text, path
    assert "[3]" in text and "[attention,mlp]" in text
    preset = settings_help(Settings, everything=True, preset=DEMO_PRESET)
    assert "[heretic-kl-demo/model]" in preset
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    "kind",
    [
        Settings,
        InspectSettings,
        ScoreSettings,
        TrialsSettings,
        ShowSettings,
        SaveSettings,
        ReproduceSettings,
        EvaluateSettings,
        BenchSettings,
    ],
)
def test_every_setting_stands_below_one_heading(kind: type[ProgramSettings]) -> None:
    listed = [name for names in kind.headings.values() for name in names]
    assert sorted(listed) == sorted(kind.model_fields)
    assert set(kind.shown_first) <= set(kind.headings)


def test_help_shows_what_people_use_first() -> None:
    lines = settings_help(Settings, everything=False).splitlines()
    flags = [line for line in lines if line.startswith("  -")]
    assert 10 <= len(flags) <= 15 and "  -m, --model MODEL" in flags[0]
