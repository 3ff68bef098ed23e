"""Whole or not at all, also where a process is killed halfway."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from heretic_kl import files
from heretic_kl.files import (
    cache_folder,
    free_folder,
    holds_files,
    new_file,
    new_folder,
    sha256_file,
    write_text,
)

KILLED_WRITING = """
import os, signal, sys
from pathlib import Path
from heretic_kl.files import new_folder
with new_folder(Path(sys.argv[1])) as partial:
    (partial / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_RENAMING = """
import os, signal, sys
from pathlib import Path
from heretic_kl.files import new_folder
rename = Path.rename
def killed(self, target):
    if ".partial-" in self.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killed
with new_folder(Path(sys.argv[1])) as partial:
    (partial / "config.json").write_text("new")
"""
LIVING = """
import sys
from pathlib import Path
from heretic_kl.files import new_folder
with new_folder(Path(sys.argv[1])) as partial:
    (partial / "config.json").write_text("slow")
    print("writing", flush=True)
    sys.stdin.readline()
"""


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_in(script: str, target: Path) -> None:
    run = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_the_next_write_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    target = tmp_path / "model"
    kill_in(KILLED_WRITING, target)
    (left,) = listing(tmp_path)
    assert left.startswith(".model.partial-")
    with new_folder(target) as partial:
        (partial / "config.json").write_text("new")
    assert listing(tmp_path) == ["model"]


def test_a_folder_moved_away_by_a_killed_write_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    kill_in(KILLED_RENAMING, target)
    assert not target.exists() and len(listing(tmp_path)) == 2
    files.remove_leftovers(target)
    assert listing(tmp_path) == ["model"]
    assert (target / "config.json").read_text() == "old"


def test_a_living_process_keeps_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with subprocess.Popen(
        [sys.executable, "-c", LIVING, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        files.remove_leftovers(target)
        assert len(listing(tmp_path)) == 1
        process.communicate("\n")
    assert process.returncode == 0
    assert (target / "config.json").read_text() == "slow"


def test_all_is_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    by_descriptor: dict[int, str] = {}
    fsync, open_, rename = os.fsync, os.open, Path.rename

    def opened(path, *rest, **options):  # type: ignore[no-untyped-def]
        descriptor = open_(path, *rest, **options)
        by_descriptor[descriptor] = Path(path).name
        return descriptor

    def flushed(descriptor: int) -> None:
        order.append(by_descriptor[descriptor])
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        order.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    with new_folder(tmp_path / "model") as partial:
        (partial / "deeper").mkdir()
        (partial / "deeper" / "weights").write_text("w")
    assert order[:2] == ["weights", "deeper"] and order[2].startswith(".model.partial-")
    assert order[3:] == ["rename", tmp_path.name]


def test_text_replaces_text_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "card.md"
    write_text(path, "old")
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    with pytest.raises(RuntimeError), new_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "größer\n"
    assert listing(path.parent) == ["card.md"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_not_to_be_replaced_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, links: bool
) -> None:
    def refuse(*names: Path) -> None:
        raise OSError("no links")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "entry"
    with new_file(path, replace=False) as partial:
        partial.write_text("first")
    with pytest.raises(FileExistsError), new_file(path, replace=False) as partial:
        partial.write_text("second")
    assert path.read_text() == "first" and listing(tmp_path) == ["entry"]


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_our_own_variable_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERETIC_KL_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("HERETIC_KL_CACHE")
    assert cache_folder().name == "heretic-kl"


def test_a_free_folder_is_missing_or_empty(tmp_path):
    wanted = tmp_path / "model.v1"
    assert free_folder(wanted) == wanted
    wanted.mkdir()
    assert free_folder(wanted) == wanted and not holds_files(wanted)
    (wanted / "config.json").touch()
    (tmp_path / "model.v1-2").touch()
    assert free_folder(wanted) == tmp_path / "model.v1-3" and holds_files(wanted)
    assert not holds_files(tmp_path / "model.v1-2")
    assert free_folder(Path()).name == "model-2"
