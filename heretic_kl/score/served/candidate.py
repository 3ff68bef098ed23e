"""A served model measured beside a reference; an adapter that its server ignores is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    DivergenceReduction,
    KLTable,
    LogitBlock,
    prompt_means,
)
from heretic_kl.score.served.bound import TopBlock, lower_bound
from heretic_kl.score.served.exchange import PromptEndpoint, ServedTokens

if TYPE_CHECKING:
    from heretic_kl.score.reference_run import CandidateTable, Observe, ReferenceRun

SEQUENCES_AT_ONCE = 16
"""Their log-probabilities are in memory together."""
COMPARED = 4
"""Sequences by which an adapter is told from what it is put on."""
SAME = 1e-6
"""A difference of nats or of probability that rounding of float32 makes."""


class KnownTokens(NamedTuple):
    """How much a server told of a candidate; prints as what is missing."""

    top: int
    """So many of the likeliest tokens were asked for."""
    reference_rest: float
    """Probability of all other tokens, mean over positions, then prompts."""
    candidate_rest: float

    def __str__(self) -> str:
        return (
            f"a lower bound from the top {self.top} tokens; the others have "
            f"{self.candidate_rest:.2g} of the candidate's probability, "
            f"{self.reference_rest:.2g} of the reference's"
        )


def compare_served(
    run: ReferenceRun,
    endpoint: PromptEndpoint,
    reduction: DivergenceReduction,
    *,
    base: str | None = None,
    observe: Observe | None = None,
) -> CandidateTable:
    """Measure a served model: the divergence if the server tells all tokens, else a lower bound.

    Args:
        run: the reference's side.
        endpoint: the model.
        reduction: what is measured; of a lower bound the forward KL at temperature 1.
        base: what the model is an adapter of, as the server names it; None: as the server says.
        observe: sees logits, or the best tokens if not all tokens are told.

    Raises:
        MeasurementError: the server cannot be used, reads other tokens, or ignores the adapter.
    """
    from heretic_kl.score.reference_run import CandidateTable

    if endpoint.top and reduction != DivergenceReduction():
        raise MeasurementError(
            "of a candidate's likeliest tokens only forward_kl at temperature 1 has a lower bound: "
            "have the server tell all tokens (--top-logprobs 0)"
        )
    run.head_for(run.reference.identity.vocabulary_size)  # refuses a reference without any
    tokens = ServedTokens(run.tokenizer, run.reference.identity.vocabulary_size)
    base = base or endpoint.parent()
    endpoint = endpoint.answering(run.sequences[0], tokens)
    if base is not None:
        _require_another(run, endpoint, base, tokens)
    blocks, known_tokens = _blocks(run, endpoint, tokens), None
    if endpoint.top:
        bound = lower_bound(run.reference, blocks, run.head)
        table = bound.table
        ours, theirs = (
            float(prompt_means(table, values=rest).mean())
            for rest in (bound.reference_rest, bound.candidate_rest)
        )
        known_tokens = KnownTokens(endpoint.top, ours, theirs)
        if observe is not None:
            observe.note_best(bound.best_tokens)
    else:
        table = _whole_table(run, endpoint, blocks, reduction, observe)
    change = table.candidate_probability - table.reference_probability
    if base is not None and max(float(table.values.max()), float(change.abs().max())) <= SAME:
        raise MeasurementError(_ignored(endpoint, "like the reference, to the last digits"))
    kind = f"served, top {endpoint.top}" if endpoint.top else "served"
    return CandidateTable(table, kind, known_tokens=known_tokens)


def _blocks(
    run: ReferenceRun, endpoint: PromptEndpoint, tokens: ServedTokens
) -> Iterator[TopBlock]:
    row = 0
    for start in range(0, len(run.sequences), SEQUENCES_AT_ONCE):
        sequences = run.sequences[start : start + SEQUENCES_AT_ONCE]
        run.loader.progress("candidate", start, len(run.sequences))
        for ids, values in endpoint.log_probabilities(sequences, tokens):
            yield TopBlock(torch.arange(row, row + len(ids)), ids, values)
            row += len(ids)
    run.loader.progress("candidate", len(run.sequences), len(run.sequences))


def _whole_table(
    run: ReferenceRun,
    endpoint: PromptEndpoint,
    blocks: Iterator[TopBlock],
    reduction: DivergenceReduction,
    observe: Observe | None,
) -> KLTable:
    """The table of a candidate of which every token is told."""
    first = next(blocks)
    count, needed = first.tokens.shape[1], run.reference.identity.vocabulary_size
    used = needed if run.tokenizer is None else min(needed, len(run.tokenizer))
    head, size = run.head_for(count) if count >= used else (None, needed)

    def whole() -> Iterator[LogitBlock]:
        for rows, tokens, values in chain([first], blocks):
            logits = torch.full((len(rows), needed + 1), torch.nan)
            logits.scatter_(1, tokens % (needed + 1), values.float())  # padding goes last
            if bool(logits[:, :size].isnan().any()):
                raise MeasurementError(
                    f"{endpoint.name} tells {count} of {size} tokens: have the server tell all of "
                    "them (vLLM: --max-logprobs -1), or pass --top-logprobs 20"
                )
            yield LogitBlock(rows, logits[:, :size])

    return run.table(whole(), head, reduction, None, observe)


def _require_another(
    run: ReferenceRun, endpoint: PromptEndpoint, base: str, tokens: ServedTokens
) -> None:
    """Refuse a model that answers as another one, bit for bit."""
    few = run.sequences[:COMPARED]
    of_base = replace(endpoint, model=base).log_probabilities(few, tokens)
    pairs = zip(endpoint.log_probabilities(few, tokens), of_base, strict=True)
    if all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True)):
        raise MeasurementError(_ignored(endpoint, f"bit for bit like {base}"))


def _ignored(endpoint: PromptEndpoint, how: str) -> str:
    return (
        f"{endpoint.name} answers {how}: the server ignores the adapter; start it so that it loads "
        "adapters (vLLM: --enable-lora), or leave out --base if it is none"
    )
