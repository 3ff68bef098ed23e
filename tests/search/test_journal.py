"""A journal file is shared, and outlives whoever is killed while writing to it."""

import errno
import fcntl
import os
import signal
import threading
import time

import optuna
import pytest
from optuna.storages.journal import JournalStorage

from heretic_kl.search.storage.journal import SharedJournalFile, locked

DIRECTIONS = [optuna.study.StudyDirection.MINIMIZE]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.journal"


def opened(path):
    return JournalStorage(SharedJournalFile(path))


@pytest.mark.parametrize("torn", [b'{"op_code": 8, "trial_id": 5, "user_a', b"\0" * 200_000])
def test_a_torn_last_line_is_cut_off_while_others_write(path, torn):
    first, second = opened(path), opened(path)
    study_id = first.create_new_study(DIRECTIONS, "s")
    assert second.get_study_id_from_name("s") == study_id
    with path.open("ab") as file:
        file.write(torn)
    assert first.get_study_user_attrs(study_id) == {}  # readable meanwhile
    second.set_study_user_attr(study_id, "a", 1)
    first.set_study_user_attr(study_id, "b", 2)
    for storage in (first, second, opened(path)):
        assert storage.get_study_user_attrs(study_id) == {"a": 1, "b": 2}
    assert torn not in path.read_bytes()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_writer_leaves_no_lock(path, monkeypatch):
    storage = opened(path)
    child = os.fork()
    if child == 0:
        with path.open("rb+", buffering=0) as file, locked(file, path):
            file.seek(0, os.SEEK_END)
            file.write(b'{"half": ')
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for the dead"))
    storage.create_new_study(DIRECTIONS, "s")
    assert [study.study_name for study in opened(path).get_all_studies()] == ["s"]


def test_a_line_that_the_disk_has_no_room_for_is_cut_off(path, monkeypatch):
    storage = opened(path)
    study_id = storage.create_new_study(DIRECTIONS, "s")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            storage.set_study_user_attr(study_id, "a", 1)
    assert path.read_bytes() == before
    storage.set_study_user_attr(study_id, "b", 2)
    assert opened(path).get_study_user_attrs(study_id) == {"b": 2}


def test_a_lock_file_that_another_process_removed_is_no_error(path, monkeypatch):
    """A writer without the system's locks was held up for longer than others wait."""
    monkeypatch.setattr("heretic_kl.search.storage.journal.fcntl", None)
    path.touch()
    with path.open("rb+") as file, locked(file, path):
        path.with_name("s.journal.lock").unlink()


@pytest.mark.parametrize("locks", [True, False])
def test_lines_of_several_writers_stay_whole(path, monkeypatch, locks):
    if not locks:

        def no_locks(*arguments):
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(fcntl, "flock", no_locks)
    study_id = opened(path).create_new_study(DIRECTIONS, "s")

    def write(name):
        storage = opened(path)
        for number in range(20):
            storage.set_study_user_attr(study_id, f"{name}{number}", name * 1000)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened(path).get_study_user_attrs(study_id)) == 60
    assert not path.with_name("s.journal.lock").exists()
