"""One task of lm-eval (EleutherAI's evaluation harness) on a model in memory. Loads no model."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from heretic_kl.errors import ScorerError


@dataclass(frozen=True)
class HarnessTask:
    """What is run; equal tasks are run once for a candidate."""

    name: str
    """As lm-eval or a local folder names it."""
    metric: str
    """Whose mean over documents is taken, such as `acc` or `exact_match`."""
    folder: str | None = None
    """Of further task definitions; their code is run."""
    limit: int | None = None
    """Most documents; None: all of them."""
    few_shot: int | None = None
    """Examples before each document; None: the task's own number."""
    chat: bool = False
    """Whether documents are put into the chat template."""
    batch_size: int = 8

    def __call__(self, model: Any, tokenizer: Any) -> tuple[float, ...]:
        """The metric of every document, in order.

        Raises:
            ScorerError: lm-eval is not installed, or knows no such task or metric.
        """
        task = self.load()
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
                task_dict=task,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=self.chat,
            )
        samples = [sample for rows in results["samples"].values() for sample in rows]
        if not samples or any(self.metric not in sample for sample in samples):
            names = sorted({name for sample in samples for name in sample.get("metrics", ())})
            raise ScorerError(
                f"lm-eval task {self.name!r} has no metric {self.metric!r}; there are "
                f"{', '.join(names) or 'none'}"
            )
        try:
            return tuple(float(sample[self.metric]) for sample in samples)
        except (TypeError, ValueError):
            raise ScorerError(
                f"metric {self.metric!r} of lm-eval task {self.name!r} is no number for each "
                "document: use another"
            ) from None

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
            text = " ".join(str(error).split())[:300]
            raise ScorerError(f"lm-eval task {self.name!r} cannot be loaded: {text}") from error
        return loaded


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
