"""The KL to a frozen teacher as a second loss in a `transformers.Trainer`. Makes no data.

Every micro-batch also runs one benign batch through the student, with gradients, and through the
teacher, without, and adds

    beta_kl * schedule * T^2 KL(teacher || student)    nats, mean over kept tokens

to the training loss, averaged over micro-batches under gradient accumulation as the main loss is.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from heretic_kl.integrations.training_batches import BenignBatches
from heretic_kl.kl import kl_divergence_loss
from heretic_kl.model import evaluating

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    # A mixin calls whichever Trainer it is mixed into, a subclass of another library's included.
    _Trainer = object

BetaSchedule: TypeAlias = Literal["constant", "retain"] | Callable[[float], float]
"""What `beta_kl` is multiplied by: 1, the retain weight, or a function of progress in [0, 1]."""


class TeacherForcedKLMixin(_Trainer):
    """Keeps a model close to a teacher on benign text while it is trained on something else.

        class MyTrainer(TeacherForcedKLMixin, Trainer):
            pass

        trainer = MyTrainer(model, arguments, train_dataset=..., benign_dataset=..., beta_kl=0.3)

    The mixin comes before the Trainer. A `compute_loss` of your own must call
    `super().compute_loss`: the term is added there, once a micro-batch, in training only.
    Evaluation and prediction report the main loss alone.

    Logged beside `loss` (which includes the term): `loss_kl`, the mean of T^2 KL since the last
    log, before `beta_kl`; and `beta_kl`, as it was in effect in the last step.

    Args:
        *args: the Trainer's.
        beta_kl: weight of the term. At 0 nothing is added, drawn, copied or logged.
        kl_temperature: T, of both distributions.
        teacher: the model to stay close to, on a device and in a dtype of its own; never trained.
            None with a PEFT model: the same model, adapters disabled. None otherwise: a copy of
            the model as it is now. (Build the trainer from the original model when resuming.)
        benign_dataset: see `BenignBatches`; items are read in this process.
        benign_batch_size: B; None: that of training.
        benign_collator: makes the batch of whole items; None: the Trainer's own collator, given
            `input_ids` and `attention_mask`.
        beta_schedule: "constant"; "retain", `retain_weight() / max_retain_weight`; or a function
            of progress, from 0 in the first step towards 1. A step whose factor is 0 runs no
            benign batch.
        **kwargs: the Trainer's.

    Raises:
        ValueError: an option is out of range, or the teacher does not fit.
    """

    max_retain_weight: float = 1.0
    """What "retain" divides by, so that `beta_kl` is reached where the retain weight peaks."""

    def __init__(
        self,
        *args: Any,
        beta_kl: float = 0.3,
        kl_temperature: float = 1.0,
        teacher: Any = None,
        benign_dataset: Any = None,
        benign_batch_size: int | None = None,
        benign_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        beta_schedule: BetaSchedule = "constant",
        **kwargs: Any,
    ) -> None:
        _require_options(beta_kl, kl_temperature, benign_batch_size, beta_schedule)
        if beta_kl > 0:
            _require_dataset(beta_kl, benign_dataset)
        self.beta_kl = beta_kl
        self.kl_temperature = kl_temperature
        self.beta_schedule = beta_schedule
        self._kl: _Term | None = None
        super().__init__(*args, **kwargs)
        if beta_kl == 0:
            return
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batches = BenignBatches(
            benign_dataset,
            benign_batch_size or self.args.train_batch_size,
            seed,
            self.data_collator if benign_collator is None else benign_collator,
            knows_masks=benign_collator is not None,
        )
        self._kl = _Term(batches, _teacher(teacher, self.model))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(TeacherForcedKLMixin)]
        for base in before:
            if not issubclass(base, TeacherForcedKLMixin) and hasattr(base, "training_step"):
                raise TypeError(
                    f"{cls.__name__} must name TeacherForcedKLMixin before {base.__name__}"
                )

    # --- to override -------------------------------------------------------------------------

    def retain_weight(self) -> float:
        """Weight of the retain part of the main loss now, in [0, `max_retain_weight`]."""
        return 1.0

    def training_progress(self) -> float:
        """Share of the optimizer steps that are done, in [0, 1]."""
        return min(1.0, self.state.global_step / max(1, self.state.max_steps))

    # --- the Trainer's -----------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As the Trainer's, with the term in the loss."""
        term = self._kl
        if term is None:
            return super().training_step(model, inputs, num_items_in_batch)
        term.due, term.divisor = True, self._divisor(num_items_in_batch)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if term.due:
                raise TypeError(
                    f"compute_loss of {type(self).__name__} must call super().compute_loss, "
                    "where the KL term is added"
                )
        finally:
            term.due = False
        term.micro_batch = 0 if self.accelerator.sync_gradients else term.micro_batch + 1
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the Trainer's; inside `training_step` the term is added to the loss."""
        result: Any = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        term = self._kl
        if term is None or not term.due:
            return result
        term.due = False
        term.beta = self.beta_kl * self._schedule_factor()
        if term.beta == 0:
            return result
        divergence = self._benign_divergence(term, model)
        term.record(divergence.detach())
        loss = result[0] if return_outputs else result
        loss = loss + (term.beta / term.divisor * divergence).to(loss.device)
        return (loss, result[1]) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; training losses get `loss_kl` and `beta_kl` beside them."""
        if self._kl is not None and "loss" in logs:
            mean = self._kl.take_mean()
            if mean is not None:
                gathered: Any = self.accelerator.gather(mean)
                logs = {**logs, "loss_kl": float(gathered.mean())}
            logs = {**logs, "beta_kl": self._kl.beta}
        super().log(logs, *args, **kwargs)

    # --- parts -------------------------------------------------------------------------------

    def _divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """What turns a sum over micro-batches into a mean, where the Trainer does not do it.

        It divides the loss by their number itself, unless the main loss was divided by the
        tokens of all of them already.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    def _schedule_factor(self) -> float:
        if self.beta_schedule == "constant":
            return 1.0
        if self.beta_schedule == "retain":
            weight = float(self.retain_weight())
            if not 0 <= weight <= self.max_retain_weight:
                raise ValueError(
                    f"retain_weight() must be in [0, {self.max_retain_weight:g}], got {weight:g}"
                )
            return weight / self.max_retain_weight
        factor = float(self.beta_schedule(self.training_progress()))
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"beta_schedule must return a number of at least 0, got {factor:g}")
        return factor

    def _benign_divergence(self, term: _Term, model: nn.Module) -> Tensor:
        """T^2 KL(teacher || student) of the next benign batch, nats per kept token."""
        micro_batches = self.state.global_step * self.args.gradient_accumulation_steps
        number = (micro_batches + term.micro_batch) * self.args.world_size
        batch = term.batches.batch(number + self.args.process_index)
        inputs: dict[str, Any] = self._prepare_inputs(batch.inputs)
        if hasattr(getattr(self.model, "config", None), "use_cache"):
            inputs = {**inputs, "use_cache": False}
        expected = self._teacher_logits(term.teacher, model, inputs)
        logits: Tensor = model(**inputs).logits
        return kl_divergence_loss(
            logits,
            expected.to(logits.device),
            inputs.get("attention_mask"),
            batch.kept,
            self.kl_temperature,
        )

    @torch.no_grad()
    def _teacher_logits(self, teacher: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """(B, T, V); a teacher of its own runs in the autocast that the student runs in."""
        logits: Tensor
        if teacher is None:
            with evaluating(model), _adapters_disabled(self.accelerator.unwrap_model(model)):
                logits = model(**inputs).logits
            return logits
        device = next(teacher.parameters()).device
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        with evaluating(teacher), self.accelerator.autocast():
            logits = teacher(**moved).logits
        return logits


@dataclass
class _Term:
    """What the mixin holds while the term is on."""

    batches: BenignBatches
    teacher: Any
    """None: the student with its adapters disabled."""
    due: bool = False
    """In a training step that has not got its term yet."""
    divisor: int = 1
    micro_batch: int = 0
    """Since the last optimizer step."""
    beta: float = 0.0
    """In effect in the last step."""
    total: Tensor | None = None
    count: int = 0

    def record(self, divergence: Tensor) -> None:
        """Add to the mean, without waiting for the device."""
        self.total = divergence if self.total is None else self.total + divergence
        self.count += 1

    def take_mean(self) -> Tensor | None:
        """The mean since it was last taken; None if there was nothing."""
        mean = None if self.total is None else self.total / self.count
        self.total, self.count = None, 0
        return mean


@contextmanager
def _adapters_disabled(model: Any) -> Iterator[None]:
    """As PEFT's, and afterwards exactly those weights train that did before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _teacher(teacher: Any, student: Any) -> Any:
    """The model to stay close to; None: the student with its adapters disabled."""
    if teacher is None and hasattr(student, "disable_adapter"):
        _require_pure_adapters(student)
        return None
    if teacher is None:
        return copy.deepcopy(student).eval().requires_grad_(False)
    student_tokens, teacher_tokens = _vocabulary(student), _vocabulary(teacher)
    if None not in (student_tokens, teacher_tokens) and student_tokens != teacher_tokens:
        raise ValueError(
            f"student and teacher have different vocabularies: {student_tokens} and "
            f"{teacher_tokens} tokens"
        )
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError("the teacher shares weights that are trained: pass a copy of the model")
    return teacher


def _vocabulary(model: Any) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "vocab_size", None)


def _require_pure_adapters(student: Any) -> None:
    """Raise where training reaches weights that disabling the adapters leaves in place."""
    trained = [p for p in student.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on trained biases: refused below.
        with _adapters_disabled(student):
            shared = any(parameter.requires_grad for parameter in trained)
    if shared:
        raise ValueError(
            "weights are trained that disabling the adapters leaves in place (biases, learned "
            "prompts or the model's own): pass a teacher"
        )


def _require_options(
    beta_kl: float, temperature: float, batch_size: int | None, schedule: BetaSchedule
) -> None:
    if not (math.isfinite(beta_kl) and beta_kl >= 0):
        raise ValueError(f"beta_kl must be a number of at least 0, got {beta_kl}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"kl_temperature must be positive, got {temperature}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"benign_batch_size must be at least 1, got {batch_size}")
    if not callable(schedule) and schedule not in ("constant", "retain"):
        raise ValueError(
            f'beta_schedule must be "constant", "retain" or a function, got {schedule!r}'
        )


def _require_dataset(beta_kl: float, dataset: Any) -> None:
    if dataset is None:
        raise ValueError(f"beta_kl is {beta_kl:g} but there is no benign_dataset (0 switches off)")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"benign_dataset must have a length and items by number, got {type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise ValueError("benign_dataset is empty")
