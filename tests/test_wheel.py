"""The wheel holds all that a run needs and works from an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*words, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


def test_scorers_prompts_and_demo_adapter_are_inside_and_tests_are_not(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "heretic_kl/scorers/refusals.py",
        "heretic_kl/scorers/false_refusals.py",
        "heretic_kl/scorers/teacher_forced_kl.py",
        "heretic_kl/prompts/builtin/harmful.jsonl",
        "heretic_kl/prompts/builtin/harmless.jsonl",
        "heretic_kl/demo/adapter/adapter_model.safetensors",
        "heretic_kl/demo/adapter/adapter_config.json",
    ):
        assert name in names, name
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"heretic_kl"}


def test_it_runs_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HERETIC_KL_")}
    environment["PYTHONPATH"] = str(site)

    def run(*words):
        return subprocess.run(
            [sys.executable, *words], cwd=empty, env=environment, capture_output=True, text=True
        )

    code = (
        "import heretic_kl, heretic_kl.scoring as s; print(heretic_kl.__file__); "
        "print(*s.built_in_scorers())"
    )
    done = run("-c", code)
    where, scorers = done.stdout.splitlines()
    assert Path(where).is_relative_to(site), done.stderr
    assert scorers.split() == [
        "false_refusals",
        "judge",
        "keyword_rate",
        "lm_eval",
        "refusals",
        "teacher_forced_kl",
    ]
    done = run("-m", "heretic_kl", "config")
    assert done.stdout == (ROOT / "config.default.toml").read_text(encoding="utf-8"), done.stderr
