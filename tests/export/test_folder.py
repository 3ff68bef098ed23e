from __future__ import annotations

import errno
import os
from collections import namedtuple

import pytest
from safetensors import SafetensorError
from tiny_edits import make_plan

from heretic_kl.errors import ExportError
from heretic_kl.export import folder as folder_module
from heretic_kl.export import merge, save_lora, save_merged
from heretic_kl.export.folder import new_folder, readable_size, write_text

SAVES = [save_merged, save_lora]


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("save", SAVES)
def test_a_folder_that_is_not_empty_is_refused(build, tmp_path, save):
    lm = build()
    target = tmp_path / "new"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty.*--overwrite"):
        save(lm, make_plan(lm), target)
    with pytest.raises(ExportError, match="something other than a saved model"):
        save(lm, make_plan(lm), target, overwrite=True)
    assert listing(target) == ["mine.txt"]


@pytest.mark.parametrize("save", SAVES)
def test_overwriting_replaces_the_whole_folder(build, tmp_path, save):
    lm = build()
    target = tmp_path / "new"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "old.txt").write_text("old")
    save(lm, make_plan(lm), target, overwrite=True)
    assert "old.txt" not in listing(target)
    assert listing(tmp_path) == ["new", "original"]


def test_an_empty_folder_and_missing_parents_are_fine(build, tmp_path):
    lm = build()
    (tmp_path / "empty").mkdir()
    save_merged(lm, make_plan(lm), tmp_path / "empty")
    save_merged(lm, make_plan(lm), tmp_path / "a" / "b")
    assert "config.json" in listing(tmp_path / "a" / "b")


@pytest.mark.parametrize("save", SAVES)
def test_a_file_in_the_way_is_refused(build, tmp_path, save):
    lm = build()
    (tmp_path / "new").write_text("file")
    with pytest.raises(ExportError, match="a file of that name"):
        save(lm, make_plan(lm), tmp_path / "new", overwrite=True)


@pytest.mark.parametrize("save", SAVES)
def test_free_space_is_checked_before_anything_is_written(build, tmp_path, monkeypatch, save):
    lm = build()
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 20, 20)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ExportError, match=r"disk is full \(needs about .* kB, 20 bytes were free\)"
    ):
        save(lm, make_plan(lm), tmp_path / "new")
    assert listing(tmp_path) == ["original"]


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ExportError, "disk is full"),
        (SafetensorError("I/O error: No space left on device"), ExportError, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), ExportError, "Permission denied"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (RuntimeError("a defect"), RuntimeError, "a defect"),
    ],
)
def test_a_failure_leaves_nothing_behind_and_the_old_model_in_place(
    build, unchanged, tmp_path, monkeypatch, error, raised, text
):
    lm = build(max_shard_size="30KB")
    unchanged(lm)
    target = tmp_path / "new"
    save_merged(lm, {}, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    calls = []

    def rewrite(shard, target, edits, dtype):
        calls.append(target)
        target.write_bytes(b"part")
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(merge, "rewrite", rewrite)
    with pytest.raises(raised, match=text) as caught:
        save_merged(lm, make_plan(lm), target, overwrite=True)
    assert len(calls) == 2
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["new", "original"]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "new"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = type(target).rename

    def refuse(self, other):
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(type(target), "rename", refuse)
    with (
        pytest.raises(ExportError, match="Input/output error"),
        new_folder(target, overwrite=True, needed_bytes=0) as partial,
    ):
        (partial / "config.json").write_text("new")
    monkeypatch.undo()
    assert listing(tmp_path) == ["new"]
    assert (target / "config.json").read_text() == "old"


def test_an_unwritable_parent_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ExportError, match="cannot save to .*: "),
        new_folder(tmp_path / "file" / "new", overwrite=False, needed_bytes=0),
    ):
        raise AssertionError("not reached")


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "card.md"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(ExportError, match="cannot write"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["card.md"]


def test_sizes_for_people():
    assert readable_size(12) == "12 bytes"
    assert readable_size(270_000_000) == "270.0 MB"
    assert readable_size(3 * 10**12) == "3.0 TB"
