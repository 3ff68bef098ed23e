"""One model type, taken the whole way: load, verify, search, export, respond. Prints nothing.

A tiny random model of the type is saved to a folder, and from there on everything is done by the
code that a user runs. Results are compared with the plainest computation there is: one sequence
at a time, without padding, cache, shared prefix, replay or other rows in the batch.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from saved_model import edited_logits, generated, reloaded_model, sample_logits, tensor_problem
from site_kinds import site_kinds
from torch import Tensor

from heretic_kl import Session, Settings, events
from heretic_kl.ablation import Plan, ablation_operator
from heretic_kl.engine import forced_sequences
from heretic_kl.errors import HereticKLError
from heretic_kl.export import save_merged
from heretic_kl.model import LanguageModel, edited, find_capabilities
from heretic_kl.model.loading import loader
from heretic_kl.model.transformers_logging import quiet_transformers
from heretic_kl.requests import ResponseRequest
from heretic_kl.testing import WORDS, tiny_tokenizer, zoo

Status = Literal["passed", "rejected", "not built here", "failed"]

RESIDUE = 1e-5
"""Largest share of a removed direction that a layer may still add, float32."""
SAME = 1e-4
"""Largest relative difference between two ways to compute the same, float32."""
TRIALS, KL_TOKENS, RESPONSE_TOKENS = 2, 3, 8
SYSTEM = "please tell me about the weather in Rome and then wait"


@dataclass
class Coverage:
    """The result for one model type."""

    model_type: str
    class_name: str
    status: Status = "passed"
    reason: str = ""
    """Why it is rejected, not built or failed: one line."""
    layers: int = 0
    sites: dict[str, int] = field(default_factory=dict)
    """Sites by kind."""
    residue: float | None = None
    unedited_kl: float | None = None
    search: str = ""
    """`ok`, or what is wrong."""
    passes_error: float | None = None
    """Teacher-forced hidden states of edited models against the plainest computation."""
    export: str = ""
    """`ok`, or what is wrong."""
    route: str = ""
    export_error: float | None = None
    """Logits of the reloaded model against the operators."""
    responses: str = ""
    """`ok`, or what is wrong."""
    notes: list[str] = field(default_factory=list)
    """Notices that a user sees."""
    without: list[str] = field(default_factory=list)
    """Savings that the model does not allow, as trying them showed."""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For a results file."""
        return asdict(self)


def decoder_types() -> tuple[str, ...]:
    """Every decoder-only model type of the installed transformers."""
    return tuple(name for name in zoo.model_types() if zoo.kind_of(name).name == "decoder")


def class_of(model_type: str) -> str:
    """Name of the causal language model class of a type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def cover(model_type: str, folder: Path, *, seed: int = 0) -> Coverage:
    """Take one model type the whole way, in an empty folder."""
    coverage = Coverage(model_type, class_of(model_type))
    start = time.perf_counter()
    library = zoo.NEEDS_LIBRARY.get(model_type)
    if library and importlib.util.find_spec(library) is None:
        coverage.status, coverage.reason = "not built here", f"needs {library}"
        return coverage
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        try:
            _save_original(model_type, folder / "model", seed)
            _covered(coverage, folder)
        except HereticKLError as error:
            lines = str(error).strip().splitlines()
            coverage.status = "rejected" if len(lines) == 1 else "failed"
            coverage.reason = str(error).replace(str(folder / "model"), "MODEL")
        except Exception as error:  # one type must not end the table
            coverage.status = "failed"
            coverage.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    problems = [
        f"{stage}: {result}"
        for stage in ("search", "export", "responses")
        if (result := getattr(coverage, stage)) not in ("", "ok")
    ]
    if coverage.status == "passed" and problems:
        coverage.status, coverage.reason = "failed", "; ".join(problems)
    coverage.seconds = round(time.perf_counter() - start, 1)
    return coverage


def _save_original(model_type: str, folder: Path, seed: int) -> None:
    # As released, where what the text half alone saves cannot be loaded by its auto class.
    auto_class = "AutoModelForImageTextToText" if model_type in zoo.NOT_RELOADED else None
    options = {"auto_class": auto_class} if auto_class else {}
    zoo.tiny_model(model_type, seed=seed, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _covered(coverage: Coverage, folder: Path) -> None:
    received: list[Any] = []
    with Session(_settings(folder, "fast"), received.append) as session:
        lm = session.parts.lm
        coverage.layers = len(lm.architecture.layers)
        coverage.sites = site_kinds(lm)
        coverage.residue = session.calibration.site_residue
        coverage.unedited_kl = session.baseline["teacher_forced_kl"].value
        session.search()
        coverage.search = _first(
            lambda: None if coverage.residue < RESIDUE else f"residue {coverage.residue:.1e}",
            lambda: None if coverage.unedited_kl == 0 else f"unedited KL {coverage.unedited_kl}",
            lambda: _search_problem(session, folder),
            lambda: _passes_problem(coverage, session),
            lambda: _responses_problem(session),
        )
        plan = strong_plan(lm, 0)
        reloaded: list[Any] = []
        coverage.export = _first(
            lambda: _export_problem(coverage, lm, plan, folder / "new", reloaded)
        )
        coverage.responses = _first(lambda: _generate_problem(session, plan, reloaded))
        coverage.notes = _notes(received)
        coverage.without = _without(session)


def _first(*checks: Callable[[], str | None]) -> str:
    """The first problem that a check names; `ok` where there is none."""
    for check in checks:
        try:
            problem = check()
        except Exception as error:  # named in the table
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if problem is not None:
            return problem
    return "ok"


# --- search --------------------------------------------------------------------------------------


def _settings(folder: Path, name: str, **changes: Any) -> Settings:
    tables = {}
    for shift, kind in enumerate(("harmful", "harmless")):
        file = folder / f"{kind}.txt"
        lines = [" ".join(WORDS[(3 * i + 7 * shift) % 20 :][: 2 + i % 5]) for i in range(9)]
        file.write_text("\n".join(lines), encoding="utf-8")
        parts = {"train": "[:3]", "validation": "[3:6]", "test": "[6:]"}
        tables[kind] = {
            split: {"source": str(file), "split": part, "system": SYSTEM}
            for split, part in parts.items()
        }
    settings = {
        "directions": {"by_response": False},  # random models refuse nothing
        "model": str(folder / "model"),
        "device": "cpu",
        "dtype": "float32",
        "trials": TRIALS,
        "startup_trials": TRIALS,
        "parallel_candidates": 2,
        "kl_tokens": KL_TOKENS,
        "max_response_tokens": RESPONSE_TOKENS,
        "batch_size": 2,
        "racing": False,  # it may stop a different trial where two run at once
        "response_prefix": "",
        "prompt_set": "builtin",
        "study_dir": folder / name,
        "prompts": tables,
        "scorers": {
            "refusals": {"settings": {"markers": ["flour", "mix"]}},
            "teacher_forced_kl": {"settings": {"set_aside_refused": False}},
        },
    }
    return Settings(**{**settings, **changes})


def _search_problem(session: Session, folder: Path) -> str | None:
    """The trials again with no trees, prefix or layer cache, one candidate at a time."""
    plain = _settings(folder, "plain", cache_memory_mb=0, parallel_candidates=1)
    off = dict.fromkeys(("prefix_problem", "gap_problem", "tree_problem"), "not in this run")
    with mock.patch.object(
        loader, "find_capabilities", lambda lm: replace(find_capabilities(lm), **off)
    ):
        with Session(plain, lambda event: None) as other:
            other.search()
            pairs = list(zip(session.trials, other.trials, strict=True))
    if len(pairs) != TRIALS:
        return f"{len(pairs)} trials finished"
    for ours, theirs in pairs:
        if ours.error or theirs.error:
            return f"a trial failed: {ours.error or theirs.error}"
        if ours.parameters != theirs.parameters:
            return "shared and plain runs tried different edits"
        for name in session.objectives:
            one, two = ours.scores[name].value, theirs.scores[name].value
            if not (torch.isfinite(torch.tensor([one, two])).all()):
                return f"{name} is {one}"
            if abs(one - two) > 1e-5 + 1e-3 * abs(two):
                return f"{name} {one:.6g} with everything shared, {two:.6g} without"
    return None


def _notes(received: Sequence[Any]) -> list[str]:
    notes = [event.message for event in received if isinstance(event, events.Notice)]
    steps = [event for event in received if isinstance(event, events.CalibrationStep)]
    notes += [f"{s.name} {s.value}" for s in steps if s.value.startswith("no: ")]
    return list(dict.fromkeys(notes))


def _without(session: Session) -> list[str]:
    allowed = session.parts.lm.capabilities
    missing = {
        "trees of tokens": allowed.tree_problem is not None,
        "shared prefix": allowed.prefix_problem is not None,
        "shared prefix in responses": allowed.prefix_problem is None
        and allowed.gap_problem is not None,
        "replay of lower layers": allowed.resume_problem is not None,
        "candidates together": allowed.rows_problem is not None,
        "cache in responses": allowed.cache_problem is not None,
    }
    return [name for name, is_missing in missing.items() if is_missing]


def strong_plan(lm: LanguageModel, lowest: int, *, seed: int = 1, weight: float = 1.1) -> Plan:
    """Every site of the layers from the lowest on; each layer has a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(lm.architecture.layers), lm.architecture.width, generator=generator)
    return {
        key: ablation_operator(facts.pull_back(drawn[key.layer]), weight)
        for key, facts in lm.architecture.facts().items()
        if key.layer >= lowest
    }


def _two_plans(lm: LanguageModel) -> list[Plan]:
    high = (len(lm.architecture.layers) + 1) // 2
    return [strong_plan(lm, high), strong_plan(lm, high, seed=2, weight=0.7)]


def _passes_problem(coverage: Coverage, session: Session) -> str | None:
    """Candidates over all of the engine's savings against one unpadded sequence at a time."""
    lm, engine = session.parts.lm, session.parts.engine
    prompts = session.parts.prompts["harmless", "validation"]
    plans = _two_plans(lm)
    sequences = forced_sequences(engine.reference(prompts, KL_TOKENS))
    together = lm.architecture.by_rows
    groups = [plans] if together else [[plan] for plan in plans]
    states = torch.cat([engine.hidden_states_of(group, prompts, KL_TOKENS) for group in groups])
    worst = 0.0
    for plan, ours in zip(plans, states, strict=True):
        with edited(lm.architecture, plan):
            plain = torch.cat([_plain_states(lm, s.fed, s.scored) for s in sequences])
        worst = max(worst, _relative(ours, plain))
    coverage.passes_error = worst
    return None if worst < SAME else f"hidden states differ by {worst:.1e} from the plainest pass"


@torch.no_grad()
def _plain_states(lm: LanguageModel, fed: Sequence[int], scored: range) -> Tensor:
    hidden = lm.body(input_ids=torch.tensor([list(fed)]), use_cache=False).last_hidden_state
    return hidden[0, scored.start : scored.stop]


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def _responses_problem(session: Session) -> str | None:
    lm, engine = session.parts.lm, session.parts.engine
    prompts = session.parts.prompts["harmful", "validation"]
    request = ResponseRequest(prompts, RESPONSE_TOKENS, None)
    plans = _two_plans(lm)
    groups = [plans] if lm.architecture.by_rows else [[plan] for plan in plans]
    results = [one for group in groups for one in engine.measure_many(group, [request])]
    for plan, (result,) in zip(plans, results, strict=True):
        with edited(lm.architecture, plan):
            plain = [lm.chat.decode(_plain_response(lm, engine.encode(p))) for p in prompts]
        for ours, theirs in zip(result.texts, plain, strict=True):
            if ours != theirs:
                return f"responds {ours!r}, the plainest decoding {theirs!r}"
    return None


@torch.no_grad()
def _plain_response(
    lm: LanguageModel, prompt: Sequence[int], most: int = RESPONSE_TOKENS
) -> list[int]:
    """Greedy, every token from a pass over everything before it."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + most:
        logits = lm.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in lm.stop_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


# --- export --------------------------------------------------------------------------------------


def _export_problem(
    coverage: Coverage, lm: LanguageModel, plan: Plan, folder: Path, reloaded: list[Any]
) -> str | None:
    """Save, load what was saved (it is added to `reloaded`), compare."""
    saved = save_merged(lm, plan, folder)
    coverage.route = saved.route
    tensors = tensor_problem(saved, lm.source.folder)
    if tensors is not None:
        return tensors
    expected = edited_logits(lm, plan)
    if _relative(sample_logits(lm.model), expected) < 0.01:
        return "the edit does not show"
    reloaded.append(reloaded_model(folder))
    coverage.export_error = _relative(sample_logits(reloaded[0]), expected)
    if not coverage.export_error < SAME:
        return f"reloaded logits differ by {coverage.export_error:.1e} from the operators"
    return None


# --- responses -----------------------------------------------------------------------------------


def _generate_problem(session: Session, plan: Plan, reloaded: Sequence[Any]) -> str | None:
    """Responses under operators against `generate` of the model that was saved and loaded again."""
    if not reloaded:
        return "nothing was saved and loaded again"
    lm, engine = session.parts.lm, session.parts.engine
    prompts = session.parts.prompts["harmless", "validation"]
    (result,) = engine.measure(plan, [ResponseRequest(prompts, RESPONSE_TOKENS, None)])
    for prompt, ours in zip(prompts, result.texts, strict=True):
        theirs = lm.chat.decode(
            generated(reloaded[0], engine.encode(prompt), lm.stop_ids, most=RESPONSE_TOKENS)
        )
        if ours != theirs:
            return f"{ours!r}, generate of the saved model {theirs!r}"
    return None
