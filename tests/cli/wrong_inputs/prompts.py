"""Wrong sources of prompts: found before a model is loaded."""

import gzip
import os

from wrong_inputs.case import BASE, Wrong

RUN = ("--model", "model", *BASE)


def prompts(what, source, line, *more, file=None):
    """A source of the harmful training prompts, and what is in it."""
    words = ("--prompts.harmful.train", source, *more)
    return Wrong(what, (*RUN, *words), line, files={} if file is None else {source: file})


def part(name, value):
    """A flag of the same source."""
    return (f"--prompts.harmful.train.{name}", value)


def parquet(path):
    """A parquet file, cut off."""
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"text": ["a"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])


def many_rows(path):
    """A small parquet file that says that it holds one row more than is read."""
    import pyarrow
    from pyarrow.parquet import write_table

    from heretic_kl.prompts.tables import MOST_ROWS

    write_table(pyarrow.table({"text": pyarrow.nulls(MOST_ROWS + 1, pyarrow.string())}), path)


CASES = [
    prompts("file that is not there", "gone.txt", "gone.txt: no such file or folder"),
    Wrong(
        "misspelt file",
        (*RUN, "--prompts.harmful.train", "promts.txt"),
        "promts.txt: no such file or folder (did you mean prompts.txt?)",
        files={"prompts.txt": "a\nb\n"},
    ),
    prompts("empty file", "p.txt", "p.txt: holds no prompts", file=""),
    prompts("blank lines alone", "p.txt", "p.txt: holds no prompts", file="\n \n\t\n"),
    prompts("text that is not UTF-8", "p.txt", "p.txt: not UTF-8 text", file=b"caf\xe9\n"),
    prompts(
        "kind of file that is not read",
        "p.docx",
        "p.docx: not a kind of file that can be read (.txt, .jsonl, .json, .csv, .parquet)",
        file="x",
    ),
    prompts(
        "file without a suffix",
        "./prompts",
        "./prompts: not a kind of file that can be read (.txt, .jsonl, .json, .csv, .parquet)",
        file="x",
    ),
    prompts(
        "empty folder",
        "folder",
        "folder: cannot be read: it holds no .txt, .jsonl, .json, .csv or .parquet file",
        file=lambda p: p.mkdir(),
    ),
    prompts(
        "folder without tables",
        "folder",
        "folder: cannot be read: it holds no .txt, .jsonl, .json, .csv or .parquet file",
        file=lambda p: (p.mkdir(), (p / "a.bin").write_bytes(b"\0")),
    ),
    prompts(
        "compressed file behind another suffix",
        "p.json",
        "p.json: its content is an archive or compressed: unpack it",
        file=gzip.compress(b'{"text": "a"}'),
    ),
    prompts(
        "compressed file in a folder",
        "folder",
        "folder/a.txt: its content is an archive or compressed: unpack it",
        file=lambda p: (p.mkdir(), (p / "a.txt").write_bytes(gzip.compress(b"a"))),
    ),
    prompts(
        "parquet file that expands hugely",
        "p.parquet",
        "p.parquet: 10,000,001 rows, 0.0 GB uncompressed: at most 10,000,000 rows and 1 GB of a file are read",
        file=many_rows,
    ),
    prompts("empty table", "p.csv", "p.csv: holds no prompts", file=""),
    prompts("header without rows", "p.csv", "p.csv: holds no prompts", file="text\n"),
    prompts(
        "unknown column",
        "p.csv",
        "p.csv: no column 'question'; there is: text, n",
        *part("column", "question"),
        file="text,n\na,1\n",
    ),
    prompts(
        "column of numbers",
        "p.csv",
        "p.csv: column 'n' holds no text",
        *part("column", "n"),
        file="text,n\na,1\n",
    ),
    prompts(
        "several columns of text",
        "p.csv",
        "p.csv: name the column of the prompts with column: q, a",
        file="q,a\nx,y\n",
    ),
    prompts(
        "column of a text file",
        "p.txt",
        "p.txt: no column 'q'; there is: text",
        *part("column", "q"),
        file="a\n",
    ),
    prompts(
        "rows of different lengths",
        "p.csv",
        "p.csv: cannot be read: [...]",
        file="text,n\na,1\nb,2,3,4\n",
    ),
    prompts(
        "broken JSON",
        "p.json",
        "p.json: cannot be read: [...]",
        file="[1,",
    ),
    prompts(
        "JSON lines cut off",
        "p.jsonl",
        "p.jsonl: cannot be read: [...]",
        file='{"text": "a"}\n{"text": "b',
    ),
    prompts(
        "JSON lines of other types",
        "p.jsonl",
        "p.jsonl: name the column of the prompts with column: text",
        file='{"text": "a"}\n{"text": {"b": 1}}\n',
    ),
    prompts(
        "deep JSON",
        "p.json",
        "p.json: cannot be read: [...]",
        file="[" * 100_000,
    ),
    prompts(
        "parquet cut off",
        "p.parquet",
        "p.parquet: cannot be read: [...]",
        file=parquet,
    ),
    prompts(
        "parquet that is none",
        "p.parquet",
        "p.parquet: cannot be read: [...]",
        file=b"PAR1" + b"\xff" * 64 + b"PAR1",
    ),
    prompts(
        "unknown split",
        "p.txt",
        "p.txt: no split 'test'; there is: train",
        *part("split", "test"),
        file="a\n",
    ),
    prompts(
        "split that cannot be read",
        "p.txt",
        "p.txt: cannot read split 'train[1:2:3]'; written like train, train[:400], test[10:50], train[-20%:] or [:20]",
        *part("split", "train[1:2:3]"),
        file="a\n",
    ),
    prompts(
        "slice with no rows",
        "p.txt",
        "p.txt train[5:]: holds no prompts",
        *part("split", "train[5:]"),
        file="a\n",
    ),
    prompts(
        "slice beyond every number",
        "p.txt",
        "p.txt: cannot read split 'train[999999999999999999999999999999:]'; written like train, train[:400], test[10:50], train[-20%:] or [:20]",
        *part("split", f"train[{'9' * 30}:]"),
        file="a\n",
    ),
    prompts(
        "slice of 5,000 digits",
        "p.txt",
        "p.txt: cannot read split 'train[99999999999999999999[...]:]'; written like train, train[:400], test[10:50], train[-20%:] or [:20]",
        *part("split", f"train[{'9' * 5000}:]"),
        file="a\n",
    ),
    prompts(
        "limit of none",
        "p.txt",
        "prompts.harmful.train.limit must be a whole number, 1 or more, got '0' (--prompts.harmful.train.limit)",
        *part("limit", "0"),
        file="a\n",
    ),
    prompts(
        "subset of a file",
        "p.txt",
        "p.txt: no subset 'main': it is a file",
        *part("subset", "main"),
        file="a\n",
    ),
    prompts(
        "revision of a file",
        "p.txt",
        "p.txt: no revision 'v1': it is a file",
        *part("revision", "v1"),
        file="a\n",
    ),
    prompts(
        "revision that is a path",
        "org/set",
        "prompts.harmful.train.revision must be a commit, tag or branch, got '../v1' (--prompts.harmful.train.revision)",
        *part("revision", "../v1"),
    ),
    prompts(
        "unknown built-in set",
        "builtin:harmles",
        "builtin:harmles: unknown built-in set; there are builtin:harmful, builtin:harmless, builtin:borderline, builtin:panel",
    ),
    prompts(
        "split of a built-in set",
        "builtin:harmful",
        "builtin:harmful: no split 'dev'; there is: train, validation, test",
        *part("split", "dev"),
    ),
    prompts(
        "link to itself",
        "p.txt",
        "p.txt: a link that leads nowhere",
        file=lambda p: p.symlink_to(p.name),
    ),
    prompts(
        "pipe that nobody writes",
        "p.txt",
        "p.txt: not a regular file: copy its content to one",
        file=os.mkfifo,
    ),
    prompts(
        "endless file",
        "p.txt",
        "p.txt: not a regular file: copy its content to one",
        file=lambda p: p.symlink_to("/dev/zero"),
    ),
    prompts(
        "name that is too long",
        "a" * 5000 + ".txt",
        "aaaaaaaaaaaaaaaaaaaa[...]txt: cannot be read: File name too long",
    ),
    prompts(
        "name that is no hub id",
        "no spaces here",
        "no spaces here: no such file or folder, and no such dataset on the hub",
    ),
    prompts(
        "NUL in a name",
        "a\0b.txt",
        "prompts.harmful.train.source must be Unicode text without control characters, got 'a\\x00b.txt' (--prompts.harmful.train.source)",
    ),
    Wrong(
        "unknown key of a source",
        (*RUN, "--prompts.harmful.train.colum", "x"),
        "unknown flag --prompts.harmful.train.colum; did you mean --prompts.harmful.train.column?",
    ),
    Wrong(
        "prompts that are a list",
        RUN,
        "prompts.harmful.train must be a table, got ['a'] (config.toml)",
        files={"config.toml": "prompts.harmful.train = ['a']\n"},
    ),
    Wrong(
        "unknown kind of prompts",
        RUN,
        "unknown table prompts.harmfull (config.toml); did you mean prompts.harmful?",
        files={"config.toml": "prompts.harmfull.train.source = 'a'\n"},
    ),
    Wrong(
        "prompts of a scorer",
        (*RUN, "--scorers.teacher_forced_kl.settings.prompts", '{"source": "gone.txt"}'),
        "gone.txt: no such file or folder",
    ),
    Wrong(
        "prompts of a scorer without a source",
        (*RUN, "--scorers.teacher_forced_kl.settings.prompts", '{"split": "train"}'),
        "scorers.teacher_forced_kl.settings.prompts.source = {'split': 'train'}: Field required",
    ),
    Wrong(
        "text to score that is not there",
        ("score", "-r", "model", "--candidate", "model", "--text", "gone.txt"),
        "gone.txt: no such text file, or no regular one",
        1,
    ),
    Wrong(
        "text to score that is empty",
        ("score", "-r", "model", "--candidate", "model", "--text", "e.txt"),
        "e.txt: holds no text",
        1,
        files={"e.txt": ""},
    ),
    Wrong(
        "text to score that is a pipe",
        ("score", "-r", "model", "--candidate", "model", "--text", "pipe"),
        "pipe: no such text file, or no regular one",
        1,
        files={"pipe": os.mkfifo},
    ),
    Wrong(
        "text to score that is binary",
        ("score", "-r", "model", "--candidate", "model", "--text", "b.txt"),
        "b.txt: not UTF-8 text",
        1,
        files={"b.txt": bytes(range(256))},
    ),
]
