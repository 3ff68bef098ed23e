"""The first tokens of a reference's refusals, found from its own responses. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from heretic_kl.engine import Runner
from heretic_kl.model import ChatEncoder
from heretic_kl.prompts import Prompt
from heretic_kl.refine import mine_openings
from heretic_kl.scoring import RefusalRule

MOST_PROMPTS = 64
"""Of either kind: enough for openings that refusals share."""
RESPONSE_TOKENS = 32
"""By which a refusal has declined."""


def find_openers(
    runner: Any,
    chat: ChatEncoder,
    harmful: Sequence[Prompt],
    others: Sequence[Prompt],
    notify: Callable[[str], None],
    rule: RefusalRule | None = None,
) -> tuple[int, ...]:
    """First tokens with which the reference refuses and does not begin other responses.

    Args:
        runner: the reference in either back end, see `AnyRunner`.
        chat: its encoder of prompts.
        harmful: prompts some of which it refuses; the first `MOST_PROMPTS` are asked.
        others: prompts that it should not refuse; likewise.
        notify: told if it refuses none.
        rule: what a refusal is; None: the built-in phrases.

    Returns:
        Token ids in order; empty where it refuses none.
    """
    rule = RefusalRule() if rule is None else rule
    asked = [*harmful[:MOST_PROMPTS], *others[:MOST_PROMPTS]]
    encoded = [chat.encode(prompt) for prompt in asked]
    stop_early = ((rule,),) if isinstance(runner, Runner) else ()
    pools: tuple[list[list[int]], list[list[int]]] = ([], [])
    for response in runner.responses(encoded, RESPONSE_TOKENS, *stop_early):
        pools[rule.is_refusal(chat.decode(response.tokens))].append(list(response.tokens))
    answers, refusals = pools
    if not any(refusals):
        notify(f"the reference refuses none of {len(asked)} prompts: the KL is not split")
        return ()
    openings = mine_openings(refusals, answers).openings
    return tuple(sorted({opening[0] for opening in openings}))
