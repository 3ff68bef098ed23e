"""Folders of prompts that name files elsewhere."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow.parquet import write_table

from heretic_kl.errors import PromptError
from heretic_kl.prompts import DatasetSpec, load_prompts, tables


def error_of(spec: DatasetSpec) -> str:
    with pytest.raises(PromptError) as raised:
        load_prompts(spec)
    return str(raised.value)


@pytest.mark.parametrize(
    "files", ["/etc/passwd", "../secret.txt", "https://there/x.csv", "a/../../x"]
)
def test_a_folder_that_names_files_elsewhere_is_refused(tmp_path: Path, files: str) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    (folder / "train.txt").write_text("one\n")
    (tmp_path / "secret.txt").write_text("a key\n")
    subset = f"config_name: default, data_files: [{{split: train, path: ['{files}']}}]"
    card = f"---\nconfigs:\n- {{{subset}}}\n---\n"
    (folder / "README.md").write_text(card)
    assert "README.md names data files elsewhere" in error_of(DatasetSpec(str(folder)))
    (folder / "README.md").write_text(card.replace(files, "train.txt"))
    assert load_prompts(DatasetSpec(str(folder)))
    (folder / ".huggingface.yaml").write_text(card.strip("-\n"))
    assert ".huggingface.yaml names data files elsewhere" in error_of(DatasetSpec(str(folder)))
    (folder / ".huggingface.yaml").unlink()
    (folder / ".x.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "README.md").write_text(card.replace(files, ".x.txt"))
    assert ".x.txt is a link that leads out" in error_of(DatasetSpec(str(folder)))
    (folder / ".x.txt").unlink()
    (folder / "README.md").unlink()
    (folder / "link.txt").symlink_to("train.txt")
    assert load_prompts(DatasetSpec(str(folder)))
    (folder / "test.txt").symlink_to(tmp_path / "secret.txt")
    assert "test.txt is a link that leads out" in error_of(DatasetSpec(str(folder)))


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_card_that_names_one_part_many_times_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.txt").write_text("one\n")
    lines = ["a: &a0 [x]", *(f"b{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    dashes = ["---"] if name == "README.md" else []
    (tmp_path / name).write_text("\n".join([*dashes, *lines, "configs: *a59", *dashes]))
    assert error_of(DatasetSpec(str(tmp_path))).endswith("names one part twice (a YAML alias)")
    merged = (f"b{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60))
    (tmp_path / name).write_text("\n".join([*dashes, "a: &a0 {x: 1}", *merged, *dashes]))
    assert "merges parts (<< in YAML)" in error_of(DatasetSpec(str(tmp_path)))


@pytest.mark.parametrize("elsewhere", ["../other/", "ABSOLUTE"])
def test_a_saved_dataset_that_names_files_elsewhere_is_refused(
    tmp_path: Path, elsewhere: str
) -> None:
    import datasets

    other = tmp_path / "other"
    rows = datasets.Dataset.from_dict({"text": ["a key"]})
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "whole")
    rows.save_to_disk(other)
    elsewhere = f"{other}/" if elsewhere == "ABSOLUTE" else elsewhere
    assert load_prompts(DatasetSpec(str(tmp_path / "whole")))
    state = tmp_path / "whole" / "train" / "state.json"
    (arrow,) = other.glob("*.arrow")
    saved = json.loads(state.read_text())
    changed = {**saved, "_data_files": [{"filename": f"{elsewhere}{arrow.name}"}]}
    state.write_text(json.dumps(changed))
    assert "state.json names data files elsewhere" in error_of(DatasetSpec(str(state.parent)))
    message = error_of(DatasetSpec(str(tmp_path / "whole")))
    assert f"{Path('train', 'state.json')} names data files elsewhere" in message
    state.write_text(json.dumps(saved))
    splits = json.dumps({"splits": [elsewhere.rstrip("/")]})
    (tmp_path / "whole" / "dataset_dict.json").write_text(splits)
    message = error_of(DatasetSpec(str(tmp_path / "whole")))
    assert "dataset_dict.json names data files elsewhere" in message
    (tmp_path / "whole" / "dataset_dict.json").write_text("[" * 100_000)
    assert error_of(DatasetSpec(str(tmp_path / "whole"))).endswith("its content cannot be read")


def test_a_parquet_file_is_no_larger_than_what_is_read(tmp_path: Path, monkeypatch) -> None:
    table = pyarrow.table({"text": ["one " * 1000] * 100})
    write_table(table, tmp_path / "p.parquet", use_dictionary=False)
    expanded = 100 * 4000
    assert (tmp_path / "p.parquet").stat().st_size < expanded / 10
    for source in (tmp_path / "p.parquet", tmp_path):
        monkeypatch.setattr(tables, "MOST_BYTES", 2 * expanded)
        assert len(load_prompts(DatasetSpec(str(source)))) == 100
        monkeypatch.setattr(tables, "MOST_BYTES", expanded // 2)
        assert "p.parquet: 100 rows, 0.0 GB uncompressed" in error_of(DatasetSpec(str(source)))
