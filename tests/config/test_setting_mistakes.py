"""One line for every key, value, file or variable that is wrong."""

from pathlib import Path

import pytest
from loading import error_of, load


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
