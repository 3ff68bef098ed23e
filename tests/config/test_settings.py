"""Precedence, merging and types of settings."""

from pathlib import Path
from typing import Any

import pytest
from loading import load
from pydantic import ValidationError

from heretic_kl.config import DEFAULT_SCORERS, Settings, load_settings
from heretic_kl.config.keys import locate
from heretic_kl.config.presets import DEMO_PRESET
from heretic_kl.errors import ConfigError


def test_command_line_over_environment_over_file_over_preset_over_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("config.toml").write_text("seed = 3\nthreads = 3\ntrials = 3\n", encoding="utf-8")
    monkeypatch.setenv("HERETIC_KL_SEED", "4")
    monkeypatch.setenv("HERETIC_KL_THREADS", "4")
    settings = load_settings(
        ["--seed", "5"],
        defaults={"seed": 2, "threads": 2, "trials": 2, "test_trials": 2},
    )
    values = (
        settings.seed,
        settings.threads,
        settings.trials,
        settings.test_trials,
        settings.kl_tokens,
    )
    assert values == (5, 4, 3, 2, 3)


def test_config_file_flag_takes_the_place_of_config_toml() -> None:
    Path("other.toml").write_text("seed = 7\n", encoding="utf-8")
    settings = load("--config", "other.toml", toml="seed = 1\nthreads = 2\n")
    assert (settings.seed, settings.threads) == (7, 0)


def test_tables_merge_with_lower_sources() -> None:
    settings = load(
        "--edit.norm=row",
        "--scorers.refusals.settings.limit",
        "0.5",
        toml='[edit]\ncomponents = ["mlp"]\n'
        '[scorers.refusals.settings]\nmarkers = ["a"]\n[scorers.mine]\nuse = "f.py:Mine"\n',
        env={
            "HERETIC_KL_PROMPTS__HARMFUL__TRAIN__SOURCE": "x.txt",
            "HERETIC_KL_SCORERS__TEACHER_FORCED_KL__ROLE": "monitor",
        },
    )
    assert (settings.edit.norm, settings.edit.components) == ("row", ("mlp",))
    assert list(settings.scorers) == [*DEFAULT_SCORERS, "mine"]
    assert settings.scorers["refusals"].settings == {"markers": ["a"], "limit": 0.5}
    assert settings.scorers["teacher_forced_kl"].role == "monitor"
    assert settings.scorers["false_refusals"].role == "monitor"
    assert (settings.scorers["mine"].use, settings.scorers["mine"].role) == (
        "f.py:Mine",
        "minimize",
    )
    assert settings.prompts.harmful.train.source == "x.txt"
    assert settings.prompts.harmful.validation.source is None


def test_settings_alone_read_neither_environment_nor_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config.toml").write_text("seed = 3\n", encoding="utf-8")
    monkeypatch.setenv("HERETIC_KL_THREADS", "3")
    settings = Settings(model="x", scorers={"refusals": {"enabled": False}})  # type: ignore[dict-item]
    assert (settings.seed, settings.threads) == (0, 0)
    assert list(settings.scorers) == list(DEFAULT_SCORERS)
    assert not settings.scorers["refusals"].enabled
    assert load_settings([]).threads == 3  # the real environment by default


def test_settings_are_frozen_and_of_real_types() -> None:
    settings = load("--save", "~/out", "--enable-thinking")
    assert settings.save == Path.home() / "out" and settings.study_dir == Path("studies")
    assert settings.enable_thinking is True
    with pytest.raises(ValidationError):
        settings.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.edit.norm = "row"  # type: ignore[misc]


def test_the_demo_preset_is_valid() -> None:
    settings = load_settings([], defaults=DEMO_PRESET)
    assert settings.save == Path("heretic-kl-demo/model") and settings.prompt_set == "builtin"
    with pytest.raises(ConfigError, match=r"unknown setting tirals \(the preset\).*mean trials"):
        load_settings([], defaults={"tirals": 1})


@pytest.mark.parametrize(
    ("argv", "path", "expected"),
    [
        ("--quiet", "quiet", True),
        ("--no-quiet", "quiet", False),
        ("-q", "quiet", True),
        ("--quiet=true", "quiet", True),
        ("--quiet false", "quiet", False),
        ("-n 3", "trials", 3),
        ("-m=x", "model", "x"),
        ("--model=x", "model", "x"),
        ("-o out", "save", Path("out")),
        ('--chat-template-kwargs {"effort":"low"}', "chat_template_kwargs", {"effort": "low"}),
        ("--edit.components attention mlp", "edit.components", ("attention", "mlp")),
        ("--prompts.harmful.train p.txt", "prompts.harmful.train.source", "p.txt"),
        ("--seed -0", "seed", 0),
        ("--no-enable-thinking", "enable_thinking", False),
        ("--directions.project-off-harmless", "directions.project_off_harmless", True),
        ("--edit.components mlp", "edit.components", ("mlp",)),
        ("--edit.components mlp,attention", "edit.components", ("mlp", "attention")),
        ('--edit.components ["mlp"]', "edit.components", ("mlp",)),
        (
            "--edit.components mlp --edit.components attention",
            "edit.components",
            ("mlp", "attention"),
        ),
        ('--edit {"norm":"row"}', "edit.norm", "row"),
        ("--kl-tokens=8 --kl-tokens 9", "kl_tokens", 9),
        ("--prompts.harmless.test.suffix=--x", "prompts.harmless.test.suffix", "--x"),
        ("--response-prefix=", "response_prefix", ""),
        ("--model null", "model", None),
        ("--no-scorers.refusals.enabled", "scorers.refusals.enabled", False),
        ("--scorers.teacher-forced-kl.role monitor", "scorers.teacher_forced_kl.role", "monitor"),
        ('--scorers.x.settings {"a":1}', "scorers.x.settings", {"a": 1}),
        ('--scorers.x.settings.a-b ["c"]', "scorers.x.settings", {"a_b": ["c"]}),
        ("--scorers.x.settings.a.b c", "scorers.x.settings", {"a": {"b": "c"}}),
        ("--scorers.x.settings.a NaN", "scorers.x.settings", {"a": "NaN"}),
    ],
)
def test_flags(argv: str, path: str, expected: Any) -> None:
    value: Any = load(*argv.split(" "), toml='model = "m"')
    for key in path.split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    assert value == expected and type(value) is type(expected)


def test_environment_values_are_parsed_as_flags_are() -> None:
    settings = load(
        env={
            "HERETIC_KL_EDIT": '{"norm": "row"}',
            "HERETIC_KL_EDIT__COMPONENTS": "mlp",
            "heretic_kl_quiet": "1",
            "HERETIC_KL_SCORERS__REFUSALS__SETTINGS__MARKERS": '["a"]',
            "HERETIC_KL_CACHE": "/x",
            "HERETIC_KL_DEMO_WHEEL": "/y",
            "HERETIC": "z",
        }
    )
    assert (settings.edit.norm, settings.edit.components, settings.quiet) == ("row", ("mlp",), True)
    assert settings.scorers["refusals"].settings == {"markers": ["a"]}


def test_locate() -> None:
    assert locate(Settings, ("edit", "norm")).kind == "leaf"
    assert locate(Settings, ("scorers",)).kind == "table"
    assert locate(Settings, ("scorers", "x")).kind == "table"
    assert locate(Settings, ("scorers", "x", "settings", "a")).kind == "open"
    assert locate(Settings, ("edit", "norm", "x")).kind == "unknown"
