"""Teacher-forced KL from the original, reported while `transformers.Trainer` trains.

Watches only: weights, gradients, random numbers and the training mode stay as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from heretic_kl.errors import HereticKLError, MeasurementError
from heretic_kl.score import Measurement, TeacherForcedKL

NAME = "teacher_forced_kl"
Log = Callable[[dict[str, float]], None]


class TeacherForcedKLCallback(TrainerCallback):
    """How far a model in training has moved from where it began, with errors.

        callback = TeacherForcedKLCallback(every_steps=100, kl_tokens=8)
        trainer = Trainer(model, ..., processing_class=tokenizer, callbacks=[callback])
        callback.report_to(trainer)  # TensorBoard, W&B: whatever the trainer reports to

    Measures at the start, every so many steps or on each evaluation, and at the end. Figures
    stand in `trainer.state.log_history` and, whole, in `callback.history`. A measurement that
    fails during training warns and is skipped; one that fails at the start raises.

    Only the first process measures, over the whole model: data-parallel training waits for it,
    and sharded parameters (FSDP, ZeRO-3) cannot be measured.

    Args:
        kl: the reference. None: the model as it is when training first begins; a training that
            resumes from a checkpoint needs it given.
        every_steps: optimizer steps between measurements; None: on each evaluation.
        log: `trainer.log`, unless `report_to` is called later.
        options: for `TeacherForcedKL` where `kl` is None: prompts, kl_tokens and so on.

    Raises:
        ValueError: `every_steps` is below 1, or options are given beside `kl`.
    """

    def __init__(
        self,
        kl: TeacherForcedKL | None = None,
        *,
        every_steps: int | None = None,
        log: Log | None = None,
        **options: Any,
    ) -> None:
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}")
        if kl is not None and options:
            raise ValueError(f"{', '.join(options)} cannot be changed: kl is built already")
        self.kl = kl
        self.every_steps = every_steps
        self.history: list[tuple[int, Measurement]] = []
        """(optimizer steps done, what was measured), oldest first."""
        self._log = log
        self._options = options
        self._measured_step: int | None = None

    def report_to(self, trainer: Any) -> None:
        """Send figures through a trainer's own log, to whatever it reports to."""
        self._log = trainer.log

    # --- the trainer's events ----------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Build the reference if there is none, and measure."""
        self._measured_step = None
        if not state.is_world_process_zero:
            return
        if self.kl is None:
            self.kl = self._reference(state, kwargs)
        self._measure(state, control, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every so many steps, and after the last while reports are still open."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        due = self.every_steps is not None and state.global_step % self.every_steps == 0
        if last or due:
            self._watch(state, control, kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure on each evaluation, unless steps are counted."""
        if self.every_steps is None:
            self._watch(state, control, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what training ended with: the best checkpoint, if that was loaded."""
        if args.load_best_model_at_end:
            self._measured_step = None
        self._watch(state, control, kwargs["model"])

    # --- parts -------------------------------------------------------------------------------

    def _reference(self, state: Any, arguments: dict[str, Any]) -> TeacherForcedKL:
        if state.global_step > 0:
            raise MeasurementError(
                f"training resumes at step {state.global_step}, so the model is no longer the "
                "original: pass kl=TeacherForcedKL(original, tokenizer)"
            )
        processor = arguments.get("processing_class")
        tokenizer = getattr(processor, "tokenizer", processor)
        if tokenizer is None:
            raise MeasurementError(
                "the trainer has no tokenizer: pass processing_class=tokenizer to it, or "
                "kl=TeacherForcedKL(model, tokenizer) to the callback"
            )
        return TeacherForcedKL(arguments["model"], tokenizer, **self._options)

    def _watch(self, state: Any, control: Any, model: Any) -> None:
        """Measure unless this step was; a training is not ended by what watches it."""
        if self.kl is None or not state.is_world_process_zero:
            return
        if self._measured_step == state.global_step:
            return
        try:
            self._measure(state, control, model)
        except HereticKLError as error:
            warnings.warn(
                f"no teacher-forced KL at step {state.global_step}: {error}", stacklevel=2
            )

    def _measure(self, state: Any, control: Any, model: Any) -> None:
        assert self.kl is not None
        self._measured_step = state.global_step
        measured = self.kl.score(model)
        self.history.append((state.global_step, measured))
        figures = _figures(measured)
        if self._log is None:
            step = {"epoch": state.epoch, "step": state.global_step}
            state.log_history.append({**figures, **step})
            return
        # Logging tells the trainer that its own figures of this step are logged, which they
        # are not yet.
        should_log = control.should_log
        try:
            self._log(figures)
        finally:
            control.should_log = should_log


def _figures(measured: Measurement) -> dict[str, float]:
    """Plain numbers by name; what was not measured is left out."""
    summary = measured.summary
    figures = {
        NAME: summary.mean,
        f"{NAME}_standard_error": summary.standard_error,
        f"{NAME}_noise_floor": summary.noise_floor,
        f"{NAME}_top1_agreement": summary.top1_agreement,
        f"{NAME}_infinite_positions": summary.infinite_count or None,
    }
    return {name: value for name, value in figures.items() if value is not None}
