"""The terms of the loss over minibatches: KL on harmless prompts, refusal mass on harmful ones.

All come from one teacher-forced pass over a tree of tokens. Takes no step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heretic_kl.engine import Runner
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.engine.teacher_forcing.forward import forced_portions
from heretic_kl.kl import Head
from heretic_kl.model import gradient_checkpointing
from heretic_kl.refine.openings import OpeningSet, opening_log_mass

FLOAT32_HEAD_BYTES = 2**30
"""A head's weight up to this size is kept in float32 as well."""


@dataclass(frozen=True)
class Example:
    """A harmless prompt with the reference's response and states over it."""

    sequence: ForcedSequence
    hidden: Tensor  # (n, D), the reference's final hidden states at scored positions


class Refusal(NamedTuple):
    """A harmful prompt and a refusal of it, both as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """Up to the token at which it is known to refuse."""


class Terms(NamedTuple):
    """What one pass over some prompts gives, with gradients where they are on."""

    kl: Tensor  # (P,) nats, forward KL(reference || candidate), mean over positions
    log_mass: Tensor  # (Q,) log probability of opening with a refusal
    log_refusals: Tensor  # (R,) log probability of these very refusals


class Objective:
    """Computes the terms for prompts of both kinds.

    Args:
        runner: of the model, the edit in force around the calls.
        head: makes logits of final hidden states.
        openings: how refusals begin.
        temperature: both models' logits are divided by it in the KL.
        checkpointed: layers that keep their inputs alone in passes with gradients. The backward
            pass runs them again, so the edit must be in force around it too.
    """

    def __init__(
        self,
        runner: Runner,
        head: Head,
        openings: OpeningSet,
        *,
        temperature: float = 1.0,
        checkpointed: Sequence[nn.Module] = (),
    ) -> None:
        self._runner = runner
        self._checkpointed = checkpointed
        self.openings = openings
        self._temperature = temperature
        weight = head.weight[: head.vocabulary].detach()
        small = weight.numel() * 4 <= FLOAT32_HEAD_BYTES
        self._weight = weight.float() if small else weight
        self._head = head

    def terms(
        self,
        harmless: Sequence[Example],
        harmful: Sequence[tuple[int, ...]],
        refusals: Sequence[Refusal] = (),
    ) -> Terms:
        """Run all prompts in one pass.

        Args:
            harmless: P examples.
            harmful: Q prompts' token ids.
            refusals: R refusals whose own probability is asked for.
        """
        contexts = self.openings.contexts
        sequences = [example.sequence for example in harmless]
        # The last token of a forced response is not fed: any token stands for it.
        sequences += [ForcedSequence(ids, (*c, 0)) for ids in harmful for c in contexts]
        count = sum(len(example.hidden) for example in harmless)
        last = count + len(harmful) * sum(len(context) + 1 for context in contexts)
        sequences += [ForcedSequence(*refusal) for refusal in refusals]
        hidden = self._hidden(sequences)
        return Terms(
            self._kl(harmless, hidden[:count]),
            self._log_mass(len(harmful), hidden[count:last]),
            self._log_refusals(refusals, hidden[last:]),
        )

    def _hidden(self, sequences: Sequence[ForcedSequence]) -> Tensor:
        """Final hidden states at scored positions (rows, D), sequence by sequence."""
        layers = self._checkpointed if torch.is_grad_enabled() else ()
        # A cache of the prefix would grow again when layers run again.
        batches = self._runner.laid_out(sequences, share_prefix=not layers)
        with gradient_checkpointing(layers):
            portions = list(forced_portions(self._runner.lm, batches))
        rows = torch.cat([portion.rows for portion in portions])
        hidden = torch.cat([portion.hidden[0] for portion in portions])
        return hidden[rows.argsort().to(hidden.device)]

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self._head
        logits = torch.nn.functional.linear(hidden.to(self._weight), self._weight).float()
        if head.bias is not None:
            logits = logits + head.bias[: head.vocabulary].float()
        logits = logits * head.scale if head.scale != 1.0 else logits
        if head.softcap is not None:
            logits = torch.tanh(logits / head.softcap) * head.softcap
        return logits

    def _kl(self, harmless: Sequence[Example], hidden: Tensor) -> Tensor:
        if not harmless:
            return hidden.new_zeros(0, dtype=torch.float32)
        with torch.no_grad():
            states = torch.cat([example.hidden for example in harmless])
            reference = (self._logits(states) / self._temperature).log_softmax(dim=-1)
        candidate = (self._logits(hidden) / self._temperature).log_softmax(dim=-1)
        rows = torch.nn.functional.kl_div(candidate, reference, log_target=True, reduction="none")
        parts = torch.split(rows.sum(dim=-1), [len(example.hidden) for example in harmless])
        return torch.stack([part.mean() for part in parts])

    def _log_mass(self, prompts: int, hidden: Tensor) -> Tensor:
        if not prompts:
            return hidden.new_zeros(0, dtype=torch.float32)
        contexts = self.openings.contexts
        places: dict[tuple[int, ...], int] = {}
        start = 0
        for context in contexts:
            for depth in range(len(context) + 1):
                places.setdefault(context[:depth], start + depth)
            start += len(context) + 1
        chosen = [places[node.prefix] for node in self.openings.nodes]
        by_prompt = hidden.view(prompts, start, -1)[:, chosen]  # (Q, nodes, D)
        logits = self._logits(by_prompt.flatten(0, 1)).view(prompts, len(chosen), -1)
        return opening_log_mass(self.openings, list(logits.log_softmax(dim=-1).unbind(dim=1)))

    def _log_refusals(self, refusals: Sequence[Refusal], hidden: Tensor) -> Tensor:
        if not refusals:
            return hidden.new_zeros(0, dtype=torch.float32)
        tokens = [token for refusal in refusals for token in refusal.response]
        rows = self._logits(hidden).log_softmax(dim=-1)
        at_tokens = rows.gather(1, torch.tensor(tokens, device=rows.device).unsqueeze(1))
        parts = torch.split(at_tokens.squeeze(1), [len(refusal.response) for refusal in refusals])
        return torch.stack([part.sum() for part in parts])


def minibatches(count: int, size: int, generator: random.Random) -> Iterator[list[int]]:
    """Endless minibatches of indices, every index once before any comes again."""
    order: list[int] = []
    while True:
        while len(order) < size:
            fresh = list(range(count))
            generator.shuffle(fresh)
            order += fresh
        yield order[:size]
        del order[:size]
