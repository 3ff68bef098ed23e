"""Prompts from real files of every kind, and one line for everything that can be wrong."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from prepared import prepare

from heretic_kl.errors import PromptError
from heretic_kl.prompts import (
    KINDS,
    USES,
    DatasetSpec,
    Prompt,
    fingerprint,
    hub,
    load_prompts,
    resolve_specs,
    specs,
    splits,
)

TEXTS = [f"question {number}" for number in range(10)]


def texts(spec: DatasetSpec) -> list[str]:
    return [prompt.user for prompt in load_prompts(spec)]


def error_of(spec: DatasetSpec) -> str:
    with pytest.raises(PromptError) as caught:
        load_prompts(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(params=["txt", "jsonl", "json", "csv", "parquet", "saved", "saved_dict", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Hold TEXTS, as a file or folder of each kind."""
    kind = request.param
    path = tmp_path / f"p[1] *.{kind}"
    table = datasets.Dataset.from_dict({"id": list(range(10)), "text": TEXTS})
    if kind == "txt":
        path.write_text("\n\n".join(TEXTS) + "\n  \n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps([{"text": t, "id": 1} for t in TEXTS]), encoding="utf-8")
    elif kind == "csv":
        path.write_text("id,text\n" + "".join(f'1,"{t}"\n' for t in TEXTS), encoding="utf-8")
    elif kind == "parquet":
        table.to_parquet(str(path))
    elif kind == "saved":
        table.save_to_disk(str(path))
    elif kind == "saved_dict":
        datasets.DatasetDict({"train": table}).save_to_disk(str(path))
    else:
        path = tmp_path / "folder"
        (path / "data").mkdir(parents=True)
        table.to_parquet(str(path / "data" / "train-00000-of-00001.parquet"))
    return str(path)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, TEXTS),
        ("train", TEXTS),
        ("train[:4]", TEXTS[:4]),
        ("[2:5]", TEXTS[2:5]),
        ("train[-20%:]", TEXTS[-2:]),
        ("[8:500]", TEXTS[8:]),
    ],
)
def test_every_kind_of_source(
    source: str, split: str | None, expected: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert texts(DatasetSpec(source, split)) == expected
    assert capfd.readouterr() == ("", "")


def test_a_source_says_which_splits_and_columns_it_has(source: str) -> None:
    assert error_of(DatasetSpec(source, "test")).endswith("no split 'test'; there is: train")
    assert "no column 'prompt'; there is: " in error_of(DatasetSpec(source, column="prompt"))
    assert "holds no prompts" in error_of(DatasetSpec(source, "train[5:5]"))
    assert "cannot read split 'train[:x]'" in error_of(DatasetSpec(source, "train[:x]"))


@pytest.mark.parametrize(
    "split", ["[:3]", "[3:]", "[2:9]", "[-3:]", "[:-3]", "[:33%]", "[33%:67%]", "[-15%:]", "[:]"]
)
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_slices_mean_what_they_mean_to_datasets(split: str, rows: int) -> None:
    table = datasets.Dataset.from_dict({"text": [str(row) for row in range(rows)]})
    instruction = datasets.ReadInstruction.from_spec(f"train{split}").to_absolute({"train": rows})
    expected = table[instruction[0].from_ : instruction[0].to]["text"]
    _, part = splits.read_split(DatasetSpec("x", f"train{split}"), ["train"])
    assert table[part.of(rows)]["text"] == expected


def test_prefix_suffix_system_and_limit_come_after_the_slice(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a\nb\nc\nd\n", encoding="utf-8-sig")
    spec = DatasetSpec(str(file), "[1:]", prefix="<", suffix=">", system="s", limit=2)
    assert load_prompts(spec) == [Prompt("<b>", "s"), Prompt("<c>", "s")]
    assert spec.describe() == f"{file} [1:], at most 2"


def test_column_is_text_or_the_only_one_of_strings(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("id,question\n1,a\n2,\n3,c\n", encoding="utf-8")
    assert texts(DatasetSpec(str(file))) == ["a", "c"]  # a row without text is no prompt
    assert "column 'id' holds no text" in error_of(DatasetSpec(str(file), column="id"))
    file.write_text("question,answer\na,b\n", encoding="utf-8")
    assert "with column: question, answer" in error_of(DatasetSpec(str(file)))
    assert texts(DatasetSpec(str(file), column="answer")) == ["b"]


def test_several_splits_need_a_name(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "d"))
    assert "several splits; name one with split: train, test" in error_of(
        DatasetSpec(str(tmp_path / "d"))
    )
    assert texts(DatasetSpec(str(tmp_path / "d"), "test")) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b" \n\n", "holds no prompts"),
        ("p.txt", b"\xff\xfe\xff", "not UTF-8 text"),
        ("p.jsonl", b"", "holds no prompts"),
        ("p.jsonl", b'{"text": "a"}\n{bad\n', "cannot be read"),
        ("p.jsonl", b'{"text": "  "}\n', "holds no prompts"),
        ("p.csv", b"text\n", "holds no prompts"),
        ("p.parquet", b"no parquet", "cannot be read"),
        ("p.xlsx", b"x", "not a kind of file that can be read (.txt, "),
    ],
)
def test_files_that_hold_no_prompts(
    tmp_path: Path, name: str, content: bytes, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    message = error_of(DatasetSpec(str(file)))
    assert message.startswith(str(file)) and expected in message
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "harmful.txt").write_text("a", encoding="utf-8")
    assert error_of(DatasetSpec(str(tmp_path / "harmfull.txt"))) == (
        f"{tmp_path / 'harmfull.txt'}: no such file or folder "
        f"(did you mean {tmp_path / 'harmful.txt'}?)"
    )
    assert error_of(DatasetSpec(str(tmp_path / "zzz" / "q.csv"))).endswith("no such file or folder")


def test_a_dataset_of_several_subsets_needs_one(tmp_path: Path) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    for name in ("easy", "hard"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    card = "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("easy", "hard")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    spec = DatasetSpec(str(folder), subset="hard")
    assert [prompt.user for prompt in load_prompts(spec)] == ["hard"]
    assert spec.describe() == f"{folder} (hard)"
    for subset in (None, "odd"):
        with pytest.raises(PromptError, match=r"easy.*hard") as raised:
            load_prompts(DatasetSpec(str(folder), subset=subset))
        assert "\n" not in str(raised.value)


def test_a_set_of_several_sources_has_their_prompts_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "b.txt").write_text("four\nfive\n")
    further = {"source": str(tmp_path / "b.txt"), "system": "Be brief.", "prefix": "> "}
    spec = DatasetSpec(str(tmp_path / "a.txt"), limit=2, more=(further,))
    assert load_prompts(spec) == [
        Prompt("one"),
        Prompt("two"),
        Prompt("> four", "Be brief."),
        Prompt("> five", "Be brief."),
    ]
    assert spec.describe() == f"{tmp_path / 'a.txt'}, at most 2 + {tmp_path / 'b.txt'}"


def test_further_built_in_sources_take_the_split_of_their_use() -> None:
    table = {"source": "builtin:harmful", "more": [{"source": "builtin:borderline"}]}
    resolved = resolve_specs({"harmful": {"validation": table}}, "builtin")
    spec = resolved.specs["harmful", "validation"]
    assert [part.split for part in spec.parts()] == ["validation", "validation"]
    wanted = [DatasetSpec(f"builtin:{kind}", "validation") for kind in ("harmful", "borderline")]
    assert load_prompts(spec) == [prompt for part in wanted for prompt in load_prompts(part)]


def test_further_sources_of_a_default_set() -> None:
    tables = {"harmful": {"train": {"more": [{"source": "builtin:borderline"}]}}}
    spec = resolve_specs(tables, "builtin").specs["harmful", "train"]
    assert spec.describe() == "builtin:harmful train + builtin:borderline train"


@pytest.mark.parametrize("more", ["a.txt", ["a.txt"], {"source": "a.txt"}, [["a.txt"]], 3])
def test_further_sources_are_tables(more: object) -> None:
    with pytest.raises(ValueError, match="a list of tables, each with a source"):
        DatasetSpec("builtin:harmful", more=more)


def test_what_is_one_set_has_no_subset(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n")
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(str(tmp_path / "saved"))
    for source in ("builtin:harmful", str(tmp_path / "lines.txt"), str(tmp_path / "saved")):
        with pytest.raises(PromptError, match="no subset 'main': it is"):
            load_prompts(DatasetSpec(source, subset="main"))


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    assert "cannot be read" in error_of(DatasetSpec(str(tmp_path)))


# --- built-in -------------------------------------------------------------------------------


def test_builtin_sets_are_large_and_disjoint() -> None:
    for name in KINDS:
        sets = [texts(DatasetSpec(f"builtin:{name}", use)) for use in USES]
        together = [text for part in sets for text in part]
        assert len(together) >= 192
        assert len(set(together)) == len(together)
    assert len(texts(DatasetSpec("builtin:harmful", "train[:10]"))) == 10


def test_builtin_errors() -> None:
    listed = "train, validation, test"
    assert error_of(DatasetSpec("builtin:harmful")).endswith(f"name one with split: {listed}")
    assert error_of(DatasetSpec("builtin:harmful", "report")).endswith(f"there is: {listed}")
    assert "builtin:harmful, builtin:harmless, builtin:borderline" in error_of(
        DatasetSpec("builtin:x", "train")
    )
    assert "there is: text" in error_of(DatasetSpec("builtin:harmful", "train", "prompt"))


def test_builtin_and_text_files_need_no_datasets_library(tmp_path: Path) -> None:
    code = (
        "import sys; from heretic_kl.prompts import *\n"
        "assert load_prompts(DatasetSpec('builtin:harmless', 'train[:3]'))\n"
        "assert resolve_specs({}, 'builtin').prompt_set == 'builtin'\n"
        "print(sorted({'datasets', 'torch', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- the hub --------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def test_a_hub_that_does_not_answer_is_left_after_seconds(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    never = threading.Event()
    monkeypatch.setattr(hub, "_ask_hub", lambda names, timeout: never.wait(30))
    assert hub.hub_problem(["a/b"], 0.05) == "the hub did not answer within 0.05 seconds"
    assert not hub.hub_reachable(["a/b"], 0.05)
    never.set()


def test_offline_is_said(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert error_of(DatasetSpec("org/set")) == (
        "org/set: not in the local cache, and HF_HUB_OFFLINE forbids asking the hub"
    )


def test_a_cached_dataset_needs_no_hub(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_ask_hub", lambda names, timeout: "the hub cannot be reached")
    assert error_of(DatasetSpec("org/set")) == "org/set: the hub cannot be reached"
    assert not hub.hub_reachable(["org/set"])
    prepare(empty_cache, "1" * 40, ["a", "b"])
    assert hub.hub_reachable(["org/set"])
    assert texts(DatasetSpec("org/set", "train[1:]")) == ["b"]


# --- which prompts --------------------------------------------------------------------------


def test_auto_takes_the_hub_where_it_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def reachable(names: object) -> bool:
        asked.append(list(names))  # type: ignore[call-overload]
        return True

    monkeypatch.setattr(specs, "hub_reachable", reachable)
    resolved = resolve_specs({}, "auto")
    assert asked == [["mlabonne/harmful_behaviors", "mlabonne/harmless_alpaca"]]
    assert (resolved.prompt_set, resolved.notice) == ("hub", None)
    assert resolved.specs["harmful", "train"] == DatasetSpec(
        "mlabonne/harmful_behaviors", "train[:400]", "text"
    )
    assert resolved.specs["harmless", "validation"].split == "test[:100]"
    assert resolved.specs["harmless", "test"] == DatasetSpec("builtin:harmless", "test")


def test_auto_falls_back_to_the_builtin_prompts_with_a_notice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(specs, "hub_reachable", lambda names: False)
    resolved = resolve_specs({}, "auto")
    assert resolved.prompt_set == "builtin"
    assert resolved.notice is not None and "built-in" in resolved.notice
    assert resolved.specs["harmful", "validation"] == DatasetSpec("builtin:harmful", "validation")


def test_tables_go_over_the_prompt_set() -> None:
    tables = {
        "harmful": {
            "train": {"source": "mine.txt", "split": None, "limit": 3},
            "validation": {"source": "builtin:harmless"},
            "test": {"source": None, "prefix": "> ", "split": "test[:5]"},
        }
    }
    resolved = resolve_specs(tables, "builtin").specs
    assert resolved["harmful", "train"] == DatasetSpec("mine.txt", limit=3)
    assert resolved["harmful", "validation"] == DatasetSpec("builtin:harmless", "validation")
    assert resolved["harmful", "test"] == DatasetSpec("builtin:harmful", "test[:5]", prefix="> ")


def test_the_hub_is_not_asked_when_every_table_names_its_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use = {"source": "x.txt"}
    tables = {kind: {"train": use, "validation": use} for kind in ("harmful", "harmless")}

    def reachable(names: object) -> bool:
        raise AssertionError("asked")

    monkeypatch.setattr(specs, "hub_reachable", reachable)
    assert resolve_specs(tables, "auto").notice is None


def test_fingerprint_depends_on_words_order_and_system() -> None:
    one, two = Prompt("a"), Prompt("b")
    marks = [[one, two], [two, one], [one], [Prompt("a", "s"), two], [Prompt("a", ""), two]]
    assert len({fingerprint(mark) for mark in marks}) == len(marks)
    assert fingerprint([one]) == fingerprint([Prompt("a")])
    assert len(fingerprint([])) == 64


def test_a_spec_refuses_what_means_nothing() -> None:
    with pytest.raises(ValueError, match="limit\n\\s+Input should be greater than or equal to 1"):
        DatasetSpec("x", limit=0)
    with pytest.raises(ValueError, match="String should have at least 1 character"):
        DatasetSpec("")
