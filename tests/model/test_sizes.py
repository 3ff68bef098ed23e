"""What models take on disk, and how many weights they have."""

import json
import sys

import numpy
import pytest
import torch
from safetensors.torch import save_file

from heretic_kl.model import free_memory, gguf_weights, stored_size
from heretic_kl.model.loading import devices
from heretic_kl.testing import save_tiny_model, tiny_llama


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "m", tiny_llama())


def test_plain_weights_are_counted_in_their_files(folder, tmp_path):
    size = stored_size(str(folder))
    assert size.bits_per_weight == 32.0
    assert size.file_bytes == (folder / "model.safetensors").stat().st_size
    (tmp_path / "x").mkdir()
    mixed = {"a": torch.zeros(6, dtype=torch.bfloat16), "b": torch.zeros(2)}
    save_file(mixed, tmp_path / "x" / "model.safetensors")
    assert stored_size(str(tmp_path / "x")).bits_per_weight == (6 * 16 + 2 * 32) / 8
    assert stored_size("org/model") is None


def test_packed_weights_are_counted_by_the_configuration(folder):
    whole = stored_size(str(folder))
    weights = sum(p.numel() for p in _model(folder).parameters())
    packed = {"a": torch.zeros(weights // 2, dtype=torch.uint8), "b": torch.zeros(10)}
    save_file(packed, folder / "model.safetensors")
    size = stored_size(str(folder))
    assert size.bits_per_weight == pytest.approx(8 * (weights // 2 + 40) / weights)
    assert size.file_bytes < whole.file_bytes
    (folder / "config.json").unlink()
    assert stored_size(str(folder)).bits_per_weight is None


def test_files_that_the_index_does_not_name_are_not_counted(folder):
    before = stored_size(str(folder))
    save_file({"a": torch.zeros(5)}, folder / "consolidated.safetensors")
    index = {"weight_map": {"a": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert stored_size(str(folder)) == before


def test_all_files_of_a_split_gguf_model_are_counted(tmp_path):
    import gguf

    sizes = []
    for name, count in (("-00001-of-00002", 32), ("-00002-of-00002", 96), ("-00001-of-00003", 5)):
        path = tmp_path / f"m[1]{name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("t", numpy.zeros(count, numpy.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sizes.append(path.stat().st_size)
    for first in ("1", "2"):
        named = tmp_path / f"m[1]-0000{first}-of-00002.gguf"
        assert stored_size(str(named)) == (sizes[0] + sizes[1], 16.0)
        assert gguf_weights(named) == (128, 256)


def test_free_memory_of_this_machine():
    free = free_memory(torch.device("cpu"))
    assert free is not None if sys.platform == "linux" else free is None
    assert free is None or 0 <= free < 2**50
    assert free_memory(torch.device("meta")) is None


def test_free_memory_is_what_every_group_of_the_process_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_ROOT", tmp_path)

    def plant(folder, **files):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name.replace("_", ".", 1)).write_text(text)
        return free_memory(torch.device("cpu"))

    assert plant("proc/self") is None
    assert plant("proc", meminfo="MemTotal: 9000 kB\nMemAvailable: 1000 kB\n") == 1_024_000
    stat = "file 300000\ninactive_file 250000\nactive_file 50000\n"
    top = {"memory_max": "700000", "memory_current": "400000", "memory_stat": stat}
    assert plant("sys/fs/cgroup", **top) == 550_000, "page cache is free"
    job = "sys/fs/cgroup/job/step"
    assert plant(job, memory_max="max", memory_current="1", memory_stat=stat) == 550_000
    assert plant("proc/self", cgroup="1:cpu:/\n0::/job/step\n") == 550_000, "no limit"
    outer = {"memory_max": "350000", "memory_current": "300000", "memory_stat": stat}
    assert plant("sys/fs/cgroup/job", **outer) == 300_000, "a limit above the process's own group"
    assert plant(job, memory_max="300000", memory_current="90000", memory_stat="") == 210_000
    assert plant(job, memory_current="400000") == 0
    assert plant("proc/self", cgroup="0::/../elsewhere\n") == 550_000, "outside what is mounted"


def test_processors_differ_by_model_and_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_ROOT", tmp_path)
    monkeypatch.setattr(devices.platform, "node", lambda: "this-host")
    (tmp_path / "proc").mkdir()
    assert "this-host" in devices.processor()
    seen = set()
    for model, flags in (("7", "avx512f"), ("8", "avx512f"), ("8", "avx512f amx_tile")):
        for core in ("0", "1"):
            text = f"processor\t: {core}\nmodel name\t: CPU {model}\ncpu MHz\t: 80{core}\n"
            (tmp_path / "proc/cpuinfo").write_text(f"{text}flags\t\t: {flags}\n\n")
            seen.add(devices.processor())
    assert len(seen) == 3 and not any("this-host" in one for one in seen)


def _model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)
