"""Learned operators beside the study, as Optuna artifacts: safetensors, known by their hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import optuna
import safetensors.torch
from optuna.artifacts import FileSystemArtifactStore

from heretic_kl.ablation import Plan, plan_from_tensors, tensors_from_plan
from heretic_kl.errors import StudyError

SUFFIX = ".artifacts"


class PlanStore:
    """Plans of one study.

    Args:
        folder: of the studies.
        name: the study's name.
    """

    def __init__(self, folder: Path | str, name: str) -> None:
        self.folder = Path(folder) / f"{name}{SUFFIX}"

    def save(self, plan: Plan) -> str:
        """Keep a plan; its sha256 finds it again. An equal plan is kept once.

        Raises:
            StudyError: the folder cannot be written.
        """
        tensors = {name: t.contiguous() for name, t in tensors_from_plan(plan).items()}
        data = safetensors.torch.save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{digest}.partial"
            partial.write_bytes(data)
            partial.replace(self.folder / digest)
        except OSError as error:
            raise StudyError(
                f"cannot keep a learned edit in {str(self.folder)!r}: {error.strerror}"
            ) from error
        return digest

    def load(self, digest: str) -> Plan:
        """The plan with this sha256.

        Raises:
            StudyError: it is not there, or is not what was kept.
        """
        try:
            with self._store().open_reader(digest) as file:
                data = file.read()
        except (optuna.artifacts.exceptions.ArtifactNotFound, OSError) as error:
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

    def _store(self) -> FileSystemArtifactStore:
        return FileSystemArtifactStore(base_path=self.folder)
