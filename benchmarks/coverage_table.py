"""The coverage of model types as a table for people. Runs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MAX_REASON_LENGTH = 160


def summary(types: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many types passed, were rejected, failed or could not be built."""
    counts = Counter(coverage["status"] for coverage in types.values())
    tried = len(types) - counts["not built here"]
    return {
        "types": len(types),
        "classes": len({coverage["class_name"] for coverage in types.values()}),
        **{name: counts[name] for name in ("passed", "rejected", "failed", "not built here")},
        "passed_share": round(counts["passed"] / tried, 4) if tried else 0.0,
    }


def summary_line(types: Mapping[str, Mapping[str, Any]]) -> str:
    """The same in a sentence."""
    counts = summary(types)
    return (
        f"{counts['types']} decoder types ({counts['classes']} classes): {counts['passed']} passed "
        f"({counts['passed_share']:.1%} of those built), {counts['rejected']} rejected with a "
        f"one-line error, {counts['failed']} failed, {counts['not built here']} not built here"
    )


def text_row(coverage: Mapping[str, Any]) -> str:
    """One type on a terminal."""
    remark = coverage["reason"]
    if coverage["without"] and not remark:
        remark = "without " + ", ".join(coverage["without"])
    numbers = [_number(coverage[name]) for name in ("residue", "passes_error", "export_error")]
    return (
        f"{coverage['model_type']:<20} {coverage['status']:<14} {coverage['layers']:>2} layers  "
        f"residue {numbers[0]}  passes {numbers[1]}  reload {numbers[2]} {coverage['route']:<9} "
        f"{coverage['seconds']:>4.1f} s  {_sites(coverage['sites'])}  {remark}"
    )


def markdown(results: Mapping[str, Any]) -> str:
    """`docs/coverage.md`, from what `benchmarks/results/coverage.json` holds."""
    types = results["types"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    passed = [one for one in types.values() if one["status"] == "passed"]
    others = [one for one in types.values() if one["status"] != "passed"]
    lines = [
        "# Architectures",
        "",
        f"Written by `{results['command']}` on {results['date']} ({versions}).",
        "",
        f"**{summary_line(types)}.**",
        "",
        "Every decoder-only model type of the installed `transformers`, as a tiny random model in",
        "float32 on a CPU, is taken through what a user runs:",
        "",
        "- *residue*: the share of a removed direction that any layer still adds (below 1e-5);",
        "- *search*: two trials have finite scores, equal to those of the same trials with nothing",
        "  shared, replayed or run together; the KL of the unedited model is exactly 0;",
        "- *passes*: the largest relative error of edited hidden states against one unpadded",
        "  sequence at a time;",
        "- *reload*: the largest relative error of the logits of the saved model, loaded by",
        "  plain `transformers`, against the operators; all tensors keep their names, shapes and",
        "  types;",
        "- *responses*: greedy responses under the operators equal those of `generate` on the",
        "  saved model.",
        "",
        "*Without*: savings that were tried at the start, found inexact for this type and not",
        "used. Results are the same without them. The tiny models have attention windows of 8",
        "tokens; larger models share a prefix in responses where prompt and response fit into the",
        "window.",
        "",
        "| type | layers | sites | residue | passes | reload | without |",
        "|---|---|---|---|---|---|---|",
        *map(_passed_row, passed),
    ]
    if others:
        lines += ["", "## Not edited", "", "| type | what | why |", "|---|---|---|"]
        lines += [
            f"| {one['model_type']} | {one['status']} | {_short(one['reason'])} |" for one in others
        ]
    return "\n".join([*lines, ""])


def _passed_row(coverage: Mapping[str, Any]) -> str:
    numbers = (coverage[name] for name in ("residue", "passes_error", "export_error"))
    cells: Sequence[str] = (
        coverage["model_type"],
        str(coverage["layers"]),
        _sites(coverage["sites"]),
        *map(_number, numbers),
        ", ".join(coverage["without"]),
    )
    return "| " + " | ".join(cells) + " |"


def _sites(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _short(reason: str) -> str:
    plain = reason.replace("|", "\\|").replace("<", "`<").replace(">", ">`")
    return (
        plain
        if len(plain) <= MAX_REASON_LENGTH
        else plain[:MAX_REASON_LENGTH].rsplit(" ", 1)[0] + " ..."
    )
