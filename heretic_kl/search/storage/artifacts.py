"""Learned operators beside the study: safetensors files, each named by its sha256."""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch

from heretic_kl import files
from heretic_kl.ablation import Plan, plan_from_tensors, tensors_from_plan
from heretic_kl.errors import StudyError

ARTIFACTS_SUFFIX = ".artifacts"


class PlanStore:
    """Plans of the study of this name, in the folder of studies."""

    def __init__(self, folder: Path | str, name: str) -> None:
        self.folder = Path(folder) / f"{name}{ARTIFACTS_SUFFIX}"

    def save(self, plan: Plan) -> str:
        """Keep a plan; its sha256 finds it again. An equal plan is kept once.

        Raises:
            StudyError: the folder cannot be written.
        """
        tensors = {name: t.contiguous() for name, t in tensors_from_plan(plan).items()}
        data = safetensors.torch.save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        try:
            with files.new_file(self.folder / digest) as partial:
                partial.write_bytes(data)
        except OSError as error:
            raise StudyError(
                f"cannot keep a learned edit in {str(self.folder)!r}: {error.strerror}"
            ) from error
        return digest

    def copy(self, digest: str, target: Path) -> None:
        """Write the plan with this sha256 to another file.

        Raises:
            StudyError: it is not there, or cannot be written.
        """
        try:
            with files.new_file(target) as partial:
                partial.write_bytes((self.folder / digest).read_bytes())
        except OSError as error:
            raise StudyError(
                f"cannot copy the learned edit {digest[:12]} to {str(target)!r}: {error.strerror}"
            ) from error

    def load(self, digest: str) -> Plan:
        """The plan with this sha256.

        Raises:
            StudyError: it is not there, or is not what was kept.
        """
        try:
            data = (self.folder / digest).read_bytes()
        except OSError as error:
            raise StudyError(
                f"the learned edit {digest[:12]} is missing in {str(self.folder)!r}: "
                "it belongs beside the study"
            ) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise StudyError(
                f"the learned edit {digest[:12]} in {str(self.folder)!r} was changed: "
                "restore it, or refine again under another --study-name"
            )
        return plan_from_tensors(safetensors.torch.load(data))
