"""Everything that refining edits of one model needs, made once: examples, openings, objective.

Knows what a refusal is only through a rule that it is given.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from heretic_kl.ablation import Plan
from heretic_kl.engine import Engine, Response, forced_sequences
from heretic_kl.engine.memory_limits import if_memory_allows
from heretic_kl.errors import MeasurementError
from heretic_kl.model import edited
from heretic_kl.model.placement import is_offloaded
from heretic_kl.prompts import Kind, Prompt
from heretic_kl.ranks import from_first
from heretic_kl.refine.checks import Check, Reread
from heretic_kl.refine.objective import Example, Objective, Refusal
from heretic_kl.refine.openings import mine_openings
from heretic_kl.refine.training import (
    CHECKED_AT_ONCE,
    Prompts,
    Refined,
    RefineOptions,
    evaluate,
    refine,
)
from heretic_kl.requests import StopRule

REREAD_PROMPTS = 64
"""Harmful training prompts to which a candidate responds at every check."""
OPENING_TOKENS = 16
"""Tokens of those responses, at most."""

ADVICE = ": try --refinement.gradient-checkpointing"


class RefusalJudge(StopRule, Protocol):
    """Tells refusals from other responses, and when a response needs no more tokens for that."""

    def is_refusal(self, text: str) -> bool:
        """Whether a response refuses."""
        ...


ByKind = Mapping[Kind, Sequence[Prompt]]


class Refiner:
    """Refines edits of one model. Mines openings when it is built, with the model unedited.

    Args:
        engine: of the model.
        train: prompts by kind (`harmful`, `harmless`), for gradients.
        validation: other prompts by kind, to stop early.
        rule: what a refusal is.
        kl_tokens: N, scored positions of each harmless response.
        max_response_tokens: of the responses that tell what the reference refuses.
        temperature: of both distributions in the KL.
        checkpointing: steps need less memory and more time; see `Objective`.

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
        rule: RefusalJudge,
        kl_tokens: int,
        max_response_tokens: int,
        temperature: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        self._engine = engine
        self._checkpointing = checkpointing
        self._rule = rule
        self._kl_tokens = kl_tokens
        self._max_tokens = max_response_tokens
        self._responses: dict[Prompt, Response] = {}
        self._refused, self._refusals = self._split(train["harmful"], refused=True)
        self._answered, self._others = self._split(train["harmless"], refused=False)
        self._checked, _ = self._split(validation["harmless"], refused=False)
        self._judged = self._encoded(validation["harmful"])
        if not any(self._refusals) or not self._answered or not self._checked:
            raise MeasurementError(
                f"nothing to learn from: the model refuses {len(self._refused)} of "
                f"{len(train['harmful'])} harmful training prompts and answers "
                f"{len(self._answered)} of {len(train['harmless'])} harmless ones and "
                f"{len(self._checked)} of {len(validation['harmless'])} harmless validation prompts"
            )
        self._of_reference = tuple(self._refusals), tuple(self._others)
        openings = mine_openings(self._refusals, self._others)
        lm = engine.lm
        self.objective = Objective(
            engine.runner,
            lm.head,
            openings,
            temperature=temperature,
            checkpointed=lm.architecture.layers if checkpointing else (),
        )
        self.first_openings = openings
        """As the reference's own responses give them."""

    @cached_property
    def train(self) -> Prompts:
        """What gradients come from."""
        return Prompts(self._examples(self._answered), self._encoded(self._refused))

    @cached_property
    def validation(self) -> Prompts:
        """What checks are made on."""
        return Prompts(self._examples(self._checked), self._judged)

    def prepare(self) -> None:
        """Make the examples now, so that the time of a refinement is spent on steps."""
        _ = self.train, self.validation

    @torch.no_grad()
    def refusal_mass(self, plan: Plan) -> Tensor:
        """Probability of opening with one of the reference's refusals, (Q,) float64.

        On the harmful validation prompts; with the first openings, whatever was mined since.

        Raises:
            MeasurementError: it is not finite, as logits are not.
        """

        def measure() -> list[Tensor]:
            with edited(self._engine.lm.architecture, plan):
                return [
                    self.objective.terms([], self._judged[first : first + CHECKED_AT_ONCE]).log_mass
                    for first in range(0, len(self._judged), CHECKED_AT_ONCE)
                ]

        mined, self.objective.openings = self.objective.openings, self.first_openings
        try:
            mass = torch.cat(self._engine.limits.run(measure)).double().exp()
        finally:
            self.objective.openings = mined
        if not bool(mass.isfinite().all()):
            raise MeasurementError("the probability of opening with a refusal is not finite")
        return mass

    def refine(
        self,
        start: Plan,
        options: RefineOptions,
        *,
        evaluated: Check | None = None,
        tell: Callable[[Check], None] = lambda check: None,
    ) -> Refined:
        """Learn an edit from a start; see `heretic_kl.refine.refine`.

        Where memory runs out, all is done again with half as many prompts a step.

        Raises:
            MeasurementError: memory runs out with one prompt of each kind, or weights have been
                offloaded where it ran out before.
        """
        self._check_whole()
        begun = time.perf_counter()
        while True:
            elapsed = from_first(lambda: time.perf_counter() - begun)
            timed = replace(options, seconds=options.seconds - elapsed)
            reread = _Rereader(self, options.seed)
            # What candidates said before is forgotten: a resumed study learns the same edit.
            self._refusals, self._others = map(list, self._of_reference)
            self.objective.openings = self.first_openings
            learn = partial(
                refine,
                start,
                self._engine.lm.architecture,
                self.objective,
                self.train,
                self.validation,
                timed,
                evaluated=evaluated,
                tell=tell,
                reread=reread,
            )
            refined = if_memory_allows(learn)
            if refined is not None:
                return refined
            sizes = options.harmless_per_step, options.harmful_per_step
            if sizes == (1, 1):
                advice = "" if self._checkpointing else ADVICE
                raise MeasurementError(
                    f"out of memory with one prompt of each kind in a step{advice}"
                )
            self._engine.release()
            options = replace(
                options,
                harmless_per_step=max(1, sizes[0] // 2),
                harmful_per_step=max(1, sizes[1] // 2),
            )
            prompts = options.harmless_per_step + options.harmful_per_step
            self._engine.limits.notify(
                f"out of memory: refinement takes {prompts} prompts a step now"
            )

    def evaluate(self, plan: Plan) -> Check:
        """The terms of an edit on validation prompts and their `loss`, to choose where to start."""
        begun, where = time.perf_counter(), self._engine.lm.architecture
        check = self._engine.limits.run(
            lambda: evaluate(self.objective, where, plan, self.validation, RefineOptions())
        )
        return check._replace(seconds=from_first(lambda: time.perf_counter() - begun))

    def refusals(self, plan: Plan, encoded: Sequence[tuple[int, ...]]) -> list[Refusal]:
        """A candidate's refusals of prompts; openings are mined again from all that was said."""
        with edited(self._engine.lm.architecture, plan):
            responses = self._engine.runner.responses(encoded, OPENING_TOKENS, [self._rule])
        self._check_whole()  # responses may have run out of memory
        refusals = []
        for ids, response in zip(encoded, responses, strict=True):
            tokens = tuple(response.tokens)
            refused = self._rule.is_refusal(self._engine.lm.chat.decode(response.tokens))
            (self._refusals if refused else self._others).append(tokens)
            if refused:
                refusals.append(Refusal(ids, tokens))
        self.objective.openings = mine_openings(self._refusals, self._others)
        return refusals

    def _check_whole(self) -> None:
        if is_offloaded(self._engine.lm.model):
            raise MeasurementError("parts of the model are offloaded, and gradients need all of it")

    def _split(
        self, prompts: Sequence[Prompt], *, refused: bool
    ) -> tuple[list[Prompt], list[tuple[int, ...]]]:
        """Prompts that the reference refuses (or answers), and its responses to them.

        The responses end where the rule is decided: as directions and scorers ask for them.
        """
        responses = self._engine.responses(tuple(prompts), self._max_tokens, self._rule)
        self._responses |= dict(zip(prompts, responses, strict=True))
        pairs = [
            (prompt, tuple(response.tokens))
            for prompt, response in zip(prompts, responses, strict=True)
            if self._rule.is_refusal(self._engine.lm.chat.decode(response.tokens)) == refused
        ]
        return [prompt for prompt, _ in pairs], [tokens for _, tokens in pairs]

    def _examples(self, prompts: Sequence[Prompt]) -> list[Example]:
        """With the responses by which they were chosen, where those are long enough."""
        count = self._kl_tokens
        short = tuple(
            prompt
            for prompt in prompts
            if (response := self._responses[prompt]).end_token is None
            and len(response.tokens) < count
        )
        whole = self._engine.responses(short, count) if short else ()
        responses = self._responses | dict(zip(short, whole, strict=True))
        chosen = [responses[prompt] for prompt in prompts]
        reference = self._engine.reference(tuple(prompts), count, chosen)
        assert reference.hidden is not None  # the engine keeps hidden states
        examples, first = [], 0
        for sequence in forced_sequences(reference):
            count = len(sequence.scored)
            examples.append(Example(sequence, reference.hidden[first : first + count]))
            first += count
        return examples

    def _encoded(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        return [self._engine.encode(prompt) for prompt in prompts]


class _Rereader:
    """Has candidates respond to training prompts: to those refused last time, and to others."""

    def __init__(self, refiner: Refiner, seed: int) -> None:
        self._refiner, self._draw = refiner, random.Random(seed)
        self._refused: list[tuple[int, ...]] = []

    def __call__(self, plan: Plan) -> Reread:
        prompts = self._refiner.train.harmful
        others = [ids for ids in prompts if ids not in self._refused]
        count = max(0, min(REREAD_PROMPTS - len(self._refused), len(others)))
        chosen = [*self._refused, *self._draw.sample(others, count)]
        refusals = self._refiner.refusals(plan, chosen)
        self._refused = [refusal.prompt for refusal in refusals]
        return Reread(refusals, len(chosen))
