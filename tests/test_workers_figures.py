"""The figures of many workers: what is asked of them, and the table in the guide."""

import json
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import soak  # noqa: E402
from benchmarks.workers import kills, real_trials, table  # noqa: E402

RESULTS = ROOT / "benchmarks/results/workers.json"


def test_the_table_of_the_guide_is_that_of_the_results_file():
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    guide = (ROOT / "docs/workers.md").read_text(encoding="utf-8")
    assert "\n".join(table.lines(result)) in guide
    for part in result.values():
        assert part.keys() >= {"command", "date", "seed", "machine", "versions"}


def test_a_study_on_slurm_that_was_stopped_ended_as_an_undisturbed_one():
    """`make slurm` wrote the file; the guide says what it holds."""
    result = json.loads((RESULTS.parent / "slurm.json").read_text(encoding="utf-8"))
    assert result.keys() >= {"command", "date", "seed", "machine", "versions"}
    assert set(result["restarts"]) == {"requeue", "signal", "pre-emption", "time limit"}
    assert result["trials_are_those_of_an_undisturbed_study"] is True
    assert result["front_is_that_of_an_undisturbed_study"] is True


@pytest.mark.parametrize(
    ("part", "figures", "met"),
    [
        ("kills", {"journal, 1": {"lost": 1, "repeated": 0, "not_ended": 0}}, False),
        ("kills", {"journal, 1": {"lost": 0, "repeated": 0, "not_ended": 0}}, True),
        ("real", {"ratio": 1.79, "ratios": [1.79], "ratio_of_plain_matrix_products": 2}, False),
        ("front", {"trials": 6, "difference": -1, "difference_95_interval": [-2, -0.5]}, False),
        ("front", {"trials": 6, "difference": 0, "difference_95_interval": [-0.009, 1]}, True),
        ("front", {"trials": 6, "difference": 0, "difference_95_interval": [-0.011, 1]}, False),
    ],
)
def test_a_figure_that_is_not_reached_is_not_met(part, figures, met):
    for one in figures.values():
        if isinstance(one, dict):
            one.update(kills=200, interrupted=9)
    (first, *_) = table.CHECKS[part](figures)
    assert first[3] is met


def test_trials_are_counted_while_all_workers_run():
    """One trial of a second before the other worker begins, then two at once."""
    start = datetime(2026, 1, 1)

    def trial(owner, begin, end):
        times = (start + timedelta(seconds=second) for second in (begin, end))
        return SimpleNamespace(
            user_attrs={"lease": {"owner": owner}},
            values=[0.0],
            **dict(zip(("datetime_start", "datetime_complete"), times, strict=True)),
        )

    trials = [trial("a", 0, 1), trial("a", 1, 2), trial("b", 1, 2), trial("a", 2, 3)]
    assert real_trials.together(trials) == pytest.approx(120)
    assert real_trials.together(trials[:2]) == pytest.approx(60)


def test_kills_go_on_in_another_study_until_there_are_enough(tmp_path):
    figures = kills.kills((None, tmp_path, "s"), 2, 3, 4)
    assert figures["kills"] == 3 and figures["complete"] == 4 * figures["studies"]
    assert not any(figures[key] for key in table.LOSSES)


def test_a_kill_waits_until_its_worker_runs_a_trial(tmp_path, monkeypatch):
    """The trials take an hour, and are run at once where no worker is left."""
    monkeypatch.setattr(kills, "AT_START", 0.0)
    figures = kills.kills((None, tmp_path, "s"), 1, 2, 2, seconds=3600.0, later=0.0)
    assert (figures["kills"], figures["in_a_trial"], figures["at_start"]) == (2, 2, 0)
    assert not any(figures[key] for key in table.LOSSES) and figures["complete"] == 2


@pytest.mark.parametrize(("hits", "met"), [(100, True), (99, False)])
def test_kills_that_hit_no_trial_show_little(hits, met):
    figures = {"journal, 1": {"lost": 0, "repeated": 0, "not_ended": 0, "kills": 200}}
    figures["journal, 1"] |= {"in_a_trial": hits, "interrupted": 150}
    assert bool(table.few_hits(figures)) is not met
    rows = list(table.kills(figures))
    assert rows[1] == ("of these in a running trial", str(hits), "half", met)


def test_the_sentence_of_the_soak_is_that_of_its_results_file():
    result = json.loads(soak.RESULTS.read_text(encoding="utf-8"))
    guide = " ".join((ROOT / "docs/workers.md").read_text(encoding="utf-8").split())
    assert soak.sentence(result) in guide
    assert (
        result["minutes"] >= 1 and result["done"]["kills"] and result["done"]["clocks that jumped"]
    )


def test_what_a_soak_left_out_is_said():
    result = {
        "minutes": 20.5,
        "rounds": {"journal": 2, "full disk": 1},
        "left_out": ["lost MariaDB"],
    }
    result["done"] = {"kills": 30, "clocks that jumped": 4, "full disk": 5}
    assert soak.sentence(result).startswith(
        "20.5 minutes, 3 studies (2 journal, 1 full disk): 30 kills, 4 clocks that jumped, "
        "5 times full disk. Nothing"
    )
    assert soak.sentence(result).endswith(" Left out: lost MariaDB.")
