"""Front table and details: what rows say, how wide tables are, what broken details do."""

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from heretic_kl.ablation import EditParameters, WeightKernel
from heretic_kl.kl import wilson_interval
from heretic_kl.report import (
    align,
    cell,
    compact,
    describe_edit,
    details_lines,
    duration,
    front_footnotes,
    front_lines,
    front_rows,
    front_table,
    label,
    profile_bars,
    scores_line,
    to_ascii,
    trial_details,
)
from heretic_kl.scoring import Score, Stopped
from heretic_kl.search import TrialRecord

EDIT = EditParameters(17.4, {"attention": WeightKernel(0.92, 20.0, 0.46, 12.0)})


def refusals(count: int, total: int = 64) -> Score:
    low, high = wilson_interval(count, total)
    text = f"{count}/{total} ({count / total:.0%}, {low:.0%} to {high:.0%})"
    details = {"count": count, "total": total, "empty": 2}
    return Score(count / total, text, interval=(low, high), details=details)


def divergence(mean: float, **details: Any) -> Score:
    error = mean / 8
    return Score(
        mean,
        f"{mean:.4f} ± {error:.4f} nats",
        objective=max(mean, 0.01),
        standard_error=error,
        interval=(mean - 2 * error, mean + 2 * error),
        details=details,
    )


def trial(number: int, count: int, mean: float) -> TrialRecord:
    return TrialRecord(
        number,
        "complete",
        {"attention.peak_weight": 0.92},
        EDIT,
        {"refusals": refusals(count), "teacher_forced_kl": divergence(mean)},
        (count / 64, max(mean, 0.01)),
        seconds=4.2,
    )


FRONT = (trial(18, 0, 0.05), trial(9, 12, 0.0137), trial(11, 13, 0.0135))
TESTED = {
    9: {
        "refusals": refusals(14),
        "teacher_forced_kl": divergence(0.02),
        "false_refusals": refusals(1),
    }
}


def rendered(renderable: object, width: int = 80, encoding: str = "utf-8") -> list[str]:
    class Stream(StringIO):
        pass

    Stream.encoding = encoding  # type: ignore[misc, assignment]
    stream = Stream()
    Console(file=stream, width=width, force_terminal=False, _environ={}).print(renderable)
    return stream.getvalue().splitlines()


class TestWording:
    def test_a_count_shows_its_share_and_in_tables_its_interval(self) -> None:
        assert compact(refusals(3)) == "3/64 (5%)"
        assert cell(refusals(3)) == "3/64, 5% (2-13%)"

    def test_a_divergence_keeps_its_error_and_loses_its_unit(self) -> None:
        assert compact(divergence(0.0312)) == "0.0312 ± 0.0039"
        assert cell(Score(0.0, "0.0000 ± 0.0000 nats (below the noise floor 3e-12)")) == (
            "0.0000 ± 0.0000 (noise)"
        )

    def test_a_divergence_over_other_positions_than_trials_says_so(self) -> None:
        text = "0.0312 ± 0.0039 nats over 16 positions (noise floor 3e-12)"
        assert cell(Score(0.0312, text)) == "0.0312 ± 0.0039, N 16"
        assert compact(Score(0.0312, text)) == "0.0312 ± 0.0039, N 16 (floor 3e-12)"
        below = Score(0.0, "0.0000 nats over 1 position (below the noise floor 3e-12)")
        assert cell(below) == "0.0000, N 1 (noise)"

    def test_scores_of_unknown_scorers_speak_for_themselves(self) -> None:
        odd = Score(None, "unscored: no [bold]answers[/]", details={"count": "many", "total": 0})
        assert compact(odd) == cell(odd) == odd.text

    def test_labels(self) -> None:
        assert [label("teacher_forced_kl"), label("false_refusals")] == ["KL", "false refusals"]

    def test_no_scores_at_all(self) -> None:
        assert scores_line({}) == "no scores"

    def test_an_edit_in_words(self) -> None:
        assert describe_edit(EDIT) == (
            "one direction at layer 17.4; attention peak 0.92 at layer 20, mlp off"
        )
        both = EditParameters(
            None, {"mlp": WeightKernel(0.5, 3.25, 0.0, 2.0), "attention": EDIT.kernels["attention"]}
        )
        assert describe_edit(both) == (
            "own direction in each layer; attention peak 0.92 at layer 20, "
            "mlp peak 0.50 at layer 3.2"
        )
        assert describe_edit(EditParameters(1.0, {}, "row")).endswith("; row norms restored")
        assert describe_edit(None) == "unknown edit"

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(4.21, "4.2 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (130, "2 min 10 s")]
        + [(3900, "1 h 05 min"), (-1, "0.0 s")],
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text

    def test_ascii_has_a_likeness_for_what_we_write(self) -> None:
        assert to_ascii("0.1 ± 0.2 ← knee – █ é") == "0.1 +/- 0.2 <- knee - # ?"

    def test_aligned_columns(self) -> None:
        assert align([["a", "bb"], ["ccc", ""], ["d"]]) == ["a    bb", "ccc", "d"]


class TestFront:
    def test_rows_hold_what_was_measured(self) -> None:
        rows = front_rows(FRONT, TESTED, baseline={"refusals": refusals(61)})
        assert [row.title for row in rows] == ["unedited", "18", "9 ← knee", "11"]
        assert rows[0].validation == {"refusals": cell(refusals(61))}
        assert rows[1].test == {}
        assert rows[2].test["false_refusals"] == cell(refusals(1))
        assert rows[3].edit == describe_edit(EDIT)

    def test_neighbours_whose_intervals_overlap_are_named(self) -> None:
        rows = front_rows(FRONT)
        assert [row.like_next for row in rows] == [(), ("refusals", "teacher_forced_kl"), ()]
        notes = front_footnotes(rows)
        assert "KL: the order of these neighbours may be chance (intervals overlap): 9~11." in notes

    def test_trials_behind_the_front_that_are_like_one_of_it_are_named(self) -> None:
        rows = front_rows(FRONT, like={18: (7, 12), 11: tuple(range(20, 30))})
        assert [row.like for row in rows] == [(7, 12), (), tuple(range(20, 30))]
        note = front_footnotes(rows)[-1]
        assert note.endswith(": 18 like 7, 12; 11 like 20, 21, 22, 23, 24, 25 and 4 more.")
        assert not any(" like " in note for note in front_footnotes(front_rows(FRONT)))

    def test_overlap_without_an_interval_is_not_claimed(self) -> None:
        bare = [
            TrialRecord(n, "complete", {}, EDIT, {"x": Score(1.0, "1")}, (1.0,)) for n in (1, 2)
        ]
        assert not any(row.like_next for row in front_rows(bare))

    def test_an_empty_front_is_an_empty_table(self) -> None:
        assert front_rows(()) == ()
        assert front_footnotes(()) == []
        assert rendered(front_table(()))

    @pytest.mark.parametrize("total", [64, 256])
    def test_the_table_fits_80_columns(self, total: int) -> None:
        scores = {
            "refusals": refusals(total // 3, total),
            "teacher_forced_kl": divergence(0.05),
        }
        front = [TrialRecord(117, "complete", {}, EDIT, scores, (0.3, 0.05))]
        reports = {117: {**scores, "false_refusals": refusals(total // 9, total)}}
        lines = rendered(front_table(front_rows(front, reports)))
        assert max(map(len, lines)) <= 80
        assert f"{total // 3}/{total}" in "\n".join(lines)

    def test_narrow_and_ascii_tables_are_drawn_too(self) -> None:
        rows = front_rows(FRONT, TESTED)
        assert max(map(len, rendered(front_table(rows, edits=True), width=20))) <= 20
        text = "\n".join(rendered(front_table(rows, ascii_only=True), encoding="ascii"))
        assert text.isascii()
        assert "0.0500 +/- 0.0063" in text

    def test_lines_are_aligned_and_complete(self) -> None:
        lines = front_lines(front_rows(FRONT, TESTED))
        assert len(lines) == 1 + 3 + 1
        place = lines[0].index("KL")
        assert all(line[place - 1] == " " and line[place] != " " for line in lines)
        assert lines[1].endswith(describe_edit(EDIT))
        assert "\n".join(front_lines(front_rows(FRONT), ascii_only=True)).isascii()


def profile(means: list[float]) -> list[dict[str, Any]]:
    return [
        {"position": p, "mean": mean, "standard_error": None, "count": 10, "infinite": 0}
        for p, mean in enumerate(means)
    ]


class TestDetails:
    def test_everything_a_divergence_holds_is_told(self) -> None:
        score = divergence(
            0.03,
            prompts=64,
            rows=190,
            median=0.01,
            quantiles=[{"level": 0.95, "value": 0.2}, {"level": 0.25, "value": 0.004}],
            profile=profile([0.04, 0.02]),
            top1_agreement=0.953,
            near_tie_share=0.31,
            mean_probability_change=-0.01,
            noise_floor=2.3e-6,
            infinite_count=0,
            set_aside=["a", "b"],
            set_aside_kl=1.25,
        )
        record = TrialRecord(
            7,
            "complete",
            {"direction.scope": "global"},
            EDIT,
            {"teacher_forced_kl": score},
            (0.03,),
        )
        text = "\n".join(details_lines(trial_details(record, {"refusals": refusals(3)})))
        for expected in (
            "Trial 7",
            "weight 0.920 at layer 20, falling to 0.460 at 12 layers from it",
            "direction.scope",
            "25% 0.0040  50% 0.0100  95% 0.2000",
            "95.3% of positions",
            "31% of the KL",
            "2.3e-06 nats",
            "2 prompts that the original refuses, KL 1.2500 nats",
            "KL over positions, nats (validation prompts)",
            "refusals on the test prompts",
            "empty responses",
        ):
            assert expected in text

    @pytest.mark.parametrize(
        ("degenerate", "shown"),
        [({}, "none"), ({"empty": 2, "loop": 1}, "2 empty, 1 loop"), (3, None)],
    )
    def test_degenerate_responses_are_counted_by_kind(self, degenerate: Any, shown: Any) -> None:
        details = {**refusals(3).details, "empty": 2, "degenerate": degenerate}
        score = replace(refusals(3), details=details)
        record = TrialRecord(7, "complete", {}, EDIT, {"refusals": score}, (0.1,))
        rows = dict(row for section in trial_details(record) for row in section.rows)
        assert rows.get("degenerate responses") == shown
        assert rows.get("empty responses") == (None if shown else "2")
        beside = "; 3 degenerate" if degenerate == {"empty": 2, "loop": 1} else ""
        assert cell(score).endswith(f"%){beside}") and compact(score).endswith(f"%{beside})")

    def test_bars_are_as_long_as_the_means_and_count_from_one(self) -> None:
        score = divergence(0.03, profile=profile([0.04, 0.02]))
        record = TrialRecord(7, "complete", {}, EDIT, {"kl": score}, (0.03,))
        bars = [line for line in details_lines(trial_details(record)) if "rows" in line]
        assert [line.count("█") for line in bars] == [24, 12]
        assert [line.split()[0] for line in bars] == ["1", "2"]

    def test_a_long_profile_is_averaged_over_runs(self) -> None:
        places = profile([float(p) for p in range(100)])
        bars = profile_bars({"profile": places})
        assert len(bars) <= 16
        assert (bars[0].first, bars[-1].last) == (1, 100)
        assert sum(bar.mean * bar.count for bar in bars) == pytest.approx(10 * sum(range(100)))

    @pytest.mark.parametrize(
        "details",
        [
            {},
            {"profile": None, "quantiles": 3, "set_aside": "x", "median": "?"},
            {"degenerate": 4},
            {"profile": [None, {"position": 0}, {"position": 1, "mean": None, "count": 0}]},
            {"profile": profile([0.0, 0.0]), "quantiles": [{}, 4], "prompts": True},
        ],
    )
    def test_odd_details_are_left_out(self, details: dict[str, Any]) -> None:
        record = TrialRecord(1, "complete", {}, None, {"odd": Score(None, "?", details=details)})
        assert "odd on the validation prompts" in details_lines(trial_details(record))

    def test_a_failed_trial_tells_why(self) -> None:
        record = TrialRecord(1, "failed", {}, EDIT, error="NaN logits")
        assert "  error  NaN logits" in details_lines(trial_details(record))

    def test_a_stopped_trial_tells_what_was_measured(self) -> None:
        stopped = Stopped(4, {"refusals": "at least 2/8 after 3 responses"}, (0.25, 0.01))
        record = TrialRecord(1, "stopped", {}, EDIT, stopped=stopped)
        line = "measured  refusals at least 2/8 after 3 responses; dominated by trial 4"
        assert any(line in shown for shown in details_lines(trial_details(record)))
