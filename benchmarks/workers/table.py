"""The figures of benchmarks/results/workers.json against what is asked. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HEAD = ("| | measured | asked | | load |", "|---|---|---|---|---|")
CPU_SECONDS = "client CPU s a trial"


def lines(result: dict[str, Any]) -> list[str]:
    """The rows of the documentation's table."""
    rows = [*HEAD]
    for part, checks in CHECKS.items():
        if part not in result:
            continue
        load = "{:g}, {:g}".format(*result[part]["load_average_before_and_after"])
        for what, measured, asked, met in checks(result[part]["figures"]):
            verdict = "" if met is None else "met" if met else "not met"
            rows.append(f"| {what} | {measured} | {asked} | {verdict} | {load} |")
    return rows


Rows = Iterator[tuple[str, str, str, "bool | None"]]
"""What, measured, asked, whether it is met (None: nothing is asked)."""


def kills(figures: dict[str, Any]) -> Rows:
    """Nothing lost, nothing repeated, all ended; half of the kills in a trial."""
    few = few_hits(figures)
    for name, one in figures.items():
        where, workers = name.split(", ")
        measured = ", ".join(f"{one[key]} {key.replace('_', ' ')}" for key in LOSSES)
        what = f"{one['kills']} kills, {where}, {workers} at a time"
        yield what, measured, "0, 0, 0", not any(one[key] for key in LOSSES)
        yield "of these in a running trial", str(_hits(one)), "half", name not in few
    total = sum(one["kills"] for one in figures.values())
    yield "kills in all", str(total), "200", total >= 200


def few_hits(figures: dict[str, Any]) -> list[str]:
    """Where fewer than half of the kills hit a running trial, so that they show little."""
    return [name for name, one in figures.items() if 2 * _hits(one) < one["kills"]]


def _hits(one: dict[str, Any]) -> int:
    """Older results count trials that were handed back, too."""
    return one.get("in_a_trial", one["interrupted"])


LOSSES = ("lost", "repeated", "not_ended")


MARGIN = 0.01
"""Of a hypervolume that is at most 1: what two workers may lose."""


def front(figures: dict[str, Any]) -> Rows:
    """Two workers are worse by less than `MARGIN`, surely."""
    low, high = figures["difference_95_interval"]
    what = f"hypervolume, two workers less one, {figures['trials']} trials, 5 seeds"
    measured = f"{figures['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
    yield what, measured, f"interval above -{MARGIN:g}", low > -MARGIN


def stored(figures: dict[str, Any]) -> Rows:
    """What a user waits for."""
    for name, one in figures.items():
        times = [one[f"{step}_seconds"] for step in ("open", "front", "begin")]
        what = f"{one['trials']} trials, {name}: open, front, begin a trial"
        yield what, ", ".join(f"{t:.2f} s" for t in times), "3 s each", max(times) < 3


def proxy(figures: dict[str, Any]) -> Rows:
    """Many workers."""
    for step in ("ask", "tell"):
        median, late = (figures[f"{step}_seconds_{name}"] for name in ("median", "95th"))
        what = f"{figures['workers']} workers behind the proxy, {step}: median, 95th percentile"
        yield what, f"{1000 * median:.0f} ms, {1000 * late:.0f} ms", "100 ms, –", median < 0.1
    lost = figures["wanted"] - figures["complete"]
    what = f"the same, {figures['wanted']} trials: lost, repeated"
    yield what, f"{lost}, {figures['repeated']}", "0, 0", not lost and not figures["repeated"]
    if (cpu := figures.get("client_cpu_seconds_a_trial")) is not None:  # older results lack it
        yield "the same, on the cores of proxy and database", f"{cpu:.3f} {CPU_SECONDS}", "", None


def scaling(figures: dict[str, Any]) -> Rows:
    """Share of the ideal; asked of databases, where trials cost nothing to draw."""
    for name, one in figures.items():
        where, kind = name.split(", ")
        asked = where != "journal" and kind == "at random"
        what = f"{one['workers']} workers, {one['fake_cost_seconds']:g} s a trial, {name}"
        cpu = one["client_cpu_seconds_a_trial"]
        measured = f"{one['share_of_ideal']:.0%} of ideal, {cpu:.3f} {CPU_SECONDS}"
        met = one["share_of_ideal"] >= 0.9
        yield what, measured, "90%" if asked else "", met if asked else None


def real(figures: dict[str, Any]) -> Rows:
    """Two real workers against one."""
    ratios = ", ".join(f"{ratio:.2f}" for ratio in figures["ratios"])
    what = "trials a minute, two workers with a thread each against one"
    yield what, f"{figures['ratio']:.2f} ({ratios})", "1.8", figures["ratio"] >= 1.8
    ceiling = figures["ratio_of_plain_matrix_products"]
    yield "the same of plain matrix products", f"{ceiling:.2f}", "", None


CHECKS = {
    "kills": kills,
    "front": front,
    "stored": stored,
    "proxy": proxy,
    "scaling": scaling,
    "real": real,
}
