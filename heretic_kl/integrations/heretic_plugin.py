"""Teacher-forced KL as a scorer of Heretic: a plug-in file, named by its path in Heretic's config.

Works with the scorer interface of Heretic's main branch, with `ctx.get_model()` and before it;
releases up to 1.4.0 have no scorer interface.
Importing it needs Heretic; `python -m heretic_kl.integrations` prints its path without.
"""

# No `from __future__ import annotations`: Heretic reads the annotation of `settings` from a module
# that it loaded by path, where a name in quotes may not resolve.
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter

from heretic_kl.errors import MeasurementError, ScorerError
from heretic_kl.kl import Divergence
from heretic_kl.prompts import Prompt
from heretic_kl.score import TeacherForcedKL


class HereticMissingError(ScorerError, ImportError):
    """Heretic is not installed beside us, or its release has no scorer plug-ins."""


try:
    from heretic.config import DatasetSpecification
    from heretic.plugin import Context
    from heretic.scorer import Score, Scorer
except ImportError as error:
    raise HereticMissingError(
        f"heretic_plugin.py is loaded by Heretic, which is not here or too old ({error}): install "
        "a Heretic with scorer plug-ins (newer than 1.4.0) into the environment that has "
        "heretic-kl, and name this file in Heretic's config.toml as "
        f'"{__file__}:TeacherForcedKLScorer"'
    ) from error


def _default_prompts() -> Any:
    # A class in older versions of Heretic, a union of classes in newer ones.
    fields = {"dataset": "mlabonne/harmless_alpaca", "split": "test[:100]", "column": "text"}
    return TypeAdapter(DatasetSpecification).validate_python(fields)


class TeacherForcedKLSettings(BaseModel):
    """What Heretic's config says about this scorer."""

    kl_tokens: int = Field(
        default=3, ge=1, description="Positions scored of each response; 1 is first-token KL."
    )
    prompts: DatasetSpecification = Field(
        default_factory=_default_prompts,
        description="Prompts whose responses the edit should keep.",
    )
    divergence: Divergence = Field(
        default="forward_kl", description="forward_kl is KL(reference || candidate)."
    )
    temperature: float = Field(
        default=1.0, gt=0.0, description="Both models' logits are divided by it."
    )
    position_decay: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Weight of a position relative to the one before."
    )
    batch_size: int = Field(default=16, ge=1, description="Sequences in a batch.")
    noise_floor: bool = Field(default=True, description="Measure the noise floor, once.")


class TeacherForcedKLScorer(Scorer):  # type: ignore[misc]  # heretic is not there to be typed
    """KL(reference || candidate) over the first tokens of the unedited model's responses, nats."""

    settings: TeacherForcedKLSettings

    @property
    def score_name(self) -> str:
        """The name under which Heretic shows the score."""
        return f"KL over {self.settings.kl_tokens} tokens"

    @property
    def reproducible(self) -> bool:
        """True: the responses are greedy and nothing is drawn at random."""
        return True

    def init(self, ctx: Context) -> None:
        """Measure the unedited model: its responses and what it computes for them."""
        heretic = _heretic_model(ctx)
        model, settings = heretic.model, self.settings
        # Heretic's edits are adapters.
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            self._kl = TeacherForcedKL(
                model,
                heretic.tokenizer,
                prompts=_prompts(ctx.load_prompts(settings.prompts)),
                kl_tokens=settings.kl_tokens,
                divergence=settings.divergence,
                temperature=settings.temperature,
                position_decay=settings.position_decay,
                batch_size=settings.batch_size,
                response_prefix=heretic.settings.response_prefix or "",
                noise_floor=settings.noise_floor,
            )

    def get_score(self, ctx: Context) -> Score:
        """Measure the model with its present edit.

        Raises:
            MeasurementError: The KL is infinite, or the logits contain NaN.
        """
        # Read each time: Heretic may have loaded another model since.
        measured = self._kl.score(_heretic_model(ctx).model)
        summary = measured.summary
        if summary.infinite_count:
            raise MeasurementError(
                f"the KL is infinite: at {summary.infinite_count} of {summary.rows} positions the "
                "edited model gives no probability to a token that the original allows"
            )
        return _score(summary.mean, summary.standard_error, summary.noise_floor)

    def get_baseline_score(self, ctx: Context) -> Score:
        """The unedited model against itself: 0."""
        floor = self._kl.noise_floor
        return _score(0.0, None, None if floor is None else floor.value)


def _heretic_model(ctx: Context) -> Any:
    """Return Heretic's model; the context itself offers first-token logits only.

    Raises:
        ScorerError: This Heretic keeps its model in another way.
    """
    getter = getattr(ctx, "get_model", None)
    name = "ctx._model" if getter is None else "ctx.get_model()"
    heretic = getattr(ctx, "_model", None) if getter is None else getter()
    for path in ("model", "tokenizer", "settings.response_prefix"):
        value = heretic
        for attribute in path.split("."):
            if not hasattr(value, attribute):
                raise ScorerError(
                    f"this version of Heretic has no {name}.{path}, which teacher forcing needs; "
                    "use the Heretic that docs/integrations.md names"
                )
            value = getattr(value, attribute)
    return heretic


def _prompts(prompts: Sequence[Any]) -> tuple[Prompt, ...]:
    return tuple(Prompt(prompt.user, prompt.system or None) for prompt in prompts)


def _score(value: float, standard_error: float | None, floor: float | None) -> Score:
    error = "" if standard_error is None else f" ± {standard_error:.2g}"
    below = " (within noise)" if floor is not None and 0.0 < value <= floor else ""
    text = f"{value:.4g}{error}{below}"
    return Score(value=value, rich_display=text, md_display=text)
