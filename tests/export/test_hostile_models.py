"""Models made to write or copy outside their folder: each is refused before it is loaded."""

import json
import shutil
import sys

import pytest
from tiny_edits import make_plan

from heretic_kl.errors import ExportError, ModelError, UnsupportedModelError
from heretic_kl.export import save_merged
from heretic_kl.model import ModelSource, load_model, load_to_measure
from heretic_kl.model.loading.source import check_cached, check_exists
from heretic_kl.testing import load_tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def original(build, tmp_path):
    """A model in several files, beside a file that is nobody else's business."""
    build(max_shard_size="30KB")
    (tmp_path / "secret").write_text("a key")
    return tmp_path / "original"


def rename_shard(folder, name):
    """The index calls its first shard by another name, under which it stands too."""
    index = json.loads((folder / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    for tensor, shard in index["weight_map"].items():
        if shard == first:
            index["weight_map"][tensor] = name
    (folder / INDEX).write_text(json.dumps(index))
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / first, target)
    return target


def refused(folder):
    with pytest.raises(UnsupportedModelError) as raised:
        check_exists(ModelSource(str(folder)))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/../../x.safetensors", "ABSOLUTE"])
def test_an_index_that_names_files_outside_is_refused(original, tmp_path, name):
    name = str(tmp_path / "elsewhere" / "x.safetensors") if name == "ABSOLUTE" else name
    (original / "sub").mkdir()
    target = rename_shard(original, name)
    before = target.read_bytes()
    assert "is not a file in the model's folder" in refused(original)
    assert target.read_bytes() == before


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a\\..\\x.safetensors"])
def test_a_config_that_names_weights_outside_is_refused(original, name):
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    assert "which config.json names, is not a file in the model's folder" in refused(original)


def test_an_index_that_names_a_pickle_is_refused(original):
    rename_shard(original, "model.bin")
    assert "only safetensors are read" in refused(original)


@pytest.mark.parametrize("table", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(original, table):
    (original / INDEX).write_text(table)
    assert "has no table weight_map of file names" in refused(original)


def test_a_model_that_turns_hostile_after_it_was_loaded_is_not_saved(original, tmp_path):
    lm = load_tiny_model(original)
    rename_shard(original, "../x.safetensors")
    with pytest.raises(ExportError, match="is not a file in the model's folder"):
        save_merged(lm, make_plan(lm), tmp_path / "new" / "model")
    assert not (tmp_path / "new").exists()


def test_a_shard_in_a_folder_of_the_model_is_fine_and_its_header_is_checked(original, tmp_path):
    shard = rename_shard(original, "part/x.safetensors")
    lm = load_tiny_model(original)
    save_merged(lm, make_plan(lm), tmp_path / "new")
    assert (tmp_path / "new" / "part" / "x.safetensors").is_file()
    shard.write_bytes(shard.read_bytes()[:-8])
    assert "its header claims" in refused(original)


@pytest.mark.parametrize("name", ["notes.txt", "other.jinja", "sub/notes.txt"])
def test_a_link_that_leads_out_of_the_folder_is_refused(original, tmp_path, name):
    lm = load_tiny_model(original)
    (original / "sub").mkdir()
    (original / name).symlink_to(tmp_path / "secret")
    assert "is a link that leads out of the model's folder" in refused(original)
    with pytest.raises(ExportError, match="is a link that leads out"):
        save_merged(lm, make_plan(lm), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_and_folders_behind_links_that_lead_out_are_refused(original, tmp_path):
    (tmp_path / "other").mkdir()
    target = rename_shard(original, ".hidden/x.safetensors")
    shutil.move(target, tmp_path / "other" / "x.safetensors")
    target.symlink_to(tmp_path / "other" / "x.safetensors")
    assert "is not a file in the model's folder" in refused(original)
    target.unlink()
    shutil.move(tmp_path / "other" / "x.safetensors", target)
    check_exists(ModelSource(str(original)))
    templates = original / "additional_chat_templates"
    templates.symlink_to(tmp_path / "other", target_is_directory=True)
    assert "is a link that leads out" in refused(original)
    templates.unlink()
    templates.mkdir()
    (templates / "pyvenv.cfg").write_text("")
    (templates / "x.jinja").symlink_to(tmp_path / "secret")
    assert "x.jinja" in refused(original)
    shutil.rmtree(templates)
    (original / "round").symlink_to("round")
    assert "is a link that leads out" in refused(original)


def test_links_within_the_folder_and_in_the_cache_of_the_hub_are_fine(original, tmp_path):
    (original / "notes.txt").write_text("kept")
    (original / "again.txt").symlink_to("notes.txt")
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(original.iterdir())):
        shutil.copyfile(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    for folder in (original, snapshot):
        lm = load_tiny_model(folder)
        save_merged(lm, make_plan(lm), tmp_path / "saved" / folder.name)
        copied = tmp_path / "saved" / folder.name / "again.txt"
        assert copied.read_text() == "kept" and not copied.is_symlink()
    (snapshot / "more.txt").symlink_to(tmp_path / "secret")
    assert "more.txt" in refused(snapshot)


def test_links_that_are_neither_read_nor_copied_are_fine(original, tmp_path):
    (original / "data").symlink_to(tmp_path, target_is_directory=True)
    python = original / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert "python" in refused(original)
    (original / "venv" / "pyvenv.cfg").write_text("")
    lm = load_tiny_model(original)
    save_merged(lm, make_plan(lm), tmp_path / "saved")
    assert not {"data", "venv"} & {path.name for path in (tmp_path / "saved").iterdir()}


def in_a_cache(folder, cache, repository="models--org--name"):
    """Move a model into a cache of the hub; return its snapshot."""
    blobs, commit = cache / repository / "blobs", f"{1:040x}"
    snapshot = cache / repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        shutil.move(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    (cache / repository / "refs").mkdir()
    (cache / repository / "refs" / "main").write_text(commit)
    return snapshot


def test_a_cache_on_another_disk_and_links_into_one_are_fine(original, tmp_path):
    snapshot, moved = in_a_cache(original, tmp_path / "hub"), tmp_path / "disk"
    for link in snapshot.iterdir():
        (original / link.name).symlink_to(link.resolve())
    check_exists(ModelSource(str(original)))
    shutil.move(snapshot.parent.parent / "blobs", moved)
    (snapshot.parent.parent / "blobs").symlink_to(moved, target_is_directory=True)
    lm = load_tiny_model(snapshot)
    save_merged(lm, make_plan(lm), tmp_path / "saved")
    (moved / "id_rsa").write_text("a key")
    (snapshot / "notes.txt").symlink_to("../../blobs/id_rsa")
    assert "notes.txt" in refused(snapshot)


def test_a_hub_model_that_could_not_be_saved_is_refused_as_it_is_loaded(
    original, tmp_path, monkeypatch
):
    snapshot = in_a_cache(original, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_cached(ModelSource("org/name"), None)
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsupportedModelError, match="is a link that leads out"):
        load_model(ModelSource("org/name"), device="cpu")


def test_an_adapter_leads_nowhere_else(original, tmp_path):
    from heretic_kl.export import save_lora

    lm = load_tiny_model(original)
    save_lora(lm, make_plan(lm), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    base = ModelSource(str(original))
    adapter = ModelSource(str(tmp_path / "adapter"))
    text = config.read_text()
    hostile = {**json.loads(text), "megatron_config": {"a": 1}, "megatron_core": "antigravity"}
    config.write_text(json.dumps(hostile))
    with pytest.raises(ModelError, match="names a module of Python"):
        load_to_measure(adapter, base=base)
    for claim in ({"r": 10**9}, {"rank_pattern": {"down_proj": 10**9}}):
        config.write_text(json.dumps({**json.loads(text), **claim}))
        with pytest.raises(ModelError, match="claims a rank that no tensor of its file has"):
            load_to_measure(adapter, base=base)
    config.write_text(text)
    load_to_measure(adapter, base=base)
    (tmp_path / "adapter" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="is a link that leads out"):
        load_to_measure(adapter, base=base)
