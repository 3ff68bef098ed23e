"""Learned operators of a study: safetensors, each named by its sha256.

They are files beside the study. Where a storage URL holds the study, they are in the storage as
well, in pieces, so that every machine that reaches the study has them.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import optuna
import safetensors.torch
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from heretic_kl import files
from heretic_kl.ablation import Plan, plan_from_tensors, tensors_from_plan
from heretic_kl.errors import StudyError
from heretic_kl.ranks import on_first
from heretic_kl.search.storage.roles import study_id

ARTIFACTS_SUFFIX = ".artifacts"
PIECE_CHARACTERS = 48_000
"""MySQL holds 65,535 bytes in an attribute."""
PIECE = "piece"
"""Attribute of a trial that is no trial."""


class PlanStore:
    """Plans of one study.

    Args:
        folder: of the studies.
        name: of the study.
        storage: that other machines share; None: they share the folder, if anything.
    """

    def __init__(self, folder: Path | str, name: str, storage: BaseStorage | None = None) -> None:
        self.folder = Path(folder) / f"{name}{ARTIFACTS_SUFFIX}"
        self._shared = None if storage is None else _Blobs(storage, self.folder.name)

    @on_first
    def save(self, plan: Plan) -> str:
        """Keep a plan; its sha256 finds it again. An equal plan is kept once.

        Raises:
            StudyError: the folder cannot be written.
        """
        tensors = {name: t.contiguous() for name, t in tensors_from_plan(plan).items()}
        data = safetensors.torch.save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        self._write(digest, data)
        if self._shared is not None:
            self._shared.put(digest, data)
        return digest

    @on_first
    def copy(self, digest: str, target: Path) -> None:
        """Write the plan with this sha256 to another file.

        Raises:
            StudyError: it is not there, is not what was kept, or cannot be written.
        """
        data = self._read(digest)
        try:
            with files.new_file(target) as partial:
                partial.write_bytes(data)
        except OSError as error:
            raise StudyError(
                f"cannot copy the learned edit {digest[:12]} to {str(target)!r}: {error.strerror}"
            ) from error

    @on_first
    def load(self, digest: str) -> Plan:
        """The plan with this sha256.

        Raises:
            StudyError: it is not there, or is not what was kept.
        """
        data = self._read(digest)
        try:
            return plan_from_tensors(safetensors.torch.load(data))
        except (ValueError, safetensors.SafetensorError) as error:
            raise StudyError(
                f"{str(self.folder / digest)!r} is no learned edit: {error}"
            ) from error

    def _read(self, digest: str) -> bytes:
        if re.fullmatch("[0-9a-f]{64}", digest) is None:  # a study may come from anybody
            raise StudyError(f"{digest[:80]!r} is no learned edit: a sha256 is expected")
        try:
            data = (self.folder / digest).read_bytes()
        except OSError as error:
            shared = None if self._shared is None else self._shared.get(digest)
            if shared is None:
                raise StudyError(
                    f"the learned edit {digest[:12]} is missing in {str(self.folder)!r}: "
                    "it belongs beside the study"
                ) from error
            data = shared
        if hashlib.sha256(data).hexdigest() != digest:
            raise StudyError(
                f"the learned edit {digest[:12]} in {str(self.folder)!r} was changed: "
                "restore it, or refine again under another --study-name"
            )
        return data

    def _write(self, digest: str, data: bytes) -> None:
        try:
            with files.new_file(self.folder / digest) as partial:
                partial.write_bytes(data)
        except OSError as error:
            raise StudyError(
                f"cannot keep a learned edit in {str(self.folder)!r}: {error.strerror}"
            ) from error


class _Blobs:
    """Bytes in a storage, in a study of their own: a trial a piece, and a list of them at last."""

    def __init__(self, storage: BaseStorage, name: str) -> None:
        self._storage, self._name = storage, name

    def put(self, digest: str, data: bytes) -> None:
        study, text = study_id(self._storage, self._name), base64.b64encode(data).decode()
        if digest in self._storage.get_study_user_attrs(study):
            return
        pieces = []
        for start in range(0, len(text), PIECE_CHARACTERS):
            attributes = {PIECE: text[start : start + PIECE_CHARACTERS]}
            template = optuna.create_trial(state=TrialState.FAIL, user_attrs=attributes)
            pieces.append(self._storage.create_new_trial(study, template))
        self._storage.set_study_user_attr(study, digest, pieces)

    def get(self, digest: str) -> bytes | None:
        study = study_id(self._storage, self._name)
        pieces = self._storage.get_study_user_attrs(study).get(digest)
        if pieces is None:
            return None
        texts = (self._storage.get_trial(piece).user_attrs[PIECE] for piece in pieces)
        return base64.b64decode("".join(texts))
