"""Wrong settings files and variables: found before torch is imported."""

from wrong_inputs.case import Wrong


def toml(what, text, line, **more):
    """A wrong settings file."""
    return Wrong(what, ("--model", "model"), line, files={"config.toml": text}, **more)


def variable(what, name, value, line):
    """A wrong environment variable."""
    return Wrong(what, ("--model", "model"), line, environment={name: value})


CASES = [
    toml(
        "misspelt setting in a file",
        "trails = 3\n",
        "unknown setting trails (config.toml); did you mean trials?",
    ),
    toml(
        "misspelt table in a file",
        "[promts]\nx = 1\n",
        "unknown table promts (config.toml); did you mean prompts?",
    ),
    toml(
        "broken TOML",
        "trials = = 3\n",
        "config.toml: not valid TOML: [...]",
    ),
    toml(
        "TOML cut off",
        'model = "abc\n',
        "config.toml: not valid TOML: [...]",
    ),
    toml(
        "key given twice",
        "trials = 3\ntrials = 4\n",
        "config.toml: not valid TOML: [...]",
    ),
    toml(
        "true for a number in a file",
        "seed = true\n",
        "seed must be a whole number from 0 to 4294967295, got true (config.toml)",
    ),
    toml(
        "number for a table in a file",
        "prompts = 3\n",
        "prompts must be a table, got 3 (config.toml)",
    ),
    toml(
        "setting below a table",
        "[edit]\nnorm = 'none'\ntrials = 3\n",
        "unknown setting edit.trials (config.toml); did you mean refinement.trials?",
    ),
    toml("file that is not UTF-8", b"model = '\xff'\n", "config.toml: not UTF-8 text (line 1)"),
    toml(
        "TOML bomb: 100,000 brackets",
        "a = " + "[" * 100_000,
        "config.toml: too large (over 1 MB) or too deeply nested",
    ),
    toml(
        "TOML bomb: a key of 100,000 parts",
        "a" + ".a" * 100_000 + " = 1",
        "config.toml: too large (over 1 MB) or too deeply nested",
    ),
    toml(
        "date for a number in a file",
        "trials = 2020-01-01",
        "trials must be a whole number, 0 or more, got datetime.date(2020, 1, 1) (config.toml)",
    ),
    toml(
        "NUL in a path in a file",
        'save = "a\\u0000b"\npick="knee"',
        "save must be a path without NUL, its ~ that of a user, got 'a\\x00b' (config.toml)",
    ),
    toml(
        "number of 5,000 digits in a file",
        "trials = " + "9" * 5000,
        "config.toml: cannot be read: [...]",
    ),
    toml(
        "settings file of 20 MB",
        "# " + "x" * 20_000_000,
        "config.toml: too large (over 1 MB) or too deeply nested",
    ),
    Wrong(
        "settings file that is a folder",
        ("--config", "conf", "--model", "model"),
        "conf: cannot be read: Is a directory",
        files={"conf/x": ""},
    ),
    Wrong(
        "settings file that is not there",
        ("--config", "gone.toml", "--model", "model"),
        "gone.toml: no such config file (--config)",
    ),
    Wrong(
        "NUL in the name of the settings file",
        ("--config", "gone\0.toml", "--model", "model"),
        "--config must be a path without NUL, got 'gone\\x00.toml'",
    ),
    Wrong(
        "settings file that never ends",
        ("--config", "zero.toml", "--model", "model"),
        "zero.toml: too large (over 1 MB) or too deeply nested",
        files={"zero.toml": lambda p: p.symlink_to("/dev/zero")},
    ),
    variable(
        "misspelt variable",
        "HERETIC_KL_TRAILS",
        "3",
        "unknown environment variable HERETIC_KL_TRAILS; did you mean HERETIC_KL_TRIALS?",
    ),
    variable(
        "word in a variable",
        "HERETIC_KL_TRIALS",
        "many",
        "trials must be a whole number, 0 or more, got 'many' (HERETIC_KL_TRIALS)",
    ),
    variable(
        "broken JSON in a variable",
        "HERETIC_KL_PROMPTS",
        "{",
        "prompts must be a table, as a JSON object, got '{' (HERETIC_KL_PROMPTS)",
    ),
    variable(
        "deep JSON in a variable",
        "HERETIC_KL_PROMPTS",
        '{"a":' * 50_000,
        'prompts must be a table, as a JSON object, got \'{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a"..."a":{"a":{"a":{"a":\' (HERETIC_KL_PROMPTS)',
    ),
    variable(
        "variable with a part missing",
        "HERETIC_KL_EDIT__",
        "3",
        "unknown environment variable HERETIC_KL_EDIT__; did you mean HERETIC_KL_EDIT__NORM?",
    ),
]
