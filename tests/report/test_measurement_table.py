"""What was measured, as lines: nothing left out, nothing wider than 80 columns."""

from dataclasses import replace

import pytest

from heretic_kl.kl import Interval, KLSummary, PairedComparison, PositionMean, Quantile
from heretic_kl.report import (
    MeasuredCandidate,
    MeasurementReport,
    details_lines,
    measurement_footnotes,
    measurement_sections,
)


def summary(mean: float = 0.4123, positions: int = 3, **changes: object) -> KLSummary:
    places = [PositionMean(at, mean * (1 + at), mean / 10, 64 - at, 0) for at in range(positions)]
    made = KLSummary(
        mean=mean,
        standard_error=mean / 13,
        interval=Interval(mean * 0.9, mean * 1.1),
        prompts=64,
        rows=189,
        median=mean / 3,
        quantiles=(Quantile(0.05, mean / 99), Quantile(0.95, mean * 4)),
        profile=tuple(places),
        infinite_count=0,
        top1_agreement=0.8261,
        mean_probability_change=-0.2478,
        near_tie_share=0.103,
        noise_floor=1.1e-12,
        below_noise_floor=mean <= 1.1e-12,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def pair(**changes: object) -> PairedComparison:
    made = PairedComparison(-0.0312, 0.0041, Interval(-0.039, -0.023), True, 64, 0, 0)
    return made._replace(**changes)


def report(*candidates: MeasuredCandidate, **changes: object) -> MeasurementReport:
    made = MeasurementReport(
        reference="org/original",
        reference_dtype="float32",
        inputs=(
            ("prompts", "64 prompts of builtin:harmless report"),
            ("responses", "greedy, of the reference; first 3 tokens of each"),
        ),
        rounding_floor=6.8e-5,
        position_decay=1.0,
        candidates=candidates or (MeasuredCandidate("./fine-tune", "float32", summary()),),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def text(of: MeasurementReport, width: int = 80) -> str:
    return "\n".join(details_lines(measurement_sections(of, width)))


def several(count: int) -> MeasurementReport:
    others = [
        MeasuredCandidate(f"./tune-{n}", "float32", summary(0.4 / n), pair()) for n in range(2, 9)
    ]
    first = MeasuredCandidate("./tune-1", "float32", summary())
    return report(first, *others[: count - 1])


def test_one_candidate_shows_everything() -> None:
    shown = "\n".join(" ".join(line.split()) for line in text(report()).splitlines())
    for expected in (
        "reference  org/original (float32)",
        "candidate  ./fine-tune (float32)",
        "prompts    64 prompts of builtin:harmless report",
        "responses  greedy, of the reference; first 3 tokens of each",
        "measure    KL(reference || candidate), temperature 1",
        "mean                   0.4123 ± 0.032",
        "95% interval           0.371 to 0.454",
        "noise floor, batching  1.1e-12",
        "noise floor, bfloat16  6.8e-05",
        "the mean is            above the noise floor",
        "5% of positions below  0.00416",
        "median                 0.137",
        "same best token        82.6%",
        "p(response token)  -0.248 on average",
        "from near ties   10% of the mean",
        "infinite positions     0",
        "prompts, positions     64, 189",
        "1  0.4123 ± 0.041 (64)",
        "3  1.237 ± 0.041 (62)",
    ):
        assert " ".join(expected.split()) in shown
    assert "Minus candidate" not in shown
    order = [shown.index(word) for word in ("5% of pos", "median", "95% of pos")]
    assert order == sorted(order)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_nothing_is_wider_than_80_columns(count: int) -> None:
    shown = text(several(count))
    assert max(map(len, shown.splitlines())) <= 80
    for number in range(2, count + 1):
        assert f"candidate {number}" in shown


def test_wide_terminals_get_more_columns() -> None:
    headings = [line for line in text(several(4), 120).splitlines() if "candidate 4" in line]
    assert any("candidate 1" in line for line in headings)


def test_names_are_kept_whole_however_long() -> None:
    long = "/very" * 40
    assert long in text(report(MeasuredCandidate(long, None, summary())))


@pytest.mark.parametrize(
    ("mean", "words"),
    [(0.0, "below the noise floor"), (1e-6, "below bfloat16's floor"), (1.0, "above the noise")],
)
def test_where_the_mean_stands(mean: float, words: str) -> None:
    assert words in text(report(MeasuredCandidate("x", None, summary(mean))))


def test_floors_that_were_not_measured_are_not_shown() -> None:
    bare = summary(noise_floor=None, below_noise_floor=None)
    of = report(MeasuredCandidate("x", None, bare), rounding_floor=None)
    assert "floor" not in text(of).lower() and not any(
        "Floors" in note for note in measurement_footnotes(of)
    )


def test_one_prompt_has_no_error() -> None:
    places = (PositionMean(0, 0.5, None, 1, 0), PositionMean(1, None, None, 0, 1))
    lone = summary(standard_error=None, interval=None, prompts=1, profile=places, quantiles=())
    shown = text(report(MeasuredCandidate("x", None, lone)))
    assert any(line.split() == ["95%", "interval", "–"] for line in shown.splitlines())
    assert "1  0.5 (1)" in shown and "2  – (0), 1 infinite" in shown


def test_long_profiles_are_averaged_by_runs() -> None:
    shown = text(report(MeasuredCandidate("x", None, summary(positions=64))))
    assert "1-4" in shown and "61-64" in shown
    lines = [line for line in shown.splitlines() if "1-4 " in line]
    mean = sum(0.4123 * (1 + at) * (64 - at) for at in range(4)) / (64 + 63 + 62 + 61)
    assert f"{mean:.4g} (250)" in lines[0]


def test_settings_are_named() -> None:
    other = summary(divergence="reverse_kl", temperature=0.7)
    of = report(MeasuredCandidate("x", None, other), position_decay=0.9)
    shown = text(of)
    assert "KL(candidate || reference), temperature 0.7" in shown
    assert "each position weighs 0.9 of the one before" in shown
    drawn = summary(divergence="jensen_shannon")
    assert "Jensen-Shannon" in text(report(MeasuredCandidate("x", None, drawn)))


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "distinguishable"),
        ({"distinguishable": False}, "not distinguishable"),
        ({"distinguishable": False, "prompts": 5}, "too few prompts to tell"),
    ],
)
def test_pairs(changes: dict[str, object], verdict: str) -> None:
    first = MeasuredCandidate("a", None, summary())
    shown = text(report(first, MeasuredCandidate("b", None, summary(), pair(**changes))))
    assert f"2          -0.0312 ± 0.0041  -0.039 to -0.023  {verdict}" in shown


def test_footnotes_say_what_a_reader_has_to_know() -> None:
    notes = " ".join(measurement_footnotes(report()))
    assert "clustered by prompt" in notes and "within 0.1" in notes and "Dtypes" not in notes
    odd = report(MeasuredCandidate("x", "bfloat16", summary(infinite_count=2)))
    notes = " ".join(measurement_footnotes(odd))
    assert "Dtypes differ" in notes and "Infinite positions" in notes
    files = report(MeasuredCandidate("x", "Q8_0, llama.cpp", summary()))
    assert "Dtypes differ" in " ".join(measurement_footnotes(files))
    files = replace(files, reference_dtype="F16, llama.cpp")
    assert "Dtypes differ" not in " ".join(measurement_footnotes(files))
