"""Teacher-forced KL as a scorer of Heretic: a plug-in file, named by its path in Heretic's config.

Written against Heretic's scorer interface (its main branch; releases up to 1.4.0 have none).
Importing it needs Heretic; `python -m heretic_kl.integrations` prints its path without.
"""

# No `from __future__ import annotations`: Heretic reads the annotation of `settings` from a module
# that it loaded by path, where a name in quotes may not resolve.
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from pydantic import BaseModel, Field

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
    return DatasetSpecification(
        dataset="mlabonne/harmless_alpaca", split="test[:100]", column="text"
    )


class TeacherForcedKLSettings(BaseModel):
    """What Heretic's config says about this scorer."""

    kl_tokens: int = Field(
        default=3, ge=1, description="Positions scored of each answer; 1 is first-token KL."
    )
    prompts: DatasetSpecification = Field(
        default_factory=_default_prompts, description="Prompts that the edit should not touch."
    )
    divergence: Divergence = Field(
        default="forward_kl", description="forward_kl is KL(reference || candidate)."
    )
    temperature: float = Field(default=1.0, gt=0.0, description="Of both distributions.")
    position_decay: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Weight of a position relative to the one before."
    )
    batch_size: int = Field(default=16, ge=1, description="Most sequences at once.")
    noise_floor: bool = Field(
        default=True, description="Measure what an unchanged model shows, once."
    )


class TeacherForcedKLScorer(Scorer):  # type: ignore[misc]  # heretic is not there to be typed
    """KL between the original's next tokens and the edited model's, over the original's answers."""

    settings: TeacherForcedKLSettings

    @property
    def score_name(self) -> str:
        """What Heretic calls the figure."""
        return f"KL over {self.settings.kl_tokens} tokens"

    def init(self, ctx: Context) -> None:
        """Have the original answer the prompts, and keep what it computed."""
        heretic = _heretic_model(ctx)
        model, settings = heretic.model, self.settings
        # The adapters are the edit.
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
        """Measure the model as Heretic has edited it now."""
        # Read anew each time: Heretic may have put another model there.
        measured = self._kl.score(_heretic_model(ctx).model)
        summary = measured.summary
        if summary.infinite_count:
            raise MeasurementError(
                f"the KL is infinite: at {summary.infinite_count} of {summary.rows} positions the "
                "edited model gives no probability to a token that the original allows"
            )
        return _score(summary.mean, summary.standard_error, summary.noise_floor)

    def get_baseline_score(self, ctx: Context) -> Score:
        """The original against itself."""
        floor = self._kl.noise_floor
        return _score(0.0, None, None if floor is None else floor.value)


def _heretic_model(ctx: Context) -> Any:
    """Heretic's model behind the context, which itself gives first-token logits only."""
    heretic = getattr(ctx, "_model", None)
    for path in ("model", "tokenizer", "settings.response_prefix"):
        found = heretic
        for name in path.split("."):
            if not hasattr(found, name):
                raise ScorerError(
                    f"this Heretic has no ctx._model.{path}, which teacher forcing needs: "
                    "heretic-kl was written for another version of it"
                )
            found = getattr(found, name)
    return heretic


def _prompts(given: Sequence[Any]) -> tuple[Prompt, ...]:
    return tuple(Prompt(prompt.user, prompt.system or None) for prompt in given)


def _score(value: float, standard_error: float | None, floor: float | None) -> Score:
    error = "" if standard_error is None else f" ± {standard_error:.2g}"
    below = " (within noise)" if floor is not None and 0.0 < value <= floor else ""
    text = f"{value:.4g}{error}{below}"
    return Score(value=value, rich_display=text, md_display=text)
