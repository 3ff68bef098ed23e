"""Finds what a model allows by computing the same in two ways on a few tokens. Knows no prompts.

Caches of unusual models forget what a shared prefix left in them, count padding as tokens, or
cannot drop a row; what the samples show to be inexact is not used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from heretic_kl.ablation import Plan, ablation_operator
from heretic_kl.errors import HereticKLError, UnsupportedModelError
from heretic_kl.model.capabilities import Capabilities
from heretic_kl.model.causal_model import CausalModel
from heretic_kl.model.forward.candidate_hooks import CandidateRows, edited_by_candidate
from heretic_kl.model.forward.decoding import Decoding
from heretic_kl.model.forward.hooks import edited
from heretic_kl.model.forward.layer_cache import PREFIX, WHOLE, LayerCache, Start
from heretic_kl.model.forward.padding import right_padded
from heretic_kl.model.forward.prefix_cache import (
    PrefixCache,
    common_prefix,
    find_cache_argument,
    new_cache,
)
from heretic_kl.model.forward.token_tree import TokenTree, tree_rectangles
from heretic_kl.model.forward.tree_attention import TreeAttention, run_tree
from heretic_kl.model.language_model import LanguageModel
from heretic_kl.model.out_of_memory import is_out_of_memory
from heretic_kl.model.sites.probe import probe_tokens

SHARED, LENGTHS, FED = 9, (17, 12, 14), 4
"""Of the samples: tokens in common, tokens of each sequence, tokens fed to each afterwards."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest relative difference of what two ways of computing the same give; rounding gives 1e-6,
over a few recurrent layers 1e-4."""
LOW_PRECISION_TOLERANCE = 5e-2
RESUME_TOLERANCE = 5e-3
"""The same for starting at a layer: the same kernels in the same batches give 0."""
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")
"""Settings that limit how far some layers see; not every such layer has a cache that says so."""
TREE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of a cache that keep keys and values, and nothing that one token hands to the next."""
LAYERS_UNKNOWN = "its layers are not known"


@torch.no_grad()
def find_capabilities(lm: CausalModel) -> Capabilities:
    """Run a few tokens of an unedited model in all ways that save work.

    Ways that start at a layer or edit rows differently are tried of a `LanguageModel` only.
    """
    facts = Capabilities(cache_argument=find_cache_argument(lm.model), window=_window(lm))
    samples = _Samples(lm.limited(**vars(facts)))
    cache_problem = samples.cache_problem(cache_problem=None)
    gap_problem = cache_problem or samples.cache_problem(
        cache_problem=None, gap_problem=None, window=None
    )
    tree_problem = samples.tree_problem()
    prefix_problem = samples.prefix_problem()
    layers: dict[str, str | None] = dict.fromkeys(
        ("resume_problem", "cached_resume_problem", "rows_problem"), LAYERS_UNKNOWN
    )
    if isinstance(lm, LanguageModel):
        allowed = {"cache_problem": cache_problem, "gap_problem": gap_problem}
        resuming = _Resuming(lm.limited(**vars(facts) | allowed), samples)
        layers = {
            "resume_problem": resuming.forced_problem(prefix_problem, tree_problem),
            "cached_resume_problem": cache_problem or resuming.cached_problem(),
            "rows_problem": _rows_problem(lm, samples),
        }
    return Capabilities(
        cache_argument=facts.cache_argument,
        window=facts.window,
        cache_problem=cache_problem,
        gap_problem=gap_problem,
        prefix_problem=prefix_problem,
        tree_problem=tree_problem,
        **layers,
    )


class _Samples:
    """Three sequences that begin alike, what is fed to each afterwards, and the plainest results.

    Args:
        lm: the model, nothing of it known to be exact.
    """

    def __init__(self, lm: CausalModel) -> None:
        self._lm = lm
        ids = torch.cat([probe_tokens(lm.model, seed).flatten() for seed in range(3)]).tolist()
        size = max(LENGTHS) - SHARED + FED
        parts = [ids[SHARED + row * size :][:size] for row in range(len(LENGTHS))]
        self.sequences = [
            [*ids[:SHARED], *part[: length - SHARED]]
            for length, part in zip(LENGTHS, parts, strict=True)
        ]
        self.fed = [part[-FED:] for part in parts]
        self._plain_logits: Tensor | None = None

    def cache_problem(self, **allowed: None) -> str | None:
        """Of decoding in a cache, compared with a pass of its own for each row and step."""
        lm = self._lm.limited(**allowed)

        def compare() -> str | None:
            logits = self.cached_logits(lm)
            if self._plain_logits is None:
                self._plain_logits = self._logits_without_cache()
            return inexact(logits, self._plain_logits, lm.dtype)

        return _problem(compare, "its cache cannot be used")

    def cached_logits(self, lm: CausalModel, start: Start = WHOLE) -> Tensor:
        """(rows, V) of all steps, one below the other; the first row leaves halfway."""
        rows = [0, 1, 2]
        state = Decoding(lm, self.sequences, FED, start)
        logits = [state.logits]
        for step in range(FED):
            if step == FED // 2:
                rows = [2, 1]
                state.keep(rows)
            state.advance([self.fed[row][step] for row in rows])
            logits.append(state.logits)
        return torch.cat(logits)

    def prefix_problem(self) -> str | None:
        """Of final hidden states behind a shared prefix."""

        def compare() -> str | None:
            states = self.prefixed_states(common_prefix(self.sequences))
            return inexact(states, self.prefixed_states(()), self._lm.dtype, "hidden states")

        return _problem(compare, "its cache cannot be expanded")

    def prefixed_states(self, prefix: Sequence[int], start: Start = WHOLE) -> Tensor:
        """(3, D), the last token's of each sequence, padded on the right."""
        lm = self._lm
        with start.batch(PREFIX, 1) if prefix else nullcontext():
            prefix_cache = PrefixCache(lm, prefix)
        start.complete_prefix(prefix_cache)
        rest = [sequence[prefix_cache.length :] for sequence in self.sequences]
        tokens, last = right_padded(rest, lm.device)
        with start.batch(0, len(rest)):
            output = lm.body(input_ids=tokens, **prefix_cache.arguments(lm, len(rest)))
        hidden: Tensor = output.last_hidden_state
        return hidden[torch.arange(len(rest)), last.to(hidden.device)]

    def tree_problem(self) -> str | None:
        """Of final hidden states in a tree of tokens."""
        lm = self._lm
        if "position_ids" not in inspect.signature(lm.model.forward).parameters:
            return "this model takes no token positions"
        if not {type(layer).__name__ for layer in new_cache(lm).layers} <= set(TREE_LAYERS):
            return "some of its layers pass a state from token to token"
        window = lm.capabilities.window
        if window is not None and window < max(LENGTHS):
            return f"some of its layers see no more than {window} tokens"
        return _problem(self._compare_tree, "its attention cannot be replaced")

    def tree_states(self, start: Start = WHOLE) -> tuple[Tensor, TokenTree, int]:
        """(tokens of the tree, D), the tree, and how often a layer attended."""
        tree = TokenTree(self.sequences)
        attention = TreeAttention(tree_rectangles(tree), len(tree.tokens))
        tokens = torch.tensor([tree.tokens], device=self._lm.device)
        with start.batch(0, 1):
            states = run_tree(self._lm, tokens, torch.tensor(tree.positions), attention)[0]
        return states, tree, attention.calls

    def _compare_tree(self) -> str | None:
        lm = self._lm
        states, tree, calls = self.tree_states()
        layers = lm.model.config.get_text_config().num_hidden_layers
        if calls < layers:
            return f"{calls} of its {layers} layers let their attention be replaced"
        alone = [
            lm.body(input_ids=torch.tensor([s], device=lm.device), use_cache=False)
            for s in self.sequences
        ]
        # Of tokens of one sequence alone: the others say little about what must not be mixed.
        shared = sum(len(set(column)) == 1 for column in zip(*tree.paths, strict=False))
        in_tree = torch.cat([states[list(path[shared:])] for path in tree.paths])
        plain = torch.cat([output.last_hidden_state[0, shared:] for output in alone])
        return inexact(in_tree.flatten(1), plain.flatten(1), lm.dtype, "hidden states")

    def _logits_without_cache(self) -> Tensor:
        """As `cached_logits`, each row and step by a pass of its own."""
        lm = self._lm
        logits = []
        for step in range(FED + 1):
            for row in [0, 1, 2] if step <= FED // 2 else [2, 1]:
                ids = torch.tensor(
                    [[*self.sequences[row], *self.fed[row][:step]]], device=lm.device
                )
                hidden = lm.body(input_ids=ids, use_cache=False).last_hidden_state
                logits.append(lm.head.logits(hidden[0, -1:]))
        return torch.cat(logits)


class _Resuming:
    """Passes that start at a layer, compared with whole ones."""

    def __init__(self, lm: LanguageModel, samples: _Samples) -> None:
        self._lm = lm
        self._samples = samples

    def forced_problem(self, prefix_problem: str | None, tree_problem: str | None) -> str | None:
        """Of rectangles behind a prefix and of trees, as far as the model allows them."""
        samples = self._samples
        prefix = common_prefix(samples.sequences) if prefix_problem is None else ()
        problem = self._problem(lambda start: samples.prefixed_states(prefix, start))
        if problem is None and tree_problem is None:
            problem = self._problem(lambda start: samples.tree_states(start)[0])
        return problem

    def cached_problem(self) -> str | None:
        """Of decoding."""
        return self._problem(lambda start: self._samples.cached_logits(self._lm, start))

    def _problem(self, run: Callable[[Start], Tensor]) -> str | None:
        layers = self._lm.architecture.layers
        # The highest one too: its layers may need what skipped ones would have left.
        boundaries = sorted({max(1, len(layers) // 2), len(layers) - 1})
        if len(layers) < 2:
            return "it has a single layer"

        def compare() -> str | None:
            layer_cache = LayerCache(layers, boundaries)
            whole = run(Start(layer_cache=layer_cache)).float().flatten(1)
            worst = 0.0
            for boundary in boundaries:
                resumed = run(Start(layer_cache=layer_cache, boundary=boundary)).float().flatten(1)
                apart = (resumed - whole).norm(dim=-1) / whole.norm(dim=-1).clamp_min(1e-30)
                worst = max(worst, float(apart.nan_to_num(torch.inf).max()))
            return None if worst < RESUME_TOLERANCE else f"states differ by up to {worst:.1%}"

        return _problem(compare, "this model cannot start at a layer")


def _rows_problem(lm: LanguageModel, samples: _Samples) -> str | None:
    """Of two candidates in one batch, compared with each alone."""
    architecture = lm.architecture
    plans: list[Plan] = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(architecture.width, generator=generator)
        plans.append(
            {
                key: ablation_operator(facts.pull_back(direction), 0.5)
                for key, facts in architecture.facts().items()
            }
        )
    sequence = torch.tensor([samples.sequences[0]], device=lm.device)

    def states(rows: int) -> Tensor:
        hidden: Tensor = lm.body(
            input_ids=sequence.repeat(rows, 1), use_cache=False
        ).last_hidden_state
        return hidden

    def compare() -> str | None:
        alone = []
        for plan in plans:
            with edited(architecture, plan):
                alone.append(states(2)[:1])
        with edited_by_candidate(architecture, plans, CandidateRows([1, 1])):
            together = states(2)
        return inexact(
            together.flatten(0, 1).flatten(1),
            torch.cat(alone).flatten(0, 1).flatten(1),
            lm.dtype,
            "hidden states",
        )

    return _problem(compare, "its rows cannot be edited differently")


def _problem(compare: Callable[[], str | None], failure: str) -> str | None:
    """What a comparison finds; models raise whatever they like, which is a problem too."""
    try:
        return compare()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, UnsupportedModelError):
            return str(error)
        detail = str(error) if isinstance(error, HereticKLError) else type(error).__name__
        return f"{failure} ({detail})"


def inexact(
    ours: Tensor,  # (rows, any)
    whole: Tensor,  # (rows, any) the same computed in the plainest way
    dtype: torch.dtype,
    what: str = "logits",
) -> str | None:
    """How far two ways of computing the same are apart, if they are more than rounding apart."""
    rows = (ours.float() - whole.float()).norm(dim=-1) / whole.float().norm(dim=-1)
    rows = rows.nan_to_num(torch.inf)
    # In low precision single tokens may be sent to other experts.
    apart = float(rows.quantile(1.0 if dtype in TOLERANCE else 0.75))
    small = apart < TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
    return None if small else f"{what} differ by {apart:.1%}"


def _window(lm: CausalModel) -> int | None:
    """How many positions back some layer sees at least; None: all layers see everything."""
    config: dict[str, Any] = lm.model.config.get_text_config().to_dict()
    windows = [getattr(layer, "sliding_window", None) for layer in new_cache(lm).layers]
    windows += [config.get(name) for name in WINDOWS]
    return min((n for n in windows if isinstance(n, int) and n > 1), default=None)
