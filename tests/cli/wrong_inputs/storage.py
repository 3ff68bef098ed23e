"""Wrong storages and studies."""

import json
import sqlite3

from wrong_inputs.case import BASE, Wrong

RUN = ("--model", "model", *BASE)


def storage(what, url, line, *more, **options):
    """A storage URL of a search."""
    return Wrong(what, (*RUN, "--storage", url, *more), line, **options)


def journal(change):
    """The journal of a finished study, changed."""

    def write(path):
        text = (path.parent / "mine.journal").read_text()
        path.write_text(change(text))

    return write


def without_run(text):
    return "\n".join(line for line in text.splitlines() if "heretic-kl:run" not in line) + "\n"


def with_run(value):
    def change(text):
        lines = [json.loads(line) for line in text.splitlines()]
        for line in lines:
            attributes = line.get("user_attr", {})
            if "heretic-kl:run" in attributes:
                attributes["heretic-kl:run"] = value
        return "".join(json.dumps(line) + "\n" for line in lines)

    return change


def other_database(path):
    with sqlite3.connect(path) as connection:
        connection.execute("create table studies (a int)")


def renamed_study(name):
    """A database with a study of a hostile name."""

    def write(path):
        import optuna

        optuna.create_study(study_name=name, storage=f"sqlite:///{path}")

    return write


CASES = [
    storage(
        "storage that is no URL",
        "studies.db",
        "cannot open storage 'studies.db': not a URL; write sqlite:///FILE, postgresql://HOST/NAME or mysql://HOST/NAME",
    ),
    storage(
        "unknown scheme",
        "foo://x",
        "cannot open storage 'foo://x': unknown scheme 'foo'; write sqlite:///FILE, postgresql://HOST/NAME or mysql://HOST/NAME",
    ),
    storage(
        "password in a wrong URL",
        "foo://me:secret@host/db",
        "cannot open storage 'foo://me:***@host/db': unknown scheme 'foo'; write sqlite:///FILE, postgresql://HOST/NAME or mysql://HOST/NAME",
    ),
    storage(
        "driver that is not installed",
        "mysql://me:secret@host/db",
        "cannot open storage 'mysql://me:***@host/db': its driver is not installed: pip install 'mysqlclient'",
    ),
    storage(
        "folder of a database that is not there",
        "sqlite:////no/such/folder/x.db",
        "cannot open storage 'sqlite:////no/such/folder/x.db': (sqlite3[...]",
    ),
    storage(
        "database that is none",
        "sqlite:///x.db",
        "cannot open storage 'sqlite:///x.db': (sqlite3[...]",
        files={"x.db": "not a database" * 99},
    ),
    storage(
        "database of another program",
        "sqlite:///x.db",
        "cannot open storage 'sqlite:///x.db': its table studies is another program's: name another database",
        files={"x.db": other_database},
    ),
    storage(
        "database that is a folder",
        "sqlite:///x.db",
        "cannot open storage 'sqlite:///x.db': (sqlite3[...]",
        files={"x.db/a": ""},
    ),
    storage(
        "proxy without a host", "grpc://", "cannot open storage 'grpc://': write grpc://HOST:PORT"
    ),
    storage(
        "proxy with a wrong port",
        "grpc://localhost:many",
        "cannot open storage 'grpc://localhost:many': write grpc://HOST:PORT",
    ),
    storage(
        "folder of studies that is a file",
        "null",
        "cannot write studies in 'file': Not a directory",
        "--study-dir",
        "file",
        files={"file": ""},
    ),
    Wrong(
        "folder of studies below a file",
        (*RUN, "--study-dir", "file/x"),
        "cannot write studies in 'file/x': Not a directory",
        files={"file": ""},
    ),
    Wrong(
        "study whose file is damaged",
        (*RUN, "--study-name", "bad"),
        "study file 'studies/bad.journal' is damaged and cannot be read: move it away to start anew",
        files={"studies/bad.journal": '{"op": 1}\n{}\n'},
    ),
    Wrong(
        "no studies",
        ("trials",),
        "there is no study in 'studies'; --study-dir names another folder",
        1,
    ),
    Wrong(
        "misspelt study",
        ("trials", "mien", "--study-dir", "studies"),
        "there is no study 'mien' in 'studies'; did you mean mine?",
        1,
    ),
    Wrong(
        "study file that is not there",
        ("trials", "gone.journal"),
        "there is no study file 'gone.journal'",
        1,
    ),
    Wrong(
        "study file that is a folder",
        ("trials", "studies/x.journal"),
        "there is no study file 'studies/x.journal'",
        1,
        files={"studies/x.journal/a": ""},
    ),
    Wrong(
        "study file that is empty",
        ("trials", "studies/x.journal"),
        "there is no study 'x'; the storage holds none",
        1,
        files={"studies/x.journal": ""},
    ),
    Wrong(
        "study file that is binary",
        ("trials", "studies/x.journal"),
        "study file 'studies/x.journal' is damaged and cannot be read: move it away to start anew",
        1,
        files={"studies/x.journal": bytes(range(256))},
    ),
    Wrong(
        "study file of numbers",
        ("trials", "studies/x.journal"),
        "study file 'studies/x.journal' is damaged and cannot be read: move it away to start anew",
        1,
        files={"studies/x.journal": "1\n2\n"},
    ),
    Wrong(
        "study file of deep JSON",
        ("trials", "studies/x.journal"),
        "study file 'studies/x.journal' is damaged and cannot be read: move it away to start anew",
        1,
        files={"studies/x.journal": "[" * 100_000 + "\n"},
    ),
    Wrong(
        "study file of an unknown operation",
        ("trials", "studies/x.journal"),
        "study file 'studies/x.journal' is damaged and cannot be read: move it away to start anew",
        1,
        files={"studies/x.journal": '{"op_code": 99, "worker_id": "a"}\n'},
    ),
    Wrong(
        "study file of a study that is missing",
        ("trials", "studies/x.journal"),
        "there is no study 'x'; the storage holds none",
        1,
        files={
            "studies/x.journal": '{"op_code":4,"worker_id":"a","study_id":7,"distributions":{}}\n'
        },
    ),
    Wrong(
        "study without its settings",
        ("trials", "studies/x.journal"),
        "study 'x' does not say what it was made with: run its command once more",
        1,
        files={"studies/x.journal": journal(lambda t: without_run(t).replace('"mine"', '"x"'))},
    ),
    Wrong(
        "study whose settings are no JSON",
        ("trials", "studies/x.journal"),
        "study 'x' is damaged, or another program wrote it: [...]",
        1,
        files={"studies/x.journal": journal(lambda t: with_run("{")(t).replace('"mine"', '"x"'))},
    ),
    Wrong(
        "study whose settings are a list",
        ("trials", "studies/x.journal"),
        "study 'x' is damaged, or another program wrote it: [...]",
        1,
        files={"studies/x.journal": journal(lambda t: with_run("[]")(t).replace('"mine"', '"x"'))},
    ),
    Wrong(
        "study whose settings are a number",
        ("trials", "studies/x.journal"),
        "study 'x' is damaged, or another program wrote it: [...]",
        1,
        files={"studies/x.journal": journal(lambda t: with_run(7)(t).replace('"mine"', '"x"'))},
    ),
    Wrong(
        "study of another name in a file",
        ("trials", "studies/x.journal"),
        "there is no study 'x'; the storage holds mine",
        1,
        files={"studies/x.journal": journal(lambda t: t)},
    ),
    Wrong(
        "study cut off",
        ("trials", "studies/x.journal"),
        "study 'x' does not say what it was made with: run its command once more",
        1,
        files={"studies/x.journal": journal(lambda t: t[:3000].replace('"mine"', '"x"'))},
    ),
    Wrong(
        "trial that there is not",
        ("show", "mine", "--study-dir", "studies", "--trial", "99"),
        "no finished trial '99'; there are 0, 1, 2, 3",
        3,
    ),
    Wrong(
        "rule that no trial meets",
        ("show", "mine", "--study-dir", "studies", "--pick", "max-teacher_forced_kl=-1"),
        "no trial has teacher_forced_kl at most -1; the nearest is trial 1 with teacher_forced_kl 0.0343771",
        3,
    ),
    Wrong(
        "unknown rule",
        ("show", "mine", "--study-dir", "studies", "--pick", "best"),
        "unknown pick rule 'best': use knee, trial=NUMBER, max-SCORER=VALUE, likely-SCORER=VALUE or min-SCORER=VALUE (for instance max-refusals=0.05)",
        1,
    ),
    Wrong(
        "study in no storage",
        ("trials", "mine", "--storage", "sqlite:///x.db"),
        "there is no study 'mine'; the storage holds other",
        1,
        files={"x.db": renamed_study("other")},
    ),
    Wrong(
        "hostile name in a storage",
        ("trials", "--storage", "sqlite:///x.db"),
        "study '../../escaped' has a name that no file could have: rename it",
        1,
        files={"x.db": renamed_study("../../escaped")},
    ),
    Wrong(
        "hostile name in a storage, named",
        ("trials", "../../escaped", "--storage", "sqlite:///x.db"),
        "study '../../escaped' has a name that no file could have: rename it",
        1,
        files={"x.db": renamed_study("../../escaped")},
    ),
    Wrong(
        "storage without studies",
        ("trials", "--storage", "sqlite:///new.db"),
        "there is no database 'new.db' to read a study from (--storage)",
        1,
    ),
    Wrong(
        "report of a study that is not there",
        ("report", "gone"),
        "there is no study in 'studies'; --study-dir names another folder",
        1,
    ),
    Wrong(
        "report with broken data beside it",
        ("report", "mine", "--study-dir", "studies"),
        "cannot read 'studies/mine.report.json': not valid JSON",
        1,
        files={"studies/mine.report.json": "{"},
    ),
    Wrong(
        "report with data of another format",
        ("report", "mine", "--study-dir", "studies"),
        "'studies/mine.report.json' has another format than this version reads (1): move it away, or use the version that wrote it",
        1,
        files={"studies/mine.report.json": '{"format": 99}'},
    ),
    Wrong(
        "report with data of other types",
        ("report", "mine", "--study-dir", "studies"),
        "'studies/mine.report.json' or its study holds what no run writes: move it away ([...])",
        1,
        files={
            "studies/mine.report.json": '{"format": 1, "model": 3, "responses": 7, "prompts": "x"}'
        },
    ),
    Wrong(
        "database to serve that is a proxy",
        ("storage", "serve", "--storage", "grpc://localhost:1"),
        "grpc://localhost:1 is itself a proxy: serve the database behind it",
        1,
    ),
    Wrong(
        "report over a folder",
        ("report", "mine", "--study-dir", "studies", "--output", "model"),
        "cannot write 'model': Is a directory",
        1,
    ),
    Wrong(
        "report below a file",
        ("report", "mine", "--study-dir", "studies", "--output", "file/r.html"),
        "cannot write 'file/r.html': File exists",
        1,
        files={"file": ""},
    ),
    Wrong(
        "report about a trial that there is not",
        ("report", "mine", "--study-dir", "studies", "--pick", "trial=99"),
        "no finished trial '99'; there are 0, 1, 2, 3",
        3,
    ),
    Wrong(
        "save of a trial that there is not",
        ("save", "mine", "--study-dir", "studies", "--trial", "99", "--save", "out"),
        "no finished trial '99'; there are 0, 1, 2, 3",
        3,
    ),
    Wrong(
        "save of a study whose model moved",
        ("save", "mine", "--study-dir", "studies", "--trial", "1", "--model", "gone/x/y"),
        "no model at 'gone/x/y': give a folder, a .gguf file or a hub id",
        1,
    ),
]
