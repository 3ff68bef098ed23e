"""A saved model is rebuilt from its reproduction file; what a hostile file asks for is not done."""

import json
import shutil
import tempfile

import datasets
import pytest
from prepared import prepare

from heretic_kl.errors import ReproductionError
from heretic_kl.export import read_reproduction


@pytest.fixture(scope="module")
def saved(workplace, searched, tmp_path_factory):
    """The folder of a saved model."""
    import contextlib
    import io
    import os

    from heretic_kl.cli import main as cli

    folder, before = tmp_path_factory.mktemp("saved") / "model", os.getcwd()
    os.chdir(workplace)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["save", "mine", "--trial", "2", "--save", str(folder)]) == 0
    os.chdir(before)
    return folder


def changed(saved, folder, change, *, weights=False):
    """A copy of the reproduction file, changed; with `weights`, of the whole model."""
    if weights:
        shutil.copytree(saved, folder)
    folder.mkdir(exist_ok=True)
    content = json.loads((saved / "reproduce.json").read_text(encoding="utf-8"))
    change(content)
    path = folder / "reproduce.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def result(lines):
    (content,) = [line["content"] for line in lines if line["event"] == "result"]
    return content


def test_a_saved_model_is_rebuilt_bit_for_bit(saved, call, events, tmp_path):
    words = ["reproduce", str(saved), "--model", "model", "--save", str(tmp_path / "again")]
    code, out, _ = call(*words)
    assert code == 0 and out.count("MATCH, bit for bit: every byte of the weights is the same") == 1
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    again = json.loads((tmp_path / "again" / "reproduce.json").read_text())
    before = json.loads((saved / "reproduce.json").read_text())
    for key in ("trial", "files", "identity", "test_scores"):
        assert again[key] == before[key], key


def test_an_adapter_is_rebuilt(workplace, searched, call, events, tmp_path):
    adapter, again = tmp_path / "adapter", tmp_path / "again"
    save = ["save", "mine", "--trial", "2", "--save", str(adapter), "--save-as", "lora"]
    assert call(*save)[0] == 0
    words = ["reproduce", str(adapter), "--model", "model", "--save", str(again)]
    code, out, err = call(*words)
    assert code == 0 and "MATCH, bit for bit: every byte of the weights is the same" in out, err
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / name).read_bytes() == (adapter / name).read_bytes()
    assert not (again / "model.safetensors").exists()
    before, after = (json.loads((f / "reproduce.json").read_text()) for f in (adapter, again))
    for key in ("trial", "files", "identity", "test_scores"):
        assert after[key] == before[key], key
    shutil.rmtree(again)

    def stronger(content):
        for kernel in content["trial"]["edit"]["kernels"].values():
            kernel["peak_weight"] += 0.5

    other = changed(adapter, tmp_path / "other", stronger)
    code, lines = events("reproduce", str(other), *words[2:])
    assert code == 4 and result(lines)["files"] == ["adapter_model.safetensors"]


def test_a_dataset_is_read_at_the_commit_that_was_recorded(
    saved, call, tmp_path, monkeypatch, workplace
):
    """A newer commit of it holds other prompts."""
    then, now = "1" * 40, "2" * 40
    texts = (workplace / "a.txt").read_text("utf-8").splitlines()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for commit, lines in ((then, texts), (now, texts[::-1])):
        prepare(tmp_path / "cache", commit, lines)

    def of_hub(content):
        table = content["settings"]["prompts"]["harmful"]["train"]
        table |= {"source": "org/set", "split": "train[:4]"}
        table["more"] = [{"source": "org/set", "split": "train[4:6]"}]
        for entry in content["prompts"]:
            if (entry["kind"], entry["use"]) == ("harmful", "train"):
                entry["revision"] = f"{then} + {then}"

    path = changed(saved, tmp_path / "hub", of_hub)
    code, out, err = call(
        "reproduce", str(path), "--model", "model", "--save", str(tmp_path / "again")
    )
    assert code == 0 and "MATCH, bit for bit" in out, err
    again = json.loads((tmp_path / "again" / "reproduce.json").read_text())
    revisions = {(e["kind"], e["use"]): e["revision"] for e in again["prompts"]}
    assert revisions["harmful", "train"] == f"{then} + {then}"


def test_a_recorded_revision_is_a_commit_or_is_left_out(saved, tmp_path):
    def odd(content):
        for entry, revision in zip(content["prompts"], ("../x", "main", 3), strict=False):
            entry["revision"] = revision

    settings, _ = read_reproduction(changed(saved, tmp_path / "odd", odd)).taken_settings()
    uses = [use for kind in settings["prompts"].values() for use in kind.values()]
    assert not any("revision" in table for table in uses)


def test_what_differs_is_said(saved, events, tmp_path):
    def other_edit(content):
        content["trial"]["edit"]["kernels"] = {
            "mlp": {"peak_weight": 1.5, "peak_position": 1.0, "floor_weight": 1.5, "reach": 4.0}
        }
        content["versions"]["torch"] = "0.0"
        content["identity"]["model weights"] = "0" * 64

    path = changed(saved, tmp_path / "other", other_edit)
    code, lines = events(
        "reproduce", str(path), "--model", "model", "--save", str(tmp_path / "again")
    )
    content = result(lines)
    assert code == 4 and not content["match"] and content["files"] == ["model.safetensors"]
    assert {d["what"] for d in content["differences"]} == {"torch", "model weights"}


def test_weights_that_rounding_changed_match_within_the_noise_floor(saved, events, tmp_path):
    """The saved model lies beside the file, so the two are measured against each other."""
    from safetensors.torch import load_file, save_file

    from heretic_kl.files import sha256_file

    folder = tmp_path / "rounded"
    shutil.copytree(saved, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name] * (1 + 1e-7)
    save_file(tensors, weights, metadata={"format": "pt"})

    def update(content):
        content["files"]["model.safetensors"]["sha256"] = sha256_file(weights)

    path = changed(saved, folder, update)
    words = ["reproduce", str(path), "--model", "model", "--save", str(tmp_path / "again")]
    code, lines = events(*words)
    content = result(lines)
    assert code == 0 and content["verdict"] == "within the noise floor"
    assert 0 < content["kl"] <= content["noise_floor"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("trial"), "not a reproduction file"),
        (lambda c: c.update(format=99), "format: "),
        (lambda c: c["trial"].update(number="\x1b[2J"), "trial.number: "),
        (lambda c: c["trial"]["parameters"].update({"a\nb": 1}), "control characters"),
        (lambda c: c["base"].update(revision="-x; rm"), "base.revision: "),
        (lambda c: c["trial"]["edit"].update(direction_position="nan"), "finite numbers"),
        (lambda c: c["trial"]["edit"].update(norm="exec"), "trial.edit.norm: "),
        (lambda c: c.update(files={"x": {"bytes": 1}}), "files.x.sha256: "),
    ],
)
def test_a_file_that_is_wrong_is_one_line(saved, tmp_path, change, message):
    path = changed(saved, tmp_path / "wrong", change)
    with pytest.raises(ReproductionError) as error:
        read_reproduction(path)
    assert message in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("text", ["", "[]", "{" * 100_000, '{"trial": NaN}', "not json"])
def test_what_is_no_reproduction_file_is_one_line(tmp_path, text):
    (tmp_path / "reproduce.json").write_text(text)
    with pytest.raises(ReproductionError, match="JSON file|not a reproduction file"):
        read_reproduction(tmp_path)
    with pytest.raises(ReproductionError, match="No such file"):
        read_reproduction(tmp_path / "gone")


@pytest.mark.parametrize(
    "source", ["/etc/passwd", "../secret.txt", "~/notes.txt", "a/../../b", "C:\\x", ".hidden"]
)
@pytest.mark.parametrize("place", ["prompts", "further source", "JSON text", "scorer"])
def test_a_file_may_not_name_paths(saved, tmp_path, source, place):
    def change(content):
        if place == "prompts":
            content["settings"]["prompts"]["harmful"]["train"]["source"] = source
        elif place == "further source":
            content["settings"]["prompts"]["harmful"]["train"]["more"] = [{"source": source}]
        elif place == "JSON text":
            text = json.dumps([{"source": source}])
            content["settings"]["prompts"]["harmful"]["train"]["more"] = text
        else:
            table = content["settings"]["scorers"]["teacher_forced_kl"]
            table["settings"]["prompts"] = {"source": source}

    wanted = read_reproduction(changed(saved, tmp_path / "paths", change))
    with pytest.raises(ReproductionError, match="may not name paths"):
        wanted.taken_settings()


def test_nothing_in_a_file_is_run_or_written_elsewhere(saved, call, tmp_path, monkeypatch):
    """Plug-ins, code of a model, templates, storages and folders that a file names are left out."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    trap, out = tmp_path / "trap.py", tmp_path / "elsewhere"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    template = tmp_path / "trap.jinja"
    template.write_text("{{ ''.__class__ }}")

    def hostile(content):
        settings = content["settings"]
        settings["scorers"]["trap"] = {"use": f"{trap}:Trap", "role": "monitor"}
        judge = {"endpoint": "http://127.0.0.1:9/v1", "model": "m", "key_variable": "PATH"}
        settings["scorers"]["spy"] = {"use": "judge", "role": "monitor", "settings": judge}
        settings |= {
            "trust_remote_code": True,
            "chat_template": str(template),
            "study_dir": str(out),
            "storage": f"sqlite:///{out}.db",
            "study_name": "../../escaped",
            "save": str(out),
            "overwrite": True,
            "base": str(out),
            "pick": "knee",
        }
        content["settings"] = settings
        content["name"] = "../../escaped"
        content["command"] = f"heretic-kl --config {trap} $(touch {tmp_path / 'sprung'})"
        content["files"]["../../escaped"] = {"bytes": 1, "sha256": "0"}

    path = changed(saved, tmp_path / "hostile", hostile)
    before = {p.name for p in tmp_path.iterdir()}
    words = ["reproduce", str(path), "--model", "model", "--save", str(tmp_path / "again")]
    code, stdout, stderr = call(*words)
    assert code == 0 and "MATCH" in stdout
    for line in (
        "scorer trap brings code of its own",
        "scorer spy sends responses elsewhere",
        "name yours with --chat-template",
        "brings code",
    ):
        assert line in stderr
    assert {p.name for p in tmp_path.iterdir()} == before | {"again"}
    assert not list((tmp_path / "scratch").iterdir())


def test_a_local_original_has_to_be_named(saved, call):
    code, _, err = call("reproduce", str(saved))
    assert code == 1 and "name yours with --model" in err
    assert call("reproduce")[0] == 2


def test_the_older_file_is_read(saved, tmp_path):
    def older(content):
        content.update(format=2)
        for key in ("identity", "calibration"):
            del content[key]

    path = changed(saved, tmp_path / "older", older)
    path.rename(path.with_name("heretic-kl.json"))
    settings, _ = read_reproduction(tmp_path / "older").taken_settings()
    assert settings["dtype"] == "float32" and settings["batch_size"] == "4"
