"""Precedence, merging, and one line for every key or value that is wrong."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from heretic_kl.cli.config import default_configuration
from heretic_kl.cli.edits.evaluate import EvaluateSettings
from heretic_kl.cli.edits.reproduce import ReproduceSettings
from heretic_kl.cli.inspect import InspectSettings
from heretic_kl.cli.score.settings import ScoreSettings
from heretic_kl.cli.study.settings import BenchSettings, SaveSettings, ShowSettings, TrialsSettings
from heretic_kl.config import DEFAULT_SCORERS, ProgramSettings, Settings, load_settings
from heretic_kl.config.default_file import default_config_toml, toml_value
from heretic_kl.config.help import settings_help
from heretic_kl.config.keys import leaves, locate, spell_flag, spell_key
from heretic_kl.config.presets import DEMO_PRESET
from heretic_kl.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("HERETIC_KL_")]:
        monkeypatch.delenv(name)
    return tmp_path


def load(*argv: str, toml: str | None = None, env: dict[str, str] | None = None) -> Settings:
    if toml is not None:
        Path("config.toml").write_text(toml, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        return load_settings(argv)


def error_of(*argv: str, toml: str | None = None, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*argv, toml=toml, env=env)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- precedence and merging -----------------------------------------------------------------


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


# --- the command line -----------------------------------------------------------------------


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


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--modle x", "unknown flag --modle; did you mean --model?"),
        ("--kl_token 3", "unknown flag --kl_token; did you mean --kl-tokens?"),
        ("--n-trials 3", "unknown flag --n-trials; did you mean --trials?"),
        ("--norm row", "unknown flag --norm; did you mean --edit.norm?"),
        ("--confg f", "unknown flag --confg; did you mean --config?"),
        ("--model.x 1", "unknown flag --model.x; did you mean --model?"),
        ("--no-seed", "unknown flag --no-seed; did you mean --seed?"),
        (
            "--chat-template-kwargs effort",
            "chat_template_kwargs must be a table, as a JSON object, got 'effort' "
            "(--chat-template-kwargs)",
        ),
        ("--edit", "--edit needs a value (--edit=VALUE for one that begins with -)"),
        ("--config", "--config needs a value (--config=VALUE for one that begins with -)"),
        (
            "--scorers.teacher-forced-kl.settings.direction forward",
            "unknown flag --scorers.teacher-forced-kl.settings.direction; "
            "it is now --scorers.teacher-forced-kl.settings.divergence",
        ),
        ("--qqqqqq 1", "unknown flag --qqqqqq; `heretic-kl --help-all` lists every setting"),
        (
            "--prompts.harmful.train.sorce x",
            "unknown flag --prompts.harmful.train.sorce; "
            "did you mean --prompts.harmful.train.source?",
        ),
        (
            "--scorers.mine.rol x",
            "unknown flag --scorers.mine.rol; did you mean --scorers.mine.role?",
        ),
        ("some/model", "unexpected argument 'some/model'; a model is given as --model some/model"),
        ("-x", "unknown flag -x; `heretic-kl --help-all` lists every setting"),
        ("--model", "--model needs a value (--model=VALUE for one that begins with -)"),
        ("--model --quiet", "--model needs a value (--model=VALUE for one that begins with -)"),
        ("--no-quiet=true", "--no-quiet takes no value"),
        ("--config nope.toml", "nope.toml: no such config file (--config)"),
        (
            "--kl-tokens 0",
            "kl_tokens must be a whole number from 1 to 1024, got '0' (--kl-tokens)",
        ),
        ("--seed=-1", "seed must be a whole number from 0 to 4294967295, got '-1' (--seed)"),
        ("--trials many", "trials must be a whole number, 0 or more, got 'many' (--trials)"),
        (
            "--edit.norm rows",
            "edit.norm must be one of none, row, normalized_row, got 'rows' (--edit.norm); "
            "did you mean row?",
        ),
        (
            "--edit.components head",
            "edit.components must be a list of attention, mlp, got 'head' (--edit.components)",
        ),
        (
            "--edit.components mlp,mlp",
            "edit.components must be at least one of attention, mlp, each once, "
            "got 'mlp,mlp' (--edit.components)",
        ),
        (
            "--directions.winsorize-quantile nan",
            "directions.winsorize_quantile must be a number above 0, at most 1, got 'nan' "
            "(--directions.winsorize-quantile)",
        ),
        ("--save=", "save must be a path, got '' (--save)"),
        ("--model=", "model must be text, not empty, got '' (--model)"),
        (
            "--enable-thinking=x",
            "enable_thinking must be true or false, got 'x' (--enable-thinking)",
        ),
        ("--edit row", "edit must be a table, as a JSON object, got 'row' (--edit)"),
        (
            '--edit {"norn":1}',
            "unknown setting edit.norn (--edit); did you mean edit.norm?",
        ),
        (
            "--scorers.x.settings.a [1",
            "scorers.x.settings.a must be valid JSON, got '[1' (--scorers.x.settings.a)",
        ),
    ],
)
def test_wrong_flags_are_one_line(argv: str, expected: str) -> None:
    assert error_of(*argv.split(" ")) == expected


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("n_trials = 3", "unknown setting n_trials (config.toml); did you mean trials?"),
        ("kl-tokens = 3", "unknown setting kl-tokens (config.toml); did you mean kl_tokens?"),
        ('[edit]\nnrom = "x"', "unknown setting edit.nrom (config.toml); did you mean edit.norm?"),
        ("[edits]\nx = 1", "unknown table edits (config.toml); did you mean edit?"),
        (
            '[edit]\nmodel = "x"',
            "unknown setting edit.model (config.toml); "
            "did you mean model, above the first [table]?",
        ),
        (
            "[chat_template_kwargs]\ntokenize = true",
            "chat_template_kwargs must be a table without tokenize, got {'tokenize': True} "
            "(config.toml)",
        ),
        (
            '[[prompts.harmful.train.more]]\nsource = "a"\nlimit = 0',
            "prompts.harmful.train.more must be a list of tables, each with a source (number 1, "
            "limit: input should be greater than or equal to 1), got [{'source': 'a', 'limit': 0}] "
            "(config.toml)",
        ),
        (
            '[[prompts.harmful.train.more]]\nsorce = "a"',
            "prompts.harmful.train.more must be a list of tables, each with a source (number 1, "
            "sorce: unknown setting), got [{'sorce': 'a'}] (config.toml)",
        ),
        (
            "[prompts.harmful.trian]",
            "unknown table prompts.harmful.trian (config.toml); "
            "did you mean prompts.harmful.train?",
        ),
        (
            '[scorers.mine]\nrol = "x"',
            "unknown setting scorers.mine.rol (config.toml); did you mean scorers.mine.role?",
        ),
        ("edit = 3", "edit must be a table, got 3 (config.toml)"),
        ("scorers = 3", "scorers must be a table, got 3 (config.toml)"),
        ("scorers.x = 3", "scorers.x must be a table, got 3 (config.toml)"),
        ("scorers.x.settings = 3", "scorers.x.settings must be a table, got 3 (config.toml)"),
        ("seed = true", "seed must be a whole number from 0 to 4294967295, got true (config.toml)"),
        ("[model]\nx = 1", "model must be text, not empty, got {'x': 1} (config.toml)"),
        (
            "prompts.harmful.train.limit = 0",
            "prompts.harmful.train.limit must be a whole number, 1 or more, got 0 (config.toml)",
        ),
        (
            '[scorers."a b"]',
            "a scorer's name is lower-case letters, digits and _, beginning with a letter, "
            "got 'a b' (config.toml)",
        ),
    ],
)
def test_wrong_files_are_one_line(toml: str, expected: str) -> None:
    assert error_of(toml=toml) == expected


@pytest.mark.parametrize(("toml", "line"), [("seed = 1\n[edit\n", 2), ("a = 1\nb = [", 2)])
def test_broken_toml_names_file_and_line(toml: str, line: int) -> None:
    message = error_of(toml=toml)
    assert message.startswith("config.toml: not valid TOML: ") and f"line {line}" in message
    assert "\n" not in message


def test_unreadable_config_files_are_one_line() -> None:
    Path("config.toml").write_bytes(b"seed = 1\n# \xff\n")
    assert error_of() == "config.toml: not UTF-8 text (line 2)"
    assert error_of("--config", ".").startswith(".: cannot be read: ")


def test_wrong_variables_are_one_line() -> None:
    assert error_of(env={"HERETIC_KL_TRAILS": "3"}) == (
        "unknown environment variable HERETIC_KL_TRAILS; did you mean HERETIC_KL_TRIALS?"
    )
    assert error_of(env={"HERETIC_KL_EDIT__NRM": "3"}) == (
        "unknown environment variable HERETIC_KL_EDIT__NRM; did you mean HERETIC_KL_EDIT__NORM?"
    )
    assert error_of(env={"HERETIC_KL_CASHE": "3"}) == (
        "unknown environment variable HERETIC_KL_CASHE; did you mean HERETIC_KL_CACHE?"
    )
    assert error_of(env={"HERETIC_KL_EDIT__NORM": "x"}) == (
        "edit.norm must be one of none, row, normalized_row, got 'x' (HERETIC_KL_EDIT__NORM)"
    )


def test_every_problem_gets_its_line_and_the_source_that_won() -> None:
    message = error_of("--sed", "1", toml="n_trials = 3\nx.y = 1", env={"HERETIC_KL_Z": "1"})
    assert len(message.splitlines()) == 4
    message = error_of("--seed", "a", toml="seed = 1\nthreads = -1", env={"HERETIC_KL_SEED": "b"})
    assert message.splitlines() == [
        "threads must be a whole number from 0 to 1024, got -1 (config.toml)",
        "seed must be a whole number from 0 to 4294967295, got 'a' (--seed)",
    ]


# --- documentation --------------------------------------------------------------------------


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


def test_locate() -> None:
    assert locate(Settings, ("edit", "norm")).kind == "leaf"
    assert locate(Settings, ("scorers",)).kind == "table"
    assert locate(Settings, ("scorers", "x")).kind == "table"
    assert locate(Settings, ("scorers", "x", "settings", "a")).kind == "open"
    assert locate(Settings, ("edit", "norm", "x")).kind == "unknown"


# --- names of earlier versions --------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("max_answer_tokens = 3", "setting max_answer_tokens (config.toml); "
         "it is now max_response_tokens"),
        ("trunk_memory_mb = 3", "setting trunk_memory_mb (config.toml); it is now cache_memory_mb"),
        ("confirm_trials = 3", "setting confirm_trials (config.toml); it is now test_trials"),
        ("draft_answers = true", "setting draft_answers (config.toml); it was removed"),
        ("draft_responses = true", "setting draft_responses (config.toml); it was removed"),
        ("racing_error = 0.1", "setting racing_error (config.toml); it was removed"),
        ("prompts.harmful.search.limit = 3", "table prompts.harmful.search (config.toml); "
         "it is now prompts.harmful.validation"),
        ("prompts.harmless.report.limit = 3", "table prompts.harmless.report (config.toml); "
         "it is now prompts.harmless.test"),
        ("scorers.teacher_forced_kl.settings.direction = 'forward'",
         "setting scorers.teacher_forced_kl.settings.direction (config.toml); "
         "it is now scorers.teacher_forced_kl.settings.divergence"),
        ("scorers.teacher_forced_kl.settings.reference = 'greedy'",
         "setting scorers.teacher_forced_kl.settings.reference (config.toml); "
         "it is now scorers.teacher_forced_kl.settings.response"),
    ],
)  # fmt: skip
def test_old_keys_name_the_new_one(toml: str, expected: str) -> None:
    assert error_of(toml=toml) == f"unknown {expected}"


def test_old_flags_variables_and_values_name_the_new_one() -> None:
    assert error_of("--confirm-trials", "3") == (
        "unknown flag --confirm-trials; it is now --test-trials"
    )
    assert error_of(env={"HERETIC_KL_TRUNK_MEMORY_MB": "3"}) == (
        "unknown environment variable HERETIC_KL_TRUNK_MEMORY_MB; "
        "it is now HERETIC_KL_CACHE_MEMORY_MB"
    )
    assert error_of(toml="scorers.mine.role = 'report'") == (
        "scorers.mine.role must be one of minimize, maximize, monitor, got 'report' "
        "(config.toml); report is now monitor"
    )
    # A scorer of one's own may call a setting what it likes.
    assert load(toml="scorers.mine.settings.direction = 'up'").scorers["mine"].settings
