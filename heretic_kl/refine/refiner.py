"""Everything that refining edits of one model needs, made once: examples, openings, objective.

Knows what a refusal is only through a function that it is given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from heretic_kl.ablation import Plan
from heretic_kl.engine import Engine, forced_sequences
from heretic_kl.errors import MeasurementError
from heretic_kl.model import edited
from heretic_kl.prompts import Kind, Prompt
from heretic_kl.refine.objective import Example, Objective
from heretic_kl.refine.openings import mine_openings
from heretic_kl.refine.optimize import (
    Check,
    Prompts,
    Refined,
    RefineOptions,
    evaluate,
    refine,
)

PURITY = 0.6
"""See `mine_openings`. At 0.9 openings of the demo model went deeper and were evaded more often."""
REMINED_PROMPTS = 64
"""Harmful prompts of which a candidate's responses are read at every check."""
OPENING_TOKENS = 16
"""Tokens of those responses."""

IsRefusal = Callable[[str], bool]
ByKind = Mapping[Kind, Sequence[Prompt]]


class Refiner:
    """Refines edits of one model. Makes its examples when it is built, with the model unedited.

    Args:
        engine: of the model.
        train: prompts by kind (`harmful`, `harmless`), for gradients.
        validation: other prompts by kind, to stop early.
        is_refusal: whether a response's text is a refusal.
        kl_tokens: N, scored positions of each harmless response.
        max_response_tokens: of the responses that tell what the reference refuses.
        temperature: of both distributions in the KL.

    Raises:
        MeasurementError: the reference refuses no harmful training prompt or answers no harmless
            one, so there is nothing to learn from.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        train: ByKind,
        validation: ByKind,
        is_refusal: IsRefusal,
        kl_tokens: int,
        max_response_tokens: int,
        temperature: float = 1.0,
    ) -> None:
        self._engine = engine
        self._is_refusal = is_refusal
        self._kl_tokens = kl_tokens
        self._max_tokens = max_response_tokens
        refused, refusals = self._split(train["harmful"], refused=True)
        answered, others = self._split(train["harmless"], refused=False)
        to_check, _ = self._split(validation["harmless"], refused=False)
        if not refused or not answered or not to_check:
            raise MeasurementError(
                f"nothing to learn from: the model refuses {len(refused)} of "
                f"{len(train['harmful'])} harmful training prompts and answers {len(answered)} of "
                f"{len(train['harmless'])} harmless ones and {len(to_check)} of "
                f"{len(validation['harmless'])} harmless validation prompts"
            )
        self._refused = refused
        self._refusals = refusals
        self._others = others
        self.train = Prompts(self._examples(answered), self._encoded(refused))
        self.validation = Prompts(self._examples(to_check), self._encoded(validation["harmful"]))
        openings = mine_openings(refusals, others, purity=PURITY)
        lm = engine.lm
        self.objective = Objective(engine.runner, lm.head, openings, temperature=temperature)

    def refine(
        self,
        start: Plan,
        options: RefineOptions,
        *,
        tell: Callable[[Check], None] = lambda check: None,
    ) -> Refined:
        """Learn an edit from a start; see `heretic_kl.refine.refine`."""
        draw = random.Random(options.seed)
        return refine(
            start,
            self._engine.lm.architecture,
            self.objective,
            self.train,
            self.validation,
            options,
            tell=tell,
            remine=lambda plan: self._remine(plan, draw),
        )

    def loss(self, plan: Plan, options: RefineOptions = RefineOptions()) -> float:  # noqa: B008
        """The loss of an edit on validation prompts, to choose where to start, nats."""
        check = evaluate(
            self.objective, self._engine.lm.architecture, plan, self.validation, options
        )
        return check.kl + options.multiplier * check.hinge

    def _remine(self, plan: Plan, draw: random.Random) -> None:
        """Learn openings from refusals by other words, which a candidate may turn to."""
        chosen = draw.sample(self._refused, min(REMINED_PROMPTS, len(self._refused)))
        with edited(self._engine.lm.architecture, plan):
            responses = self._engine.runner.responses(self._encoded(chosen), OPENING_TOKENS)
        for response in responses:
            text = self._engine.lm.chat.decode(response.tokens)
            pool = self._refusals if self._is_refusal(text) else self._others
            pool.append(tuple(response.tokens))
        self.objective.openings = mine_openings(self._refusals, self._others, purity=PURITY)

    def _split(
        self, prompts: Sequence[Prompt], *, refused: bool
    ) -> tuple[list[Prompt], list[tuple[int, ...]]]:
        """Prompts that the reference refuses (or answers), and its responses to them."""
        responses = self._engine.responses(tuple(prompts), self._max_tokens)
        pairs = [
            (prompt, tuple(response.tokens))
            for prompt, response in zip(prompts, responses, strict=True)
            if self._is_refusal(self._engine.lm.chat.decode(response.tokens)) == refused
        ]
        return [prompt for prompt, _ in pairs], [tokens for _, tokens in pairs]

    def _examples(self, prompts: Sequence[Prompt]) -> list[Example]:
        reference = self._engine.reference(tuple(prompts), self._kl_tokens)
        assert reference.hidden is not None  # the engine keeps hidden states
        examples, first = [], 0
        for sequence in forced_sequences(reference):
            count = len(sequence.scored)
            examples.append(Example(sequence, reference.hidden[first : first + count]))
            first += count
        return examples

    def _encoded(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        return [self._engine.encode(prompt) for prompt in prompts]
