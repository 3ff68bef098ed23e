"""A saved model's folder goes to a hub on loopback, by the hub's real client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from card_facts import facts
from hub_server import TOKEN
from huggingface_hub import ModelCard

from heretic_kl.cli import main as cli
from heretic_kl.errors import ExportError, NotEmptyError, UploadError
from heretic_kl.export import (
    CardPicture,
    Target,
    add_figures,
    check_upload,
    saved_folder,
    upload,
    write_card,
    write_reproduction,
)


def saved(folder: Path, form: str = "merged") -> Path:
    """What `save` writes, with weights of a few bytes."""
    folder.mkdir()
    prefix, mark = ("adapter_model", "adapter_config") if form == "lora" else ("model", "config")
    (folder / f"{prefix}.safetensors").write_bytes(b"weights of " + form.encode())
    (folder / f"{mark}.json").write_text("{}")
    (folder / "reproduce").mkdir()
    (folder / "reproduce/learned.safetensors").write_bytes(b"operators")
    write_card(folder, facts(form=form))
    write_reproduction(folder, facts(form=form))
    return folder


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "edited")


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def run(capsys, *words):
    """Exit code, stdout, stderr of a command; the token is in neither."""
    code = cli.main(["upload", *map(str, words)])
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err and "Traceback" not in captured.err
    return code, captured.out, captured.err


def one_error(capsys, *words):
    code, out, err = run(capsys, *words)
    (line,) = [line for line in err.splitlines() if line.startswith("heretic-kl: error:")]
    assert code == 1 and out == "" and err.splitlines()[-1] == line
    return line


@pytest.mark.parametrize("form", ["merged", "lora"])
def test_a_model_goes_to_a_private_repository_of_the_folders_name(hub, tmp_path, capsys, form):
    folder = saved(tmp_path / "edited", form)
    add_figures(folder, [CardPicture("trade-off", b"png", "a", "b")])
    (folder / "notes.txt").write_text("mine")
    code, out, err = run(capsys, folder)
    assert (code, out) == (0, f"uploaded {folder} to {hub.url}/me/edited (private)\n")
    assert "not uploaded, because heretic-kl did not write it: 'notes.txt'" in err
    assert hub.repositories["me/edited"].private
    there = contents(folder)
    del there["notes.txt"]
    assert hub.files("me/edited") == {".gitattributes": b"", **there}
    data = ModelCard(hub.files("me/edited")["README.md"].decode()).data
    assert data.base_model == "someone/tiny" and len(data.eval_results) == 2
    assert data["base_model_relation"] == ("adapter" if form == "lora" else "finetune")
    (commit,) = hub.repositories["me/edited"].commits
    assert commit["summary"].startswith(f"Trial 17, {form}: heretic-kl ")


def test_a_program_is_told(hub, folder, capsys):
    code, out, _ = run(capsys, folder, "--repo", "team/model", "--public", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    (uploaded,) = [line for line in lines if line["event"] == "model_uploaded"]
    assert code == 0 and not uploaded["private"] and uploaded["files"] == 5
    assert uploaded["repo"] == "team/model" and len(uploaded["commit"]) == 40
    assert not hub.repositories["team/model"].private


def test_a_repository_with_files_is_replaced_only_if_that_is_said(hub, folder, tmp_path, capsys):
    other = saved(tmp_path / "other", "lora")
    assert run(capsys, other, "--repo", "model")[0] == 0
    before = dict(hub.files("me/model"))
    line = one_error(capsys, folder, "--repo", "model")
    assert "me/model is not empty (branch main, 5 files): nothing was uploaded" in line
    assert hub.files("me/model") == before
    words = ["--repo", "model", "--overwrite", "--message", "again"]
    assert run(capsys, folder, *words)[0] == 0
    assert hub.files("me/model") == {".gitattributes": b"", **contents(folder)}
    assert hub.repositories["me/model"].commits[-1]["summary"] == "again"


def test_another_branch_leaves_main_as_it_is(hub, folder, tmp_path, capsys):
    other = saved(tmp_path / "other", "lora")
    assert run(capsys, other, "--repo", "model")[0] == 0
    code, out, _ = run(capsys, folder, "--repo", "model", "--branch", "trial-17")
    assert code == 0 and f"{hub.url}/me/model/tree/trial-17 " in out
    assert hub.files("me/model") == {".gitattributes": b"", **contents(other)}
    assert hub.files("me/model", "trial-17") == {".gitattributes": b"", **contents(folder)}
    assert "branch trial-17" in one_error(capsys, folder, "--repo", "model", "--branch", "trial-17")


def test_a_public_repository_is_not_used_for_what_was_to_be_private(hub, folder, capsys):
    hub.everything_is_public = True  # one that is there, and one that an organization's rules made
    for _ in range(2):
        line = one_error(capsys, folder, "--repo", "org/open")
        assert "org/open is public, and a private repository was asked for" in line
        assert hub.files("org/open") == {".gitattributes": b""}
    assert run(capsys, folder, "--repo", "org/open", "--public")[0] == 0


def test_public_does_not_open_what_is_private(hub, folder, capsys):
    assert run(capsys, folder)[0] == 0
    code, _, err = run(capsys, folder, "--public", "--overwrite")
    assert code == 0 and "me/edited was private before and stays so" in err
    assert hub.repositories["me/edited"].private


def test_somebody_elses_commit_is_not_overwritten(hub, folder, monkeypatch, capsys):
    assert run(capsys, folder)[0] == 0
    respond = hub.respond

    def commit_meanwhile(method, path, body, authorization):
        if path.endswith("preupload/main"):
            hub.files("me/edited")["theirs.txt"] = b"new"
        return respond(method, path, body, authorization)

    monkeypatch.setattr(hub, "respond", commit_meanwhile)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "more\n")
    assert "the hub answered 412" in one_error(capsys, folder, "--overwrite")
    assert hub.files("me/edited")["theirs.txt"] == b"new"


def test_the_hubs_warnings_are_notes(hub, folder, capsys):
    hub.warnings = ["license is not\nan identifier"]
    code, _, err = run(capsys, folder)
    assert code == 0 and "license is not an identifier" in err


class TestTokens:
    def test_nobody_is_logged_in(self, hub, folder, capsys, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        line = one_error(capsys, folder)
        assert "not logged in to the hub: log in with `hf auth login`, or set HF_TOKEN" in line
        assert hub.asked == []

    def test_the_token_of_a_login_is_taken(self, hub, folder, capsys, monkeypatch, tmp_path):
        monkeypatch.delenv("HF_TOKEN")
        (tmp_path / "token").write_text(TOKEN)
        assert run(capsys, folder)[0] == 0

    def test_one_that_may_only_read(self, hub, folder, capsys):
        hub.role = "read"
        assert f"may only read: make one that writes at {hub.url}/" in one_error(capsys, folder)
        assert hub.asked == ["GET /api/whoami-v2"]

    def test_one_that_the_hub_refuses_and_repeats_in_its_answer(self, hub, folder, capsys):
        hub.token = "another"
        line = one_error(capsys, folder)
        assert "the hub does not accept the token" in line and "hf auth login" in line

    @pytest.mark.parametrize("token", [f"{TOKEN}\x01x", f"{TOKEN} with blanks", "secret\x7fword"])
    def test_one_that_no_header_can_hold(self, hub, folder, capsys, monkeypatch, token):
        monkeypatch.setenv("HF_TOKEN", token)
        assert token not in one_error(capsys, folder)

    def test_a_traceback_that_was_asked_for_holds_none(self, hub, folder, capsys, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x01x")
        assert cli.main(["upload", str(folder), "--debug"]) == 1
        captured = capsys.readouterr()
        assert "Traceback" in captured.err and TOKEN not in captured.out + captured.err


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("repos/create", 403, "the token may not do this (you may not write to? org: ***)"),
        ("repos/create", 402, "the hub answered 402: you may not write to? org: ***"),
        ("validate-yaml", 400, "Invalid metadata in README.md"),
        ("preupload/main", 403, "the token may not do this"),
        ("objects/batch", 413, "the hub answered 413"),
        ("commit/main", 409, "the hub answered 409"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, folder, capsys, path, status, message):
    before = contents(folder)
    said = f"you may not write\nto\x1b org: {TOKEN}"
    hub.answers[path] = (status, {}, json.dumps({"error": said, "errors": [{"message": said}]}))
    assert message in one_error(capsys, folder, "--repo", "org/model")
    assert contents(folder) == before
    hub.answers.clear()
    assert run(capsys, folder, "--repo", "org/model")[0] == 0, "the same command goes on"


def test_no_hub_is_one_line(hub, folder, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert "asking the hub at http://127.0.0.1:1 failed: " in one_error(capsys, folder)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    hub.answers["whoami-v2"] = (200, {}, "<html>log in to this network</html>")
    assert f"no hub answers at {hub.url}" in one_error(capsys, folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids asking the hub" in one_error(capsys, folder)


@pytest.mark.parametrize("name", ["bad name", "a/b/c", "-x"])
def test_a_name_that_the_hub_does_not_know_is_one_line(hub, folder, capsys, name):
    assert name in one_error(capsys, folder, f"--repo={name}")
    assert hub.repositories == {}


class TestFolders:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda f: (f / "model.safetensors").unlink(), "'model.safetensors' is missing"),
            (lambda f: (f / "model.safetensors").write_bytes(b"weights of merges"), "is not the f"),
            (lambda f: (f / "config.json").write_text("{ }"), "'config.json' in "),
            (lambda f: (f / "README.md").unlink(), "the card README.md is missing"),
            (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "front matter cannot"),
            (lambda f: (f / "reproduce.json").unlink(), "no folder of a saved model"),
            (lambda f: (f / "reproduce.json").write_text("{}"), "not a reproduction file"),
            (lambda f: (f / "link").symlink_to("/etc/hosts"), "is a link"),
            (lambda f: (f / "README.md").write_text(TOKEN), "looks like a token"),
        ],
    )
    def test_a_folder_that_is_not_what_was_saved(self, hub, folder, capsys, spoil, message):
        spoil(folder)
        assert message in one_error(capsys, folder)
        assert hub.asked == []

    @pytest.mark.parametrize("name", ["../secret", "/etc/hosts", "sub/../../secret"])
    def test_a_list_that_leads_out_of_the_folder(self, folder, tmp_path, name):
        (tmp_path / "secret").write_text("x")
        _list_also(folder, name, {"bytes": 1, "sha256": "0"})
        with pytest.raises(ExportError, match=f"'{name}' is missing"):
            saved_folder(folder)

    def test_a_list_with_a_pickle(self, folder):
        (folder / "pytorch_model.bin").write_bytes(b"x")
        _list_also(folder, "pytorch_model.bin", {"bytes": 1, "sha256": "0"})
        with pytest.raises(ExportError, match="only safetensors are published"):
            saved_folder(folder)

    def test_pickles_beside_the_model_stay_here(self, folder):
        (folder / "pytorch_model.bin").write_bytes(b"x")
        assert saved_folder(folder).left_out == ("pytorch_model.bin",)

    def test_a_list_without_weights(self, folder):
        path = folder / "reproduce.json"
        content = json.loads(path.read_text())
        del content["files"]["model.safetensors"]
        path.write_text(json.dumps(content))
        with pytest.raises(ExportError, match="its weights are not listed"):
            saved_folder(folder)

    def test_no_folder(self, hub, tmp_path, capsys):
        assert "no folder" in one_error(capsys, tmp_path / "none")
        assert cli.main(["upload"]) == 2

    def test_an_original_that_was_a_local_folder_is_said(self, hub, tmp_path, capsys):
        folder = saved(tmp_path / "edited")
        write_card(folder, facts(base_is_hub_id=False, base_name="tiny"))
        code, _, err = run(capsys, folder)
        assert code == 0 and "the card names no base model" in err


def _list_also(folder: Path, name: str, entry: dict) -> None:
    path = folder / "reproduce.json"
    content = json.loads(path.read_text())
    content["files"][name] = entry
    path.write_text(json.dumps(content))


def test_looking_first_changes_nothing(hub, folder):
    target = check_upload(Target("model"))
    assert target == Target("me/model") and hub.repositories == {}
    upload(saved_folder(folder), target)
    with pytest.raises(NotEmptyError, match="me/model is not empty"):
        check_upload(Target("model"))
    assert check_upload(Target("model", overwrite=True)).repo == "me/model"
    hub.repositories["me/model"].private = False
    with pytest.raises(UploadError, match="is public"):
        check_upload(Target("model", overwrite=True))


def test_the_program_obeys_the_environment(hub, folder, tmp_path):
    """HF_ENDPOINT and a token file, as users have them; nothing is replaced inside."""
    (tmp_path / "token").write_text(TOKEN)
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN_PATH": str(tmp_path / "token")}
    environment |= {"HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-m", "heretic_kl", "upload", str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"uploaded {folder} to {hub.url}/me/edited (private)\n"
    assert hub.files("me/edited") == {".gitattributes": b"", **contents(folder)}
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("status", [401, 403])
def test_a_storage_of_chunks_that_gives_no_access_is_one_line(
    hub, folder, capsys, monkeypatch, status
):
    """The way that most users' large files take: Xet, whose client is another program."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.answers["xet-write-token/main"] = (status, {}, json.dumps({"error": f"no {TOKEN}"}))
    line = one_error(capsys, folder)
    assert "failed: " in line or "the token" in line  # newer and older versions of the client
    assert any(asked.endswith("xet-write-token/main") for asked in hub.asked)
    assert hub.files("me/edited") == {".gitattributes": b""}
