"""`heretic-kl bench`: what a trial's edit costs, or gains, in benchmarks of lm-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.edits.evaluate import show
from heretic_kl.cli.optimize import settle_process
from heretic_kl.cli.output import check_json_file, observing
from heretic_kl.cli.study.rerun_trial import session_beside
from heretic_kl.cli.study.settings import (
    BenchSettings,
    picked,
    read_named,
    rule_of,
    settings_of,
)
from heretic_kl.config import read_settings
from heretic_kl.errors import ConfigError

if TYPE_CHECKING:
    from heretic_kl.scoring import HarnessTask


def run(words: Sequence[str]) -> int:
    """Run the benchmarks that the command line names; return the exit code."""
    named = read_settings(BenchSettings, words)
    if not named.task:
        raise ConfigError("no task given: name one with --task, as lm-eval does")
    check_json_file(named.json_file)
    rule = rule_of(named.trial, named.pick)
    study = read_named(named)
    record = picked(study, rule)
    settings = settings_of(BenchSettings, words, named, study, measures=False)
    settings = settings.model_copy(update={"save": None})

    from heretic_kl.events import Notice
    from heretic_kl.run.evaluate import evaluate_trial
    from heretic_kl.scoring import HarnessTask, ScorerSpec

    folder = None if named.tasks_folder is None else str(named.tasks_folder)
    tasks = [  # before a model is loaded
        HarnessTask(task, named.metric, folder, filter=named.filter).settled()
        for task in named.task
    ]
    options = {
        "tasks": folder,
        "limit": named.limit or None,
        "few_shot": named.few_shot,
        "chat": named.chat,
    }
    specs = [
        ScorerSpec(
            task.name,
            "lm_eval",
            "maximize",
            {"task": task.name, "metric": task.metric, "filter": task.filter, **options},
        )
        for task in tasks
    ]
    settle_process(settings)
    with (
        observing(quiet=settings.quiet) as observer,
        session_beside(study, record, settings, observer, measures=False) as session,
    ):
        for notice in _taken(named, tasks):
            observer(Notice(notice))
        evaluation = evaluate_trial(session.parts, record, specs)
        show("bench", evaluation, named, observer, where="in lm-eval")
    return 0


def _taken(named: BenchSettings, tasks: Sequence[HarnessTask]) -> Iterator[str]:
    """What was taken of each task where the command line leaves it open."""
    for task in tasks:
        if named.metric is None and task.metric != "acc":
            yield f"{task.name} has no metric acc: {task.metric} is taken, or name one by --metric"
        if named.filter is None and task.filter is not None:
            yield (
                f"{task.name} has several filters: {task.filter}, the first, is taken, or name one "
                "by --filter"
            )


COMMAND = Command(
    "bench [STUDY] --trial NUMBER --task TASK ... [--SETTING VALUE ...]",
    f"{SUMMARIES['bench']}, with the difference paired by document. Needs pip install "
    "'heretic-kl[bench]'. The scorer lm_eval makes the same an objective of a search.",
    run,
    BenchSettings,
    first_words=("--study",),
)
