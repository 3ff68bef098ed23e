"""`slurm/setup-node.sh` without a network, from a wheelhouse of what is installed here."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from heretic_kl.demo.build import WHEEL_NAME

ROOT = Path(__file__).parents[2]
LARGEST = 8_000_000
"""Bytes of a package that is packed whole; of larger ones, such as torch, only the metadata."""
NOT_PACKED = ("INSTALLER", "REQUESTED", "direct_url.json", "RECORD")


def needed(name, extras=(), seen=None):
    """A distribution and all that it requires."""
    seen = {} if seen is None else seen
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        wanted = [{"extra": extra} for extra in ("", *extras)]
        if requirement.marker and not any(requirement.marker.evaluate(e) for e in wanted):
            continue
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if key not in seen:
            seen[key] = distribution(requirement.name)
            needed(requirement.name, requirement.extras, seen)
    return seen


def packed(package, folder):
    """A wheel of an installed distribution."""
    (*_, tag) = re.findall(r"^Tag: (.*)$", package.read_text("WHEEL"), re.M)
    name = re.sub(r"[-_.]+", "_", package.metadata["Name"])
    inside = [f for f in package.files if ".." not in f.parts and f.suffix != ".pyc"]
    size = sum(f.locate().stat().st_size for f in inside if f.locate().exists())
    info = f"{name}-{package.version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{package.version}-{tag}.whl", "w") as wheel:
        for file in inside:
            of_itself = ".dist-info" in file.parts[0]
            if file.name in NOT_PACKED or (size > LARGEST and not of_itself):
                continue
            target = "/".join((info, *file.parts[1:])) if of_itself else file.as_posix()
            if file.locate().exists():
                wheel.write(file.locate(), target)
        names = [f"{entry},,\n" for entry in (*wheel.namelist(), f"{info}/RECORD")]
        wheel.writestr(f"{info}/RECORD", "".join(names))


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_node_without_network_is_set_up_from_a_wheelhouse(tmp_path):
    wheels = tmp_path / "wheelhouse"
    wheels.mkdir()
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels)]
    subprocess.run([*words, str(ROOT)], check=True, capture_output=True)
    for package in needed("heretic-kl", ("postgresql", "grpc")).values():
        packed(package, wheels)
    (wheels / WHEEL_NAME).write_bytes(b"")
    wrapper = tmp_path / "bin"
    wrapper.mkdir()
    (wrapper / "python3").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (wrapper / "python3").chmod(0o755)
    alone = ["unshare", "--net"]
    offline = shutil.which("unshare") and not subprocess.run([*alone, "true"]).returncode
    environment = {
        "PATH": f"{wrapper}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PIP_INDEX_URL": "http://127.0.0.1:9",
    }

    def call(*command):
        words = [*(alone if offline else []), *command]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    script = str(ROOT / "slurm" / "setup-node.sh")
    path, demo = call("bash", script, str(wheels), "environment").splitlines()
    assert path == "export PATH=environment/bin:$PATH"
    assert demo == f"export HERETIC_KL_DEMO_WHEEL={wheels / WHEEL_NAME}"
    drivers = "from importlib.metadata import version as v; v('psycopg-binary'), v('grpcio')"
    call("environment/bin/python", "-c", drivers)
    assert "usage: heretic-kl slurm" in call("environment/bin/heretic-kl", "slurm", "--help")
    (installed,) = tmp_path.glob("environment/lib/*/site-packages/heretic_kl/slurm/study.sbatch")
    assert installed.read_text() == (ROOT / "slurm" / "study.sbatch").read_text()
