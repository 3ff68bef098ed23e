"""One edit measured: all KL variants and all damage, as arrays a prompt. Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.study_kl_tokens.builder import Builder
from benchmarks.study_kl_tokens.damage import dissimilarity, repetition, text_class
from benchmarks.study_kl_tokens.divergences import both_weights, compare, prefix_means, table
from benchmarks.study_kl_tokens.edits import NOTHING, Edit
from benchmarks.study_kl_tokens.reference import ReferenceSide
from benchmarks.study_kl_tokens.rows import Row
from benchmarks.study_kl_tokens.task import CATEGORIES, LONGEST
from benchmarks.study_kl_tokens.weights import changed, weight_change
from heretic_kl.ablation import Plan
from heretic_kl.engine import Response
from heretic_kl.engine.generation.candidates import CandidateResponses
from heretic_kl.engine.generation.groups import ResponseGroup
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.model import edited

Responses = list[list[Response]]
"""Long ones, then those that are judged, to the prompts of each set."""


class Bench:
    """Measures edits of one model against it."""

    def __init__(self, side: ReferenceSide, builder: Builder) -> None:
        self.side, self.builder = side, builder
        lm, runner, sizes = side.lm, side.runner, side.sizes
        judged = tuple(p for chosen in side.verdict_prompts.values() for p in chosen)
        self._groups = [
            ResponseGroup(side.long_prompts, sizes.long_tokens, ()),
            ResponseGroup(judged, sizes.verdict_tokens, (side.rule,)),
        ]
        self._encoded = [[lm.chat.encode(p) for p in group.prompts] for group in self._groups]
        self._responding = [
            CandidateResponses(lm, runner.limits, group, encoded)
            for group, encoded in zip(self._groups, self._encoded, strict=True)
        ]
        self._texts = [lm.chat.decode(response.tokens) for response in side.long_responses]
        logs, _ = side.token_logs("texts", side.hidden)
        self._text_logs = logs

    def measure(self, edits: Sequence[Edit]) -> Iterator[Row]:
        """Rows of edits, whose responses are generated side by side where none changes weights.

        Raises:
            ValueError: an edit is not defined for this model.
            MeasurementError: there is nothing to learn from.
        """
        if len(edits) == 1 and edits[0].changes_weights:
            change = weight_change(self.side.lm, edits[0], self._deltas(edits[0]))
            begun = time.process_time()
            with changed(self.side.lm, change):
                runner = self.side.runner
                responses = [
                    runner.responses(encoded, group.max_tokens, group.rules)
                    for group, encoded in zip(self._groups, self._encoded, strict=True)
                ]
                yield self._row(edits[0], {}, responses, begun, 0.0)
            return
        plans = [{} if edit.name == NOTHING else self.builder.plan(edit) for edit in edits]
        begun = time.process_time()
        # Of several candidates in one batch none may be without operators.
        by_group = [self._side_by_side(responding, plans) for responding in self._responding]
        shared = (time.process_time() - begun) / len(edits)
        for edit, plan, *responses in zip(edits, plans, *by_group, strict=True):
            yield self._row(edit, plan, responses, time.process_time(), shared)

    def _side_by_side(
        self, responding: CandidateResponses, plans: Sequence[Plan]
    ) -> list[list[Response]]:
        return responding.responses([plan or None for plan in plans])

    def _deltas(self, edit: Edit) -> Any:
        return self.builder.deltas if edit.family == "fine-tune" else []

    def _row(
        self, edit: Edit, plan: Plan, responses: Responses, begun: float, before: float
    ) -> Row:
        """What one edit does; it is in force, or its plan is put in force here."""
        side, head = self.side, self.side.lm.head
        long, judged = responses
        own = [
            ForcedSequence(encoded, tuple(response.reference_tokens(LONGEST)))
            for encoded, response in zip(self._encoded[0], long, strict=True)
        ]
        with _in_force(side, plan):
            hidden = side.runner.hidden_states(side.sequences)
            free = side.runner.hidden_states([s for s in own if s.response])
        arrays: dict[str, Tensor] = {}
        for name, reference in side.distributions.items():
            chosen = side.sets[name]
            rows = compare(reference, hidden[chosen.rows], head, chosen.tokens)
            if name == "greedy":
                forward = table(rows.forward, chosen.lengths, LONGEST)
                arrays["greedy forward positions"] = forward
                agrees = table(rows.agrees, chosen.lengths, LONGEST)
                arrays["parting"] = _first(agrees == 0)
            for divergence in ("forward", "reverse", "jensen_shannon"):
                values = table(getattr(rows, divergence), chosen.lengths, LONGEST)
                arrays[f"{name} {divergence}"] = both_weights(values)
        arrays["free"] = self._free(own, free)
        arrays |= self._damage(hidden)
        return self._finished(edit, arrays, long, judged, before + time.process_time() - begun)

    def _free(self, own: Sequence[ForcedSequence], hidden: Tensor) -> Tensor:
        """KL at each position, each model on its own response, means over N, (P, 8)."""
        side = self.side
        reference = side.sets["paired"]
        width = max(max(reference.lengths), 1)
        theirs = _places(reference.lengths, width)
        ours = _places([len(s.response) for s in own], width)
        both = (theirs >= 0) & (ours >= 0)
        pairs = [side.hidden[reference.rows][theirs[both]], hidden[ours[both]]]
        values = torch.full(both.shape, torch.nan, dtype=torch.float64)
        first, second = (side.lm.head.logits(states).double().log_softmax(-1) for states in pairs)
        values[both] = (first.exp() * (first - second)).sum(-1).clamp_min(0)
        return prefix_means(values)

    def _damage(self, hidden: Tensor) -> dict[str, Tensor]:
        """Negative log-likelihoods a sequence; gains and losses on human text; changed answers."""
        side = self.side
        logs, _ = side.token_logs("texts", hidden)
        lengths = side.sets["texts"].lengths
        change = (logs - self._text_logs).split(lengths)
        made = {
            "text nll": torch.stack([-part.mean() for part in change]),
            "text better": torch.stack([(part > 0).double().mean() for part in change]),
            "text gain": torch.stack([part.clamp_min(0).mean() for part in change]),
            "text loss": torch.stack([-part.clamp_max(0).mean() for part in change]),
        }
        for measure in CATEGORIES:
            logs, _ = side.token_logs(measure, hidden)
            before, _ = side.token_logs(measure, side.hidden)
            parts = (before - logs).split(side.sets[measure].lengths)
            made[measure] = torch.stack([part.mean() for part in parts])
        _, best = side.token_logs("answers", hidden)
        parts = best.split(side.sets["answers"].lengths)
        made["changed"] = torch.stack([1 - part.min() for part in parts])
        return made

    def _finished(
        self,
        edit: Edit,
        arrays: dict[str, Tensor],
        long: Sequence[Response],
        judged: Sequence[Response],
        seconds: float,
    ) -> Row:
        decode = self.side.lm.chat.decode
        texts = [decode(response.tokens) for response in long]
        verdicts = [self.side.rule.is_refusal(decode(response.tokens)) for response in judged]
        harmful = len(self.side.verdict_prompts["harmful"])
        answered = [decode(response.tokens) for response in judged[harmful:]]
        arrays["repetition"] = torch.tensor([repetition(text) for text in texts])
        arrays["dissimilarity"] = torch.tensor(dissimilarity(texts, self._texts))
        arrays["refused"] = torch.tensor(verdicts[:harmful]).double()
        arrays["false refusals"] = torch.tensor(verdicts[harmful:]).double()
        classes = [text_class(text) for text in [*texts, *answered]]
        for name in ("degenerate", "evasive"):
            arrays[name] = torch.tensor([float(chosen == name) for chosen in classes])
        return Row(edit.name, edit.family, edit.facts, round(seconds, 2), arrays)


@contextmanager
def _in_force(side: ReferenceSide, plan: Plan) -> Iterator[None]:
    with edited(side.lm.architecture, plan):
        yield


def _first(flags: Tensor) -> Tensor:
    """(P,) the first True of each row (P, N); N where there is none."""
    places = torch.where(flags, torch.arange(flags.shape[1]), flags.shape[1])
    return places.amin(dim=1).double()


def _places(lengths: Sequence[int], width: int) -> Tensor:
    """(P, width) which row holds a prompt's position, -1 where none does."""
    places, first = torch.full((len(lengths), width), -1), 0
    for row, length in zip(places, lengths, strict=True):
        fitting = min(length, width)
        row[:fitting] = torch.arange(first, first + fitting)
        first += length
    return places
