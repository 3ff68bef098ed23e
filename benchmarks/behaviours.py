"""Runs the configurations of other behaviours in `examples/` on one model; keeps the results.

    python benchmarks/behaviours.py [--model FOLDER] [--trials 24] [--only NAME ...]

Each run is the command that a user types, read through its JSON lines. Figures are of test prompts,
which neither directions nor search saw: of the original, and of the trial that the rule picked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import run_facts

from heretic_kl.demo import ensure_demo_model

ROOT = Path(__file__).parents[1]
RULES = {
    "over_refusal": "min-kept_refusals=0.7",
    "overused_phrases": "knee",
    "hedging": "knee",
}
"""Configuration -> the pick rule that it recommends."""
KEPT = ("value", "standard_error", "interval", "text")


def run(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """One configuration: seconds of its stages, scores before and after."""
    with tempfile.TemporaryDirectory() as studies:
        words = [sys.executable, "-m", "heretic_kl", "--config", f"examples/{name}.toml"]
        words += ["--model", str(arguments.model), "--trials", str(arguments.trials)]
        words += ["--threads", str(arguments.threads), "--seed", str(arguments.seed)]
        words += ["--study-dir", studies, "--test-trials", "1", "--pick", RULES[name], "--json"]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    named = {event["event"]: event for event in events}
    seconds = sum(event["seconds"] for event in events if event["event"] == "stage_finished")
    baselines = {e["use"]: e["scores"] for e in events if e["event"] == "baseline_measured"}
    outcome: dict[str, object] = {
        "config": f"examples/{name}.toml",
        "rule": RULES[name],
        "exit_code": done.returncode,
        "seconds": seconds,
        "trials": sum(event["event"] == "trial_finished" for event in events),
    }
    if done.returncode:
        return {**outcome, "failed": named["failed"]["lines"]}
    picked = named["trial_picked"]["record"]
    tested = {e["record"]["number"]: e["scores"] for e in events if e["event"] == "trial_tested"}
    after = tested[picked["number"]]
    return {
        **outcome,
        "picked": picked["number"],
        "validation_scores": beside(baselines["validation"], picked["scores"]),
        "test_scores": beside(baselines["test"], after),
    }


def beside(original: dict, edited: dict) -> dict[str, dict[str, dict[str, object]]]:
    """Both scores by scorer, without their details."""
    return {
        name: {
            which: {key: scores[name][key] for key in KEPT}
            for which, scores in (("original", original), ("edited", edited))
        }
        for name in edited
    }


def table(behaviours: dict[str, dict]) -> list[str]:
    """Scores on the test prompts as lines of a Markdown table, without the floor's words."""
    lines = ["| | pick rule | score | original | edited |", "|---|---|---|---|---|"]
    for name, outcome in behaviours.items():
        first = [f"`{name}`", f"`{outcome['rule']}`"]
        if "failed" in outcome:
            lines.append(f"| {' | '.join(first)} | {' '.join(outcome['failed'])} | | |")
            continue
        for score, both in outcome["test_scores"].items():
            texts = [both[which]["text"].split(" nats (")[0] for which in ("original", "edited")]
            lines.append(f"| {' | '.join([*first, score, *texts])} |")
            first = ["", ""]
    return lines


def main() -> None:
    """Run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(RULES), default=list(RULES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/behaviours.json")
    arguments = parser.parse_args()
    named = arguments.model
    arguments.model = (named or ensure_demo_model()).resolve()
    result = run_facts(arguments.seed, arguments.threads, "auto")
    result["model"] = "the demo model" if named is None else named.name
    before = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    result["behaviours"] = before.get("behaviours", {})
    for name in arguments.only:
        result["behaviours"][name] = run(name, arguments)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result["behaviours"][name], indent=2), flush=True)
    print("\n".join(table(result["behaviours"])))


if __name__ == "__main__":
    main()
