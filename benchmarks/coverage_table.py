"""What covering the model types gave, as a table for people. Runs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MOST_REASON = 160


def summary(types: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many types passed, were refused, failed or could not be built."""
    counts = Counter(found["status"] for found in types.values())
    tried = len(types) - counts["not built here"]
    return {
        "types": len(types),
        "classes": len({found["class_name"] for found in types.values()}),
        **{name: counts[name] for name in ("passed", "refused", "failed", "not built here")},
        "passed_share": round(counts["passed"] / tried, 4) if tried else 0.0,
    }


def summary_line(types: Mapping[str, Mapping[str, Any]]) -> str:
    """The same in a sentence."""
    found = summary(types)
    return (
        f"{found['types']} decoder types ({found['classes']} classes): {found['passed']} passed "
        f"({found['passed_share']:.1%} of those built), {found['refused']} refused with one line, "
        f"{found['failed']} failed, {found['not built here']} not built here"
    )


def text_row(found: Mapping[str, Any]) -> str:
    """One type on a terminal."""
    said = found["reason"] or "without " + ", ".join(found["without"])
    return (
        f"{found['model_type']:<20} {found['status']:<14} {found['layers']:>2} layers  "
        f"residue {_number(found['residue'])}  passes {_number(found['passes_error'])}  "
        f"reload {_number(found['export_error'])} {found['route']:<9} {found['seconds']:>4.1f} s  "
        f"{_sites(found['sites'])}  {said if found['reason'] or found['without'] else ''}"
    )


def markdown(results: Mapping[str, Any]) -> str:
    """`docs/coverage.md`, from what `benchmarks/results/coverage.json` holds."""
    types = results["types"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    passed = [found for found in types.values() if found["status"] == "passed"]
    others = [found for found in types.values() if found["status"] != "passed"]
    lines = [
        "# Architectures",
        "",
        f"Written by `{results['command']}` on {results['date']} ({versions}).",
        "",
        f"**{summary_line(types)}.**",
        "",
        "Every decoder-only model type of the installed `transformers`, as a tiny random model in",
        "float32 on a CPU, taken through what a user runs:",
        "",
        "- *residue*: the share of a removed direction that any layer still adds (below 1e-5);",
        "- *search*: two trials, scores finite, KL of the unedited model exactly 0, equal to the",
        "  same trials with nothing shared, replayed or run together; *passes*: the largest",
        "  relative error of edited hidden states against one unpadded sequence at a time;",
        "- *reload*: the largest relative error of the logits of the saved model, loaded by plain",
        "  `transformers`, against the operators; names, shapes and types of all tensors are those",
        "  of the original;",
        "- greedy answers under the operators are those of `generate` of the saved model.",
        "",
        "*Without*: savings that were tried at the start, found inexact for this type, and not",
        "used; results are the same without them. The windows of the tiny models are 8 tokens:",
        "larger models share a prefix in answers where prompt and answer fit into their window.",
        "",
        "| type | layers | sites | residue | passes | reload | without |",
        "|---|---|---|---|---|---|---|",
        *map(_passed_row, passed),
    ]
    if others:
        lines += ["", "## Not edited", "", "| type | what | why |", "|---|---|---|"]
        lines += [f"| {f['model_type']} | {f['status']} | {_short(f['reason'])} |" for f in others]
    return "\n".join([*lines, ""])


def _passed_row(found: Mapping[str, Any]) -> str:
    numbers = (found[name] for name in ("residue", "passes_error", "export_error"))
    cells: Sequence[str] = (
        found["model_type"],
        str(found["layers"]),
        _sites(found["sites"]),
        *map(_number, numbers),
        ", ".join(found["without"]),
    )
    return "| " + " | ".join(cells) + " |"


def _sites(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _short(reason: str) -> str:
    plain = reason.replace("|", "\\|").replace("<", "`<").replace(">", ">`")
    return plain if len(plain) <= MOST_REASON else plain[:MOST_REASON].rsplit(" ", 1)[0] + " ..."
