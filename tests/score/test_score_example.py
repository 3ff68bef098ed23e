"""What docs/measuring.md says of candidates of the demo model is in the results files."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "benchmarks/results/score_example.json").read_text(encoding="utf-8"))
GGUF = json.loads((ROOT / "benchmarks/results/gguf.json").read_text(encoding="utf-8"))
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


def test_the_table_of_gguf_types_is_that_of_the_results_file():
    lines = [
        f"| {file['type']} | {file['megabytes']} | {file['bits_per_weight']} | {file['kl']:.2g} ± "
        f"{file['standard_error']:.1g} | {file['back_end_floor']:.1g} | "
        f"{file['same_best_token']:.1%} |"
        for file in GGUF["files"]
    ]
    assert len(lines) == 9 and "\n".join(lines) in GUIDE and "figures/gguf_size.png" in GUIDE
    of_text = GGUF["long_text"]
    first, second = GGUF["time"]
    said = " ".join(GUIDE.split())
    assert (
        f"takes {first['ratio']:.2f} ({first['type']}) and {second['ratio']:.2f} ({second['type']})"
        in said
    )
    assert f"pass alone: {of_text['forward_megabytes']:,} MB" in said
    assert f"one model would take {of_text['logits_would_take_megabytes']:,} MB" in said
    assert of_text["more_megabytes"] <= 300
