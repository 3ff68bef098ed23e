"""The parts of one teacher-forced trial, told apart inside it.

Timed where they happen, by hooks on the model's body, around the head and around the reduction:

- `layers`: the body over the batches; `prefix`: over the tokens that all prompts begin with, where
  they are not part of a batch's tree of tokens.
- `head_of_candidate`, `head_of_reference`: calls of the head; the reference's are those beyond one
  for each call of the reduction (none where its logits are kept).
- `statistics`: the reduction, without what it prepares of the reference before the trial.
- `rest`: the trial's seconds without these and `trunk`; copies of the prefix's cache are in it.

Timed apart from it:

- `trunk`: copies of states of the batches' sizes, which is what resuming at a layer takes; in the
  trial neither prefix nor layers.
- `not_by_token_seconds`: as many passes from the same layer, under the same edit, of one token
  each: Python, dispatch and every weight read once. Contained in `prefix` and `layers`.

Arithmetic: floating-point operations of the matrix products that a trial needs, divided by the rate
of a matrix product of the model's own shape and dtype, measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

TOKENS_OF_A_BATCH = 25
"""About what prompts have behind their common prefix; rows of the matrix product measured."""


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of some runs after one that does not count."""
    work()
    return statistics.median(seconds_of(work) for _ in range(repeats))


def seconds_of(work: Callable[[], object]) -> float:
    """Of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def matrix_rate(rows: int, width: int, dtype: torch.dtype, repeats: int) -> float:
    """Floating-point operations a second of (rows, D) @ (D, 2.67 D), a gate projection's shape.

    With the weight as it is or packed, whichever is faster.
    """
    from heretic_kl.kl.packing import packed

    a, weight = torch.randn(rows, width).to(dtype), torch.randn(width * 8 // 3, width).to(dtype)
    packed_weight = packed(weight)
    works = [lambda: [a @ weight.T for _ in range(50)]]
    if packed_weight is not None:
        works.append(lambda: [packed_weight.product(a, weight) for _ in range(50)])
    seconds = min(median_seconds(work, repeats) for work in works)
    return 50 * 2 * rows * weight.numel() / seconds


class TrialParts:
    """Seconds and calls of the parts of one trial.

    Args:
        reduction: of the trial's request; pass this in its place.
    """

    def __init__(self, reduction: Any) -> None:
        self._reduction = reduction
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.seconds = dict.fromkeys(("prefix", "layers", "head", "statistics"), 0.0)
        self.calls = dict.fromkeys(self.seconds, 0)
        self.shapes: list[tuple[int, int]] = []
        """Of token batches (rows, T), the prefix aside."""
        self.fed_tokens = 0

    def prepare(self, reference: Tensor) -> Any:
        """What the reduction makes of reference logits; before the trial that is timed."""
        return self._reduction.prepare(reference)

    def __call__(self, *arguments: Any) -> Any:
        """The reduction, timed."""
        start = time.perf_counter()
        columns = self._reduction(*arguments)
        self._add("statistics", start)
        return columns

    @contextmanager
    def watching(self, body: torch.nn.Module) -> Iterator[None]:
        """Time calls of the body and of all heads."""
        from heretic_kl.kl import Head

        begun: list[tuple[str, float]] = []

        def before(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
            tokens = named["input_ids"]
            # Versions of transformers call it differently.
            caches = [value for value in named.values() if hasattr(value, "get_seq_length")]
            prefix = any(cache.get_seq_length() == 0 for cache in caches)
            self.fed_tokens += tokens.numel()
            if not prefix:
                self.shapes.append(tuple(tokens.shape))
            begun.append(("prefix" if prefix else "layers", time.perf_counter()))

        def after(*_anything: Any) -> None:
            self._add(*begun.pop())

        own = Head.logits

        def logits(head: Head, hidden: Tensor) -> Tensor:
            start = time.perf_counter()
            found = own(head, hidden)
            if hidden.numel():
                self._add("head", start)
            return found

        handles = [
            body.register_forward_pre_hook(before, with_kwargs=True),
            body.register_forward_hook(after),
        ]
        Head.logits = logits  # type: ignore[method-assign]
        try:
            yield
        finally:
            Head.logits = own  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()

    def _add(self, part: str, start: float) -> None:
        self.seconds[part] += time.perf_counter() - start
        self.calls[part] += 1


def breakdown(bench: Any, prompts: int, positions: int, lowest: int) -> dict[str, Any]:
    """Median seconds of each part of one trial, and the arithmetic it needs.

    Args:
        bench: see `engine.py`.
        prompts: how many.
        positions: N.
        lowest: the first edited layer.
    """
    from heretic_kl.kl import DivergenceReduction

    lm, plan, engine = bench.lm, bench.plan(lowest), bench.engine()
    parts = TrialParts(DivergenceReduction())
    request = bench.request(prompts, positions, parts)
    for _ in range(2):  # what a first trial records is there now
        engine.measure(plan, [request])
    found: list[dict[str, float]] = []
    for _ in range(bench.repeats):
        parts.clear()
        with parts.watching(lm.body):
            total = seconds_of(lambda: engine.measure(plan, [request]))
        found.append({"total": total, **_told_apart(parts)})
    seconds = {name: statistics.median(each[name] for each in found) for name in found[0]}
    run = len(lm.architecture.layers) - lowest
    seconds["trunk"] = _copying(parts, lm, bench.repeats) if lowest else 0.0
    seconds["rest"] = seconds["total"] - sum(s for name, s in seconds.items() if name != "total")
    rows = engine.reference(request.prompts, positions).rows
    rate = matrix_rate(16 * TOKENS_OF_A_BATCH, lm.architecture.width, lm.dtype, bench.repeats)
    weights = sum(p.numel() for p in lm.architecture.layers[0].parameters() if p.ndim == 2)
    heads = 1 + (parts.calls["head"] > parts.calls["statistics"])
    operations = {
        "layers": 2 * run * weights * parts.fed_tokens,
        "heads": heads * 2 * rows * lm.head.weight.numel(),
    }
    least = sum(operations.values()) / rate
    return {
        "prompts": prompts,
        "positions": positions,
        "first_edited_layer": lowest,
        "fed_tokens": parts.fed_tokens,
        "scored_rows": rows,
        "passes": len(parts.shapes) + parts.calls["prefix"],
        "seconds": seconds,
        "not_by_token_seconds": _one_token_each(parts, lm, plan, lowest, bench.repeats),
        "operations": operations,
        "matrix_product_per_second": rate,
        "least_seconds_by_arithmetic": least,
        "total_over_least": seconds["total"] / least,
    }


def _told_apart(parts: TrialParts) -> dict[str, float]:
    """The reference's calls of the head are those beyond the candidate's."""
    head, calls = parts.seconds["head"], parts.calls["head"]
    candidate = head * parts.calls["statistics"] / calls
    return {
        "prefix": parts.seconds["prefix"],
        "layers": parts.seconds["layers"],
        "head_of_candidate": candidate,
        "head_of_reference": head - candidate,
        "statistics": parts.seconds["statistics"],
    }


def _copying(parts: TrialParts, lm: Any, repeats: int) -> float:
    width = lm.architecture.width
    kept = [torch.zeros(*shape, width, dtype=lm.dtype) for shape in parts.shapes]
    return median_seconds(lambda: [states.repeat(1, 1, 1) for states in kept], repeats)


@torch.no_grad()
def _one_token_each(parts: TrialParts, lm: Any, plan: Any, lowest: int, repeats: int) -> float:
    """As many passes, of one token behind another one."""
    from heretic_kl.model import PrefixCache, edited, resumed_at, returns_tuple

    layers, as_tuple = lm.architecture.layers, []
    token = torch.zeros(1, 1, dtype=torch.int64)
    with returns_tuple(layers, as_tuple):
        kept = PrefixCache(lm, [0])
    states = torch.randn(1, 1, lm.architecture.width).to(lm.dtype)
    passes = len(parts.shapes) + parts.calls["prefix"]

    def run() -> None:
        with edited(lm.architecture, plan):
            for _ in range(passes):
                with ExitStack() as stack:
                    if lowest:
                        resumed = resumed_at(layers, lowest, states, as_tuple=as_tuple[0])
                        stack.enter_context(resumed)
                    lm.body(input_ids=token, **kept.arguments(lm, 1))

    return median_seconds(run, repeats)
