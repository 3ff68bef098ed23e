"""One task of lm-eval (EleutherAI's evaluation harness) on a model in memory. Loads no model."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from heretic_kl.errors import HereticKLError, ScorerError

MAIN_METRICS: Final = ("acc", "exact_match")
"""Taken in this order where none is named and a task has several."""
LONGEST_REASON: Final = 300
"""Characters of what lm-eval says."""


@dataclass(frozen=True)
class HarnessTask:
    """What is run; equal tasks are run once for a candidate."""

    name: str
    """As lm-eval or a local folder names it."""
    metric: str | None = None
    """Whose mean over documents is taken; None: `acc`, the only one, or `exact_match`."""
    folder: str | None = None
    """Of further task definitions; their code is run."""
    limit: int | None = None
    """Most documents; None: all of them."""
    few_shot: int | None = None
    """Examples before each document; None: the task's own number."""
    chat: bool = False
    """Whether documents are put into the chat template."""
    batch_size: int = 8
    filter: str | None = None
    """How answers are read from responses, where a task has several ways; None: its first."""

    def __call__(self, model: Any, tokenizer: Any) -> tuple[float, ...]:
        """The metric of every document, in order, by one filter.

        Raises:
            ScorerError: lm-eval is not installed, or cannot run this task.
        """
        loaded = self.load()
        chosen = self._choice(loaded["tasks"])
        samples = self._samples(loaded, model, tokenizer)
        rows = [
            sample
            for name, task in loaded["tasks"].items()
            for sample in samples[name]
            if sample["filter"] == (chosen.filter or _filters(task)[0])
        ]
        if not rows or any(chosen.metric not in row for row in rows):
            names = sorted({name for row in rows for name in row.get("metrics", ())})
            raise self._lacks("metric", chosen.metric, names)
        try:
            return tuple(float(row[chosen.metric]) for row in rows)
        except (TypeError, ValueError):
            raise ScorerError(
                f"metric {chosen.metric!r} of lm-eval task {self.name!r} is no number for each "
                "document: use another"
            ) from None

    def settled(self) -> HarnessTask:
        """The same with its metric named, and its filter where the task has several.

        Raises:
            ScorerError: the task cannot be loaded or run here, or has no such metric or filter.
        """
        return self._choice(self.load()["tasks"])

    def _choice(self, tasks: Mapping[str, Any]) -> HarnessTask:
        """See `settled`; a group's tasks must all have what is chosen."""
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ScorerError(
                    f"lm-eval task {name!r} runs code that the model writes, which is never done "
                    "here: use another"
                )
            if getattr(task, "MULTIMODAL", False):
                raise ScorerError(f"lm-eval task {name!r} needs more than text: use another")
        metrics = _common([list(task.aggregation()) for task in tasks.values()])
        filters = [_filters(task) for task in tasks.values()]
        metric, way = self.metric, self.filter
        if metric is None:
            main = [name for name in MAIN_METRICS if name in metrics]
            if not main and len(metrics) != 1:
                raise ScorerError(
                    f"say which metric of lm-eval task {self.name!r}: {_listed(metrics)}"
                )
            metric = (main or metrics)[0]
        elif metric not in metrics and not any(map(_names_metrics_later, tasks.values())):
            raise self._lacks("metric", metric, metrics)
        if way is None and any(len(names) > 1 for names in filters):
            firsts = {names[0] for names in filters}
            if len(firsts) > 1:
                raise ScorerError(
                    f"tasks of {self.name!r} in lm-eval have other filters each; in all of them "
                    f"there are {_listed(_common(filters))}: name one, or run them one by one"
                )
            way = firsts.pop()
        elif way is not None and way not in _common(filters):
            raise self._lacks("filter", way, _common(filters))
        return replace(self, metric=metric, filter=way)

    def _lacks(self, what: str, name: str | None, names: list[str]) -> ScorerError:
        return ScorerError(
            f"lm-eval task {self.name!r} has no {what} {name!r}; there are {_listed(names)}"
        )

    def _samples(self, loaded: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
        """What lm-eval logs of each task: an entry a document and filter."""
        try:
            with _quiet():
                harness: Any = importlib.import_module("lm_eval")
                wrapper = importlib.import_module("lm_eval.models.huggingface")
                results = harness.evaluate(
                    lm=wrapper.HFLM(
                        pretrained=model,
                        tokenizer=tokenizer,
                        batch_size=self.batch_size,
                        device=str(model.device),
                    ),
                    task_dict=loaded,
                    limit=self.limit,
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=self.chat,
                )
        except (HereticKLError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a task's own code may raise anything
            raise ScorerError(f"lm-eval cannot run task {self.name!r}: {_reason(error)}") from error
        samples: dict[str, Any] = results["samples"]
        return samples

    def load(self) -> dict[str, Any]:
        """The task as lm-eval holds it.

        Raises:
            ScorerError: lm-eval is not installed, or the task cannot be loaded.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ScorerError("lm-eval is not installed: pip install 'heretic-kl[bench]'")
        with _quiet():
            return self._load()

    def _load(self) -> dict[str, Any]:
        tasks: Any = importlib.import_module("lm_eval.tasks")
        overrides = {} if self.few_shot is None else {"num_fewshot": self.few_shot}
        try:
            # The thousands of tasks of its own are read only where they are needed: seconds.
            manager = tasks.TaskManager(include_path=self.folder, include_defaults=False)
            if self.name not in manager.all_tasks:
                manager = tasks.TaskManager(include_path=self.folder)
            if self.name not in manager.all_tasks:
                raise ScorerError(f"lm-eval knows no task {self.name!r}")
            loaded: dict[str, Any] = manager.load(
                [{"task": self.name, **overrides} if overrides else self.name]
            )
        except ScorerError:
            raise
        except Exception as error:  # a dataset that is not there, a task that is no YAML
            raise ScorerError(
                f"lm-eval task {self.name!r} cannot be loaded: {_reason(error)}"
            ) from error
        return loaded


def _filters(task: Any) -> list[str]:
    """Names of a task's filters, in its order."""
    return [ensemble.name for ensemble in getattr(task, "_filters", ())] or ["none"]


def _names_metrics_later(task: Any) -> bool:
    """Whether a metric is a function that names what it gives when it runs."""
    metrics = getattr(task.config, "metric_list", None) or ()
    return any(callable(entry.get("metric")) or entry.get("hf_evaluate") for entry in metrics)


def _common(lists: list[list[str]]) -> list[str]:
    """What is in all of them, in the order of the first."""
    return [name for name in next(iter(lists), []) if all(name in names for names in lists)]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:LONGEST_REASON]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's log and bars off the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
