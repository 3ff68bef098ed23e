"""Folders of prompts that name files elsewhere."""

import json
from pathlib import Path

import pytest

from heretic_kl.errors import PromptError
from heretic_kl.prompts import DatasetSpec, load_prompts


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
