"""Teacher-forced KL as an Optuna objective for any edit of a model. Imports no Optuna.

Knows nothing about what is tuned: the user's context manager applies what a trial describes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

from heretic_kl.errors import MeasurementError
from heretic_kl.score import Measurement, TeacherForcedKL

ATTRIBUTE = "teacher_forced_kl"
"""The user attribute of a trial that holds its whole summary."""


class Trial(Protocol):
    """What is asked of an `optuna.Trial` here; the candidate gets the real one."""

    @property
    def number(self) -> int:
        """Which trial of its study."""

    def set_user_attr(self, key: str, value: Any) -> None:
        """Keep a JSON-ready value beside the trial."""


T = TypeVar("T", bound=Trial)


class KLObjective(Generic[T]):
    """KL(reference || what a trial makes of the model), nats, to be minimized.

        @contextmanager
        def scaled(trial):
            factor = trial.suggest_float("factor", 0.5, 1.0)
            weight.mul_(factor)
            try:
                yield model
            finally:
                weight.copy_(original)

        objective = KLObjective(TeacherForcedKL(model, tokenizer), scaled)
        study.optimize(objective, n_trials=50, catch=(MeasurementError,))

    Each trial keeps its summary (standard error, interval, profile, noise floor) as user
    attribute `teacher_forced_kl`; a failed one keeps what was found before it failed. One model
    edited in place serves one trial at a time: leave `n_jobs` at 1.

    Args:
        kl: the reference, its prompts and options.
        candidate: from a trial to a context that gives the edited model and undoes the edit
            when left, also by an exception.
        also: from the trial and the edited model to the values of further objectives, in the
            study's order after the KL.
    """

    def __init__(
        self,
        kl: TeacherForcedKL,
        candidate: Callable[[T], AbstractContextManager[Any]],
        *,
        also: Callable[[T, Any], Sequence[float]] | None = None,
    ) -> None:
        self.kl = kl
        self.measurements: dict[int, Measurement] = {}
        """Of this process's trials by number, so that two can be compared in pairs."""
        self._candidate = candidate
        self._also = also

    def __call__(self, trial: T) -> float | tuple[float, ...]:
        """Measure what a trial describes.

        Raises:
            MeasurementError: the edited model gives NaN, excludes tokens that the reference
                allows (the KL is infinite), or has another tokenizer.
        """
        with self._candidate(trial) as model:
            measured = self.kl.score(model)
            trial.set_user_attr(ATTRIBUTE, measured.to_dict())
            _require_finite(measured)
            others = () if self._also is None else tuple(self._also(trial, model))
        self.measurements[trial.number] = measured
        return measured.kl if self._also is None else (measured.kl, *others)


def _require_finite(measured: Measurement) -> None:
    infinite = measured.summary.infinite_count
    if infinite:
        raise MeasurementError(
            f"the KL is infinite: at {infinite} of {measured.summary.rows} positions the candidate "
            "gives no probability to a token that the reference allows"
        )
