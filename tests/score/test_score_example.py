"""What docs/measuring.md says of candidates of the demo model is in the results file."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "benchmarks/results/score_example.json").read_text(encoding="utf-8"))
GUIDE = (ROOT / "docs/measuring.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("part", ["table", "chain"])
def test_tables_are_those_of_the_results_file(part):
    assert len(RESULTS[part]) > 3 and "\n".join(RESULTS[part]) in GUIDE


def test_the_card_is_that_of_the_results_file():
    assert f"```yaml\n{RESULTS['card'].strip()}\n```" in GUIDE


def test_at_least_eight_candidates_of_different_kinds_are_compared():
    names = {record["candidate"] for record in RESULTS["candidates"]}
    assert len(names) >= 8
    assert {"Q8_0.gguf", "bnb-nf4", "rounded-4-bit", "edit", "edit-Q4_0.gguf"} <= names
