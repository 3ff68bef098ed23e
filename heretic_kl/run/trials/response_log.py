"""Logs what trials respond, as far as the user asks for it. Generates nothing by itself.

An engine that listens stands before the run's. What it heard of a plan is written once the trial
is stored, so that no trial is logged twice, whoever continues the study.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from heretic_kl.ablation import Plan
from heretic_kl.errors import StudyError
from heretic_kl.prompts import Prompt
from heretic_kl.prompts.sets import PromptSets
from heretic_kl.ranks import is_first
from heretic_kl.requests import Request, ResponseRequest, ResponseResult, Result, Watch
from heretic_kl.scoring import MeasuringEngine, RefusalRule, Suite, degeneracy
from heretic_kl.search import UNEDITED, ResponseFile

OF_A_SCORER: Final = "of a scorer"
"""The kind of prompts that are in no set of the run."""
Heard = Sequence[tuple[Request, Result]]
"""What was asked of one plan and answered."""


class ResponseLog:
    """Hears and writes responses; where the settings ask for none, it does neither.

    Args:
        keep: setting `keep_responses`: `harmless` or `all`; else nothing is logged.
        engine: the run's.
        prompts: of the run.
        file: where to.
        notice: told once where the file cannot be written; nothing more is logged then.
    """

    def __init__(
        self,
        keep: str,
        engine: MeasuringEngine,
        prompts: PromptSets,
        file: ResponseFile,
        notice: Callable[[str], None],
    ) -> None:
        self._keep, self._prompts, self._file, self._notice = keep, prompts, file, notice
        self._silent: set[str] = set()  # scorers whose verdicts could not be had
        self._announced = False
        self._listening = keep in ("harmless", "all")
        self._ears = _ListeningEngine(engine)
        self.engine: MeasuringEngine = self._ears if self._listening else engine
        """Measures as the run's engine does."""

    def announce(self, suite: Suite) -> None:
        """Say once where trials of the search log nothing: no objective asks for what is logged."""
        if self._announced or not self._listening:
            return
        self._announced = True
        kinds = self._kinds("validation")
        asked = {
            kinds.get(prompt, OF_A_SCORER)
            for spec in suite.objectives
            for request in suite.scorers[spec.name].requests()
            if isinstance(request, ResponseRequest)
            for prompt in request.prompts
        }
        if not any(map(self._logs, asked)):
            prompts = "harmless prompts" if self._keep == "harmless" else "prompts"
            self._notice(
                f"keep_responses is {self._keep}, and no objective asks for responses to "
                f"{prompts}: the log holds those of tested trials and of the original, to some "
                "test prompts, and none of the search"
            )

    def forget(self) -> None:
        """Drop what was heard and not written: of trials that are measured anew."""
        self._ears.heard.clear()

    def write(
        self, number: int, plan: Plan | None, use: Literal["validation", "test"], suite: Suite
    ) -> None:
        """Log a stored trial's responses to the prompts of one use; `UNEDITED` counts as one."""
        heard = [pair for of, pairs in self._ears.heard if of is plan for pair in pairs]
        self._ears.heard = [entry for entry in self._ears.heard if entry[0] is not plan]
        rows = list(self._rows(number, heard, use, suite)) if self._listening else []
        if not rows or not is_first():
            return
        try:
            self._file.append(rows)
        except StudyError as error:
            self._listening = False
            self._notice(f"no further responses are logged: {error}")

    def _rows(
        self, number: int, heard: Heard, use: Literal["validation", "test"], suite: Suite
    ) -> Iterator[dict[str, Any]]:
        kinds = self._kinds(use)
        by_judges = self._verdicts(heard, suite)
        for prompt, text in _longest(heard).items():
            kind = kinds.get(prompt, OF_A_SCORER)
            if not self._logs(kind):
                continue
            judge, verdict = by_judges.get(prompt, ("phrases", None))
            yield {
                "trial": None if number == UNEDITED else number,
                "use": use,
                "kind": kind,
                **({} if prompt.system is None else {"system": prompt.system}),
                "prompt": prompt.user,
                "response": text,
                "verdict": verdict or verdict_by_rule(suite.refusal_rule, prompt, text),
                "by": judge,
            }

    def _logs(self, kind: str) -> bool:
        return self._keep == "all" or kind == "harmless"

    def _verdicts(self, heard: Heard, suite: Suite) -> Mapping[Prompt, tuple[str, str | None]]:
        """What judges among the scorers said, by prompt: the scorer and its verdict.

        A scorer that fails here has scored the trial already: it costs its verdicts, with a notice.
        """
        verdicts: dict[Prompt, tuple[str, str | None]] = {}
        for name, scorer in suite.scorers.items():
            for request in scorer.requests():
                results = [result for asked, result in heard if asked == request]
                try:
                    said = scorer.verdicts(results[:1]) if results else None
                except Exception as error:  # of a plug-in, any
                    self._notice_once(name, f"{type(error).__name__}: {error}")
                    continue
                if said is not None and isinstance(request, ResponseRequest):
                    pairs = zip(request.prompts, said, strict=True)
                    verdicts |= {prompt: (name, verdict) for prompt, verdict in pairs if verdict}
        return verdicts

    def _notice_once(self, name: str, problem: str) -> None:
        if name not in self._silent:
            self._silent.add(name)
            self._notice(f"scorer {name} gives the log of responses no verdicts: {problem}")

    def _kinds(self, use: Literal["validation", "test"]) -> dict[Prompt, str]:
        """The kind of each prompt; one that is of several is what asks for the most care."""
        sets = self._prompts.of(use)
        order = sorted(sets, key=("harmless", "borderline", "harmful").index)
        return {prompt: kind for kind in order for prompt in sets[kind]}


class _ListeningEngine:
    """An engine that keeps what it answers, by plan; a plan that was ended early has nothing."""

    def __init__(self, engine: MeasuringEngine) -> None:
        self._engine = engine
        self.heard: list[tuple[Plan | None, Heard]] = []

    def measure(self, plan: Plan | None, requests: Sequence[Request]) -> list[Result]:
        results = self._engine.measure(plan, requests)
        self.heard.append((plan, _responses(requests, results)))
        return results

    def measure_many(
        self,
        plans: Sequence[Plan | None],
        requests: Sequence[Request],
        watch: Watch | None = None,
    ) -> list[list[Result] | None]:
        measured = self._engine.measure_many(plans, requests, watch)
        for plan, results in zip(plans, measured, strict=True):
            if results is not None:
                self.heard.append((plan, _responses(requests, results)))
        return measured


def verdict_by_rule(rule: RefusalRule, prompt: Prompt, text: str) -> str:
    """`refusal`, `answered` or `degenerate`, as is a whole response that refuses and loops."""
    if not rule.decided(text) and degeneracy(text, prompt) is not None:
        return "degenerate"
    return "refusal" if rule.is_refusal(text) else "answered"


def _responses(requests: Sequence[Request], results: Sequence[Result]) -> Heard:
    pairs = zip(requests, results, strict=True)
    return [pair for pair in pairs if isinstance(pair[1], ResponseResult)]


def _longest(heard: Heard) -> dict[Prompt, str]:
    """Each prompt's response, the longest where scorers asked for more or less of it."""
    texts: dict[Prompt, str] = {}
    for request, result in heard:
        assert isinstance(request, ResponseRequest) and isinstance(result, ResponseResult)
        for prompt, text in zip(request.prompts, result.texts, strict=True):
            texts[prompt] = max(texts.get(prompt, ""), text, key=len)
    return texts
