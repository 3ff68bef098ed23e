"""The picker's menus that save, upload and measure a trial."""

from pathlib import Path

import pytest
from picker_keys import BACK, CTRL_C, CTRL_U, DOWN, ENTER, LORA, MEASURE, UP, drive
from prompt_toolkit.input import PipeInput
from ui_samples import FakeSession

from heretic_kl.errors import ExportError, NotEmptyError, StudyError, UploadError


def test_saving_takes_the_default_folder(keys: PipeInput, session: FakeSession) -> None:
    settled: list[int] = []
    drive(keys, session, ENTER + ENTER + ENTER + CTRL_C, settle=lambda: settled.append(1))
    assert session.saves == [(0, Path("nowhere/trial"), "merged", False)]
    assert len(settled) == 2


def test_a_typed_folder_and_an_adapter(
    keys: PipeInput, session: FakeSession, tmp_path: Path
) -> None:
    target = tmp_path / "mine"
    drive(keys, session, UP + ENTER + LORA + CTRL_U + str(target) + ENTER + CTRL_C)
    assert session.saves == [(1, target, "lora", False)]


def test_home_is_expanded(
    keys: PipeInput, session: FakeSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    drive(keys, session, ENTER + ENTER + CTRL_U + "~/x" + ENTER + CTRL_C)
    assert session.saves[0][1] == tmp_path / "x"


@pytest.mark.parametrize(("answer", "overwrites"), [("y", [True]), ("n", []), (ENTER, [])])
def test_a_folder_with_files_is_asked_about(
    keys: PipeInput, session: FakeSession, tmp_path: Path, answer: str, overwrites: list[bool]
) -> None:
    (tmp_path / "model.safetensors").touch()
    printed = drive(keys, session, ENTER + ENTER + ENTER + answer + CTRL_C, folder=tmp_path)
    assert [save[3] for save in session.saves] == overwrites
    assert ("not saved" in printed) is not bool(overwrites)


@pytest.mark.parametrize("leave", [CTRL_C, CTRL_U + ENTER])
def test_no_folder_is_no_save(keys: PipeInput, session: FakeSession, leave: str) -> None:
    drive(keys, session, ENTER + ENTER + leave + CTRL_C)
    assert session.saves == []


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        (ExportError("disk full at [out]"), "error: disk full at [out]"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), "stopped; nowhere/trial may hold part of a model"),
    ],
)
def test_trouble_is_a_line_and_the_menu_comes_back(
    keys: PipeInput, session: FakeSession, trouble: BaseException, line: str
) -> None:
    session.trouble = trouble
    printed = drive(keys, session, ENTER + ENTER + ENTER + ENTER + ENTER + CTRL_C)
    assert printed.count(line) == 1
    assert len(session.saves) == 2, "the second one went through"


SAVE = ENTER + ENTER
UPLOAD = UP * 2 + ENTER
"""From the first entry of a menu: the last one but `back`."""


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        (SAVE + UPLOAD + ENTER, "trial"),  # the folder's name
        (SAVE + UPLOAD + CTRL_U + " team/mine " + ENTER, "team/mine"),
        (SAVE + UPLOAD + CTRL_U + ENTER, None),
        (UPLOAD, None),  # nothing is saved yet: it is another entry
    ],
)
def test_a_saved_model_can_be_uploaded(
    keys: PipeInput, session: FakeSession, text: str, repo: str | None
) -> None:
    uploads: list[tuple[Path, str, bool]] = []

    def upload(folder: Path, repo: str, overwrite: bool) -> None:
        uploads.append((folder, repo, overwrite))

    drive(keys, session, ENTER + text + CTRL_C, upload=upload)
    assert uploads == ([] if repo is None else [(Path("nowhere/trial"), repo, False)])


@pytest.mark.parametrize(("answer", "overwrites"), [("y", [False, True]), ("n", [False])])
def test_a_repository_with_files_is_asked_about(
    keys: PipeInput, session: FakeSession, answer: str, overwrites: list[bool]
) -> None:
    asked: list[bool] = []

    def upload(folder: Path, repo: str, overwrite: bool) -> None:
        asked.append(overwrite)
        if not overwrite:
            raise NotEmptyError("it holds files")

    text = ENTER + SAVE + UPLOAD + ENTER + answer + CTRL_C
    printed = drive(keys, session, text, upload=upload)
    assert asked == overwrites
    assert ("not uploaded" in printed) is (answer == "n")


@pytest.mark.parametrize("trouble", [UploadError("not logged in"), KeyboardInterrupt()])
def test_an_upload_that_fails_is_a_line(
    keys: PipeInput, session: FakeSession, trouble: BaseException
) -> None:
    def upload(folder: Path, repo: str, overwrite: bool) -> None:
        raise trouble

    text = ENTER + SAVE + UPLOAD + ENTER + ENTER + ENTER + CTRL_C
    printed = drive(keys, session, text, upload=upload)
    assert "error: not logged in" in printed or "the model is in nowhere/trial" in printed


def test_what_was_not_saved_is_not_uploaded(keys: PipeInput, session: FakeSession) -> None:
    session.trouble = ExportError("disk full")
    uploads: list[object] = []
    text = ENTER + SAVE + UPLOAD + CTRL_C
    drive(keys, session, text, upload=lambda *words: uploads.append(words))
    assert uploads == []


def test_measuring_shows_the_scores_and_is_offered_once(
    keys: PipeInput, session: FakeSession
) -> None:
    printed = drive(keys, session, ENTER + MEASURE + BACK)
    assert session.tested.keys() == {0}
    assert "test prompts: refusals 4/64" in printed
    printed = drive(keys, session, ENTER + DOWN * 6 + ENTER)
    assert "measuring" not in printed


@pytest.mark.parametrize("trouble", [StudyError("storage is gone"), KeyboardInterrupt()])
def test_a_measurement_that_fails(
    keys: PipeInput, session: FakeSession, trouble: BaseException
) -> None:
    session.trouble = trouble
    printed = drive(keys, session, ENTER + MEASURE + CTRL_C)
    assert session.tested == {}
    assert "storage is gone" in printed or "nothing was kept of it" in printed
