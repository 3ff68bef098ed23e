"""A `transformers` text classifier as a judge, by folder or hub id. Safetensors, no remote code."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from heretic_kl.errors import ConfigError, UnsupportedModelError
from heretic_kl.files import sha256_file
from heretic_kl.judging.judgement import VERDICTS, Judgement, Pair, Verdict
from heretic_kl.model import ModelSource
from heretic_kl.model.loading.source import (
    check_exists,
    hub_arguments,
    no_safetensors,
    readable_errors,
)
from heretic_kl.model.transformers_logging import quiet_transformers

BATCH: Final = 16
_FILES: Final = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What a folder holds that verdicts depend on."""


@dataclass(frozen=True)
class TextClassifier:
    """A classifier in memory; see `heretic_kl.judging.ResponseJudge`."""

    name: str
    identity: str
    """Hash of the folder's files, or the hub's commit."""
    model: Any
    tokenizer: Any
    verdicts: tuple[Verdict, ...]
    """Of each of the model's labels, in its order."""
    reads_prompt: bool
    longest: int
    """Tokens that are read; what is longer is cut at its end."""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        labels: Mapping[str, Verdict],
        revision: str | None = None,
        reads_prompt: bool = False,
        device: str = "cpu",
    ) -> TextClassifier:
        """Load a classifier.

        Args:
            name: folder or hub id.
            labels: the model's own labels -> verdicts; may be empty where they have equal names.
            revision: of a hub id.
            reads_prompt: whether it reads pairs of prompt and response, or responses alone.
            device: a torch device.

        Raises:
            ModelError: there is none, it needs code of its own, or has no safetensors.
            ConfigError: a label is unknown or without a verdict, or there is no such device.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        source = ModelSource(name, revision)
        check_exists(source)
        if source.folder is not None and not any(source.folder.glob("*.safetensors")):
            raise no_safetensors(source)
        path, options = hub_arguments(source)
        options["trust_remote_code"] = False
        with quiet_transformers(), readable_errors(source, "classifier"), _no_code(source):
            config = AutoConfig.from_pretrained(path, **options)
            names = [str(config.id2label[index]) for index in range(config.num_labels)]
            verdicts = label_verdicts(name, names, labels)
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, **options
            )
            if report["missing_keys"]:
                raise UnsupportedModelError(
                    f"{name!r} is no text classifier: it has no weights for "
                    f"{min(report['missing_keys'])}"
                )
        if tokenizer.pad_token is None:
            raise UnsupportedModelError(f"the tokenizer of {name!r} has no token to pad with")
        _move(model, device)
        commit = str(getattr(config, "_commit_hash", None) or "")
        identity = commit if source.folder is None else _folder_hash(source.folder)
        longest = _longest(config, tokenizer)
        return cls(name, identity, model.eval(), tokenizer, verdicts, reads_prompt, longest)

    @torch.inference_mode()
    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `ResponseJudge.judge`."""
        judgements: list[Judgement] = []
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            responses = [response for _, response in batch]
            texts = [[prompt.user for prompt, _ in batch], responses]
            inputs = self.tokenizer(
                *(texts if self.reads_prompt else [responses]),
                truncation=True,
                max_length=self.longest,
                padding=True,
                return_tensors="pt",
            )
            logits = self.model(**inputs.to(self.model.device)).logits.float()
            judgements += map(self._judgement, logits.tolist())
        return judgements

    def _judgement(self, logits: Sequence[float]) -> Judgement:
        if not all(map(math.isfinite, logits)):
            return Judgement(None, "logits that are not finite")
        return Judgement(self.verdicts[max(range(len(logits)), key=logits.__getitem__)])


def label_verdicts(
    name: str, names: Sequence[str], labels: Mapping[str, Verdict]
) -> tuple[Verdict, ...]:
    """The verdict of each label of a model, in its order.

    Raises:
        ConfigError: `labels` names another label, leaves one without a verdict, or knows no answer.
    """
    listed = ", ".join(names)
    for label in labels:
        if label not in names:
            raise ConfigError(f"labels.{label}: {name!r} has no such label; it has {listed}")
    equal = {label: verdict for label in names for verdict in VERDICTS if label.lower() == verdict}
    verdicts = {**equal, **labels}
    for label in names:
        if label not in verdicts:
            raise ConfigError(
                f"label {label!r} of {name!r} has no verdict: add labels.{label} = one of "
                f"{', '.join(VERDICTS)}"
            )
    if not {"answered"} < set(verdicts[label] for label in names):
        raise ConfigError(
            f"labels of {name!r}: one must be answered and another one not; it has {listed}"
        )
    return tuple(verdicts[label] for label in names)


def _move(model: Any, device: str) -> None:
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0]
        raise ConfigError(f"device = {device!r} cannot be used: {text}") from error


@contextmanager
def _no_code(source: ModelSource) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{source.name!r} needs code from its own repository, which is never run for a judge: "
            "use another classifier"
        ) from error


def _longest(config: Any, tokenizer: Any) -> int:
    """Tokens that the model can read: RoBERTa and its kin lose some positions to padding."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1
    return int(min(positions, tokenizer.model_max_length))


def _folder_hash(folder: Path) -> str:
    files = sorted({path for pattern in _FILES for path in folder.glob(pattern)})
    content = "".join(f"{path.name} {sha256_file(path)}\n" for path in files)
    return hashlib.sha256(content.encode()).hexdigest()
