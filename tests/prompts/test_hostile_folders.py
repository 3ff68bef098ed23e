"""Folders of prompts that name files elsewhere."""

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
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - path: [{files}]\n---\n"
    (folder / "README.md").write_text(card)
    assert "README.md names data files elsewhere" in error_of(DatasetSpec(str(folder)))
    (folder / "README.md").unlink()
    (folder / "link.txt").symlink_to("train.txt")
    assert load_prompts(DatasetSpec(str(folder)))
    (folder / "test.txt").symlink_to(tmp_path / "secret.txt")
    assert "test.txt is a link that leads out" in error_of(DatasetSpec(str(folder)))


def test_a_card_that_names_one_part_many_times_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one\n")
    lines = ["a: &a0 [x]", *(f"b{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    card = "\n".join(["---", *lines, "configs: *a59", "---"])
    (tmp_path / "README.md").write_text(card)
    assert error_of(DatasetSpec(str(tmp_path))).endswith("names one part twice (a YAML alias)")
