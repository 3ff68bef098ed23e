"""Learned operators of a study, and what its original model computes: safetensors, by sha256.

They are files beside the study. Where a storage URL holds the study, they are in the storage as
well, in pieces, so that every machine that reaches the study has them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import safetensors.torch
import torch
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from torch import Tensor

from heretic_kl import files
from heretic_kl.ablation import Plan, plan_from_tensors, tensors_from_plan
from heretic_kl.errors import StudyError
from heretic_kl.ranks import on_first
from heretic_kl.search.storage.pieces import in_pieces, whole
from heretic_kl.search.storage.roles import study_id

ARTIFACTS_SUFFIX = ".artifacts"
ORIGINAL_SUFFIX = ".original"
"""Of what the original model responds and computes: apart, so that it can be deleted alone."""
PIECE_CHARACTERS = 48_000
"""MySQL holds 65,535 bytes in an attribute."""
PIECE = "piece"
"""Attribute of a trial that is no trial."""
REFERENCE = "reference-"
"""What names of the original's results begin with; the hash of what they depend on follows."""
MOST_BYTES, MOST_STORED_BYTES = 64 * 2**20, 4 * 2**20
"""Of one result, in a file and in a storage, which takes a transaction a piece."""
MOST_ENTRY_BYTES = 2**16
_OF = "of"
"""Tensor of a result: the hash of what it depends on."""
_UNREADABLE = (ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError)
"""What reading an entry or tensors that somebody changed may raise."""


class _Artifacts:
    """Bytes of one study by their sha256.

    Args:
        folder: of the studies.
        name: of the folder in it, and of what helps the study in a storage.
        storage: that other machines share; None: they share the folder, if anything.
        what: they are, in words.
        remedy: what to do about one that was changed.
    """

    def __init__(
        self, folder: Path | str, name: str, storage: BaseStorage | None, what: str, remedy: str
    ) -> None:
        self.folder = Path(folder) / name
        self.shared = None if storage is None else _Blobs(storage, name)
        self._what, self._remedy = what, remedy

    def put(self, data: bytes, most_stored: int | None = None) -> str:
        """Keep bytes, those of more than `most_stored` in the folder alone; return their sha256.

        Raises:
            StudyError: the folder cannot be written.
        """
        digest = hashlib.sha256(data).hexdigest()
        self.write(digest, data)
        if self.shared is not None and (most_stored is None or len(data) <= most_stored):
            self.shared.put(digest, data)
        return digest

    def get(self, digest: str, most: int | None = None) -> bytes:
        """The bytes with this sha256.

        Raises:
            StudyError: they are not there, are more than `most`, or are not what was kept.
        """
        if re.fullmatch("[0-9a-f]{64}", digest) is None:  # a study may come from anybody
            raise StudyError(f"{digest[:80]!r} is no {self._what}: a sha256 is expected")
        path, short = self.folder / digest, digest[:12]
        try:
            if most is not None and path.stat().st_size > most:
                raise StudyError(f"the {self._what} {short} in {str(self.folder)!r} is too large")
            data = path.read_bytes()
        except OSError as error:
            stored = None if self.shared is None else self.shared.get(digest, most)
            if stored is None:
                raise StudyError(
                    f"the {self._what} {short} is missing in {str(self.folder)!r}: "
                    "it belongs beside the study"
                ) from error
            data = stored
        if hashlib.sha256(data).hexdigest() != digest:
            raise StudyError(
                f"the {self._what} {short} in {str(self.folder)!r} was changed: {self._remedy}"
            )
        return data

    def write(self, name: str, data: bytes, *, replace: bool = True) -> bool:
        """Write a file of the folder whole; False: there is one that is not to be replaced.

        Raises:
            StudyError: the folder cannot be written.
        """
        path = self.folder / name
        try:
            with files.new_file(path, replace=replace) as partial:
                partial.write_bytes(data)
            return True
        except OSError as error:
            if isinstance(error, FileExistsError) and path.is_file():
                return False
            raise StudyError(
                f"cannot keep a {self._what} in {str(self.folder)!r}: {error.strerror}"
            ) from error


class PlanStore:
    """Plans of one study.

    Args:
        folder: of the studies.
        name: of the study.
        storage: that other machines share; None: they share the folder, if anything.
    """

    def __init__(self, folder: Path | str, name: str, storage: BaseStorage | None = None) -> None:
        remedy = "restore it, or refine again under another --study-name"
        name += ARTIFACTS_SUFFIX
        self._artifacts = _Artifacts(folder, name, storage, "learned edit", remedy)
        self.folder = self._artifacts.folder

    @on_first
    def save(self, plan: Plan) -> str:
        """Keep a plan; its sha256 finds it again. An equal plan is kept once.

        Raises:
            StudyError: the folder cannot be written.
        """
        tensors = {name: t.contiguous() for name, t in tensors_from_plan(plan).items()}
        return self._artifacts.put(safetensors.torch.save(tensors))

    @on_first
    def copy(self, digest: str, target: Path) -> None:
        """Write the plan with this sha256 to another file.

        Raises:
            StudyError: it is not there, is not what was kept, or cannot be written.
        """
        data = self._artifacts.get(digest)
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
        data = self._artifacts.get(digest)
        try:
            return plan_from_tensors(safetensors.torch.load(data))
        except (ValueError, safetensors.SafetensorError) as error:
            raise StudyError(
                f"{str(self.folder / digest)!r} is no learned edit: {error}"
            ) from error


class ReferenceStore:
    """What the original model of a study responds and computes, by what it depends on.

    Each result is safetensors under its sha256, which a JSON entry states under the hash of
    everything that the result depends on. They are deleted with their folder, and with the study
    of its name in a storage.

    Args: see `PlanStore`; `reads_only`: nothing is added.
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        storage: BaseStorage | None = None,
        *,
        reads_only: bool = False,
    ) -> None:
        what, name = "result of the original model", name + ORIGINAL_SUFFIX
        self._artifacts = _Artifacts(folder, name, storage, what, "it is not used")
        self._reads_only = reads_only

    @on_first
    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors that were saved under a hash (64 hex digits); None: there are none.

        Raises:
            StudyError: they are incomplete, too large, were changed, or belong to another hash.
        """
        entry = self._entry(key)
        if entry is None:
            return None
        try:
            data = self._artifacts.get(str(json.loads(entry)["sha256"]), MOST_BYTES)
            tensors = safetensors.torch.load(data)
            of = _hash_in(tensors.pop(_OF))
        except (*_UNREADABLE, safetensors.SafetensorError) as error:
            raise StudyError(f"{REFERENCE}{key[:12]} cannot be read: {error}") from error
        if of != key:
            raise StudyError(f"{REFERENCE}{key[:12]} is the result of something else")
        return tensors

    @on_first
    def save(
        self,
        key: str,
        about: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        replace: bool = False,
    ) -> bool:
        """Keep tensors under a hash; `about`, JSON-ready, says to people what they are.

        Where another process was first, its entry stays, unless it is to be replaced. A folder
        tells who was first; a storage does too, but for writes at the same moment.

        Returns:
            Whether no other tensors are to be used in place of these.

        Raises:
            StudyError: they are too large, or the folder cannot be written.
        """
        if self._reads_only:
            return True
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > MOST_BYTES - MOST_ENTRY_BYTES:
            raise StudyError(
                f"{size / 2**20:.0f} MB are more than the {MOST_BYTES >> 20} MB that are shared"
            )
        of = torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        digest = self._artifacts.put(safetensors.torch.save({**whole, _OF: of}), MOST_STORED_BYTES)
        entry = json.dumps({"sha256": digest, "bytes": size, **about}, sort_keys=True)
        name, winner, shared = f"{REFERENCE}{key}", entry, self._artifacts.shared
        if shared is not None and size <= MOST_STORED_BYTES - MOST_ENTRY_BYTES:
            if replace or shared.noted(name) is None:
                shared.note(name, entry)
            winner = shared.noted(name) or entry
            replace = replace or winner != entry
        first = self._artifacts.write(f"{name}.json", winner.encode(), replace=replace)
        return first and winner == entry

    def _entry(self, key: str) -> str | None:
        path = self._artifacts.folder / f"{REFERENCE}{key}.json"
        try:
            with path.open("rb") as file:
                return file.read(MOST_ENTRY_BYTES).decode(errors="replace")
        except OSError:
            shared = self._artifacts.shared
            return None if shared is None else shared.noted(f"{REFERENCE}{key}")


def _hash_in(tensor: Tensor) -> str:
    """32 bytes as hex; ValueError: it is something else, whose values may ask for any memory."""
    if tensor.dtype != torch.uint8 or tensor.shape != (32,):
        raise ValueError(f"32 bytes are expected, got {tensor.dtype} {tuple(tensor.shape)}")
    return bytes(tensor.tolist()).hex()


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
        self.note(digest, pieces)

    def get(self, digest: str, most: int | None = None) -> bytes | None:
        pieces = whole(self._attributes(), digest)
        if pieces is None or (most is not None and len(pieces) * PIECE_CHARACTERS > 2 * most):
            return None
        texts = (self._storage.get_trial(piece).user_attrs[PIECE] for piece in pieces)
        return base64.b64decode("".join(texts))

    def note(self, name: str, value: str | list[int]) -> None:
        study = study_id(self._storage, self._name)
        for part, written in in_pieces({name: value}).items():
            self._storage.set_study_user_attr(study, part, written)

    def noted(self, name: str) -> str | None:
        text = whole(self._attributes(), name)
        return text if isinstance(text, str) else None

    def _attributes(self) -> dict[str, Any]:
        """Of the study with the pieces, which reading does not make."""
        try:
            study = self._storage.get_study_id_from_name(self._name)
        except KeyError:
            return {}
        return self._storage.get_study_user_attrs(study)
