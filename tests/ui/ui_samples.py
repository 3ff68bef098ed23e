"""A fake session, real events and recorded consoles for the tests of this folder."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from heretic_kl.ablation import EditParameters, WeightKernel
from heretic_kl.events import ModelSaved
from heretic_kl.kl import wilson_interval
from heretic_kl.scoring import PreviewedResponse, Score, Stopped
from heretic_kl.search import TrialRecord, notable_trials, pareto_front

EDIT = EditParameters(17.4, {"attention": WeightKernel(0.92, 20.0, 0.46, 12.0)})


def refusals(count: int, total: int = 64) -> Score:
    low, high = wilson_interval(count, total)
    text = f"{count}/{total} ({count / total:.0%}, {low:.0%} to {high:.0%})"
    details = {"count": count, "total": total, "empty": 0}
    return Score(count / total, text, interval=(low, high), details=details)


def divergence(mean: float) -> Score:
    return Score(mean, f"{mean:.4f} ± 0.0041 nats", standard_error=0.0041)


def trial(number: int, count: int, mean: float) -> TrialRecord:
    scores = {"refusals": refusals(count), "teacher_forced_kl": divergence(mean)}
    return TrialRecord(number, "complete", {}, EDIT, scores, (count / 64, mean), 4.2)


def failed(number: int) -> TrialRecord:
    return TrialRecord(number, "failed", {}, EDIT, seconds=1.0, error="NaN logits in 8 positions")


def stopped(number: int) -> TrialRecord:
    stopped = Stopped(
        7,
        {
            "refusals": "at least 12/64 after 20 responses",
            "teacher_forced_kl": "0.3100 ± 0.0100 nats",
        },
        (12 / 64, 0.31),
    )
    return TrialRecord(number, "stopped", {}, EDIT, seconds=1.0, stopped=stopped)


TEST_SCORES = {
    "refusals": refusals(4),
    "teacher_forced_kl": divergence(0.0287),
    "false_refusals": refusals(1),
}


def saved(folder: Path = Path("out"), merge_kl: float = 1.3e-7) -> ModelSaved:
    return ModelSaved(folder, "merged", TEST_SCORES, TEST_SCORES, merge_kl, 2.3e-6)


def recorded(*, terminal: bool, width: int = 100, encoding: str = "utf-8") -> Console:
    """A console whose `file` keeps what was written; one of a terminal has control codes."""

    class Stream(StringIO):
        pass

    Stream.encoding = encoding  # type: ignore[misc, assignment]
    return Console(
        file=Stream(),
        force_terminal=terminal,
        width=width,
        height=24,
        highlight=False,
        _environ={"TERM": "xterm"},
    )


def written(console: Console) -> str:
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


class FakeSession:
    """Answers at once; `trouble` is raised by the next action, once."""

    def __init__(self, *trials: TrialRecord) -> None:
        self.trials: tuple[TrialRecord, ...] = trials
        self.baseline: Mapping[str, Score] = {"refusals": refusals(61)}
        self.tested: dict[int, Mapping[str, Score]] = {}
        self.saves: list[tuple[int, Path, str, bool]] = []
        self.searches: list[int] = []
        self.asked: list[tuple[int | None, list[str]]] = []
        self.drawn: list[tuple[float, int]] = []
        self.roles: Mapping[str, str] = {"refusals": "minimize", "teacher_forced_kl": "minimize"}
        self.response: Callable[[int | None], Iterator[str]] = lambda number: iter(["fine"])
        self.previewed: dict[tuple[int | None, str], list[tuple[Any, ...]]] = {}
        self.trouble: BaseException | None = None
        self.target: str | None = None

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        return pareto_front(self.trials)

    @property
    def notable_trials(self) -> dict[int, str]:
        return notable_trials(self.front, self.target)

    def test_scores(self, number: int) -> Mapping[str, Score] | None:
        return self.tested.get(number)

    def test_one(self, number: int) -> Mapping[str, Score]:
        self._raise()
        self.tested[number] = TEST_SCORES
        return TEST_SCORES

    def search(self, until: int) -> None:
        self.searches.append(until)
        self._raise()
        self.trials = (*self.trials, trial(len(self.trials), 0, 0.001))

    def save(
        self,
        record: TrialRecord,
        folder: Path,
        form: Literal["merged", "lora"],
        *,
        overwrite: bool = False,
    ) -> ModelSaved:
        self.saves.append((record.number, folder, form, overwrite))
        self._raise()
        return saved(folder)

    def stream_response(
        self,
        record: TrialRecord | None,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int,
        *,
        temperature: float,
        seed: int,
    ) -> Generator[str, None, None]:
        self.drawn.append((temperature, seed))
        number = None if record is None else record.number
        self.asked.append((number, [message["content"] for message in messages]))
        yield from self.response(number)

    def responses(
        self, record: TrialRecord | None, kind: Literal["harmless", "harmful"], count: int
    ) -> tuple[PreviewedResponse, ...]:
        self._raise()
        number = None if record is None else record.number
        return tuple(PreviewedResponse(*entry) for entry in self.previewed.get((number, kind), ()))

    def _raise(self) -> None:
        trouble, self.trouble = self.trouble, None
        if trouble is not None:
            raise trouble
