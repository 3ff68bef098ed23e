"""The options of a teacher-forced KL, defined once for commands, scorers and Python. No torch."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

DivergenceName: TypeAlias = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
"""The values of `heretic_kl.kl.Divergence`, which cannot be imported without torch."""


def sampling_seed(response: str) -> int | None:
    """Return the seed of `sampled(SEED)`; None for `greedy`."""
    return None if response == "greedy" else int(response[len("sampled(") : -1])


def _check_response(text: str) -> str:
    if not re.fullmatch(r"greedy|sampled\(\d{1,18}\)", text):
        raise PydanticCustomError("expected", "greedy or sampled(SEED), for instance sampled(0)")
    return text


Response = Annotated[str, AfterValidator(_check_response)]
Positions = Annotated[int, Field(ge=1, le=1024)]


class KLOptions(BaseModel):
    """Which divergence is measured, where and on which response; checked, frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    kl_tokens: Positions | None = Field(
        None, description="Positions of the response that are scored (default: the run's)"
    )
    divergence: DivergenceName = Field(
        "forward_kl",
        description="forward_kl (reference || candidate), reverse_kl or jensen_shannon",
    )
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Both models' logits are divided by it"
    )
    position_decay: float = Field(
        1.0, gt=0, le=1, description="Weight of each position relative to the one before"
    )
    response: Response = Field(
        "greedy",
        description="The reference's response that models are fed: greedy, sampled(SEED)",
    )


OptionsT = TypeVar("OptionsT", bound=KLOptions)


def checked_options(**values: object) -> KLOptions:
    """Return options given in Python; raise as `checked`."""
    return checked(KLOptions, values)


def checked(kind: type[OptionsT], values: Mapping[str, object]) -> OptionsT:
    """Return options of a kind.

    Raises:
        ValueError: one of them is missing or out of range; in one line.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise ValueError(f"{name}: {first['msg']}{got}") from None
