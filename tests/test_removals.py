"""How ways of removing a direction are compared: at equal refusal mass, between strengths."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import removals


def points(*pairs):
    return [{"mass": mass, "kl": kl} for mass, kl in pairs]


class TestComparison:
    def test_between_strengths_on_log_scales(self):
        measured = points((0.4, 0.01), (0.1, 0.04), (0.05, 1.0))
        assert removals.kl_at(measured, 0.2) == pytest.approx(0.02)
        assert removals.kl_at(measured, 0.1) == pytest.approx(0.04)

    def test_a_mass_that_no_strength_reaches(self):
        assert removals.kl_at(points((0.4, 0.01), (0.3, 0.04)), 0.2) == math.inf

    def test_a_mass_that_the_weakest_strength_is_beyond(self):
        assert removals.kl_at(points((0.1, 0.01), (0.05, 0.04)), 0.2) is None

    def test_the_table_says_so(self):
        entry = {"unedited": {"mass": 0.8}, "ways": {"a": points((0.5, 0.01), (0.3, 0.04))}}
        head, _, row = removals.table(entry).splitlines()
        assert head == "| removal | KL at mass 0.40 | KL at mass 0.24 | KL at mass 0.12 |"
        assert row.startswith("| a | 0.0") and row.endswith("| not reached | not reached |")


def test_least_squares_removes_the_direction_and_moves_harmless_outputs_least():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    unit = torch.nn.functional.normalize(torch.randn(6, generator=generator), dim=0)
    moments = removals.Moments(outputs.mean(0), outputs.T @ outputs / len(outputs))
    reads = removals._least_squares({"site": moments}, ridge=1e-6)("site", unit)
    assert float(reads @ unit) == pytest.approx(1.0, abs=1e-4)
    change = (outputs @ reads).square().sum()
    assert change < (outputs @ unit).square().sum()
    for other in torch.randn(20, 6, generator=generator):
        nudged = reads + 0.1 * (other - unit * (other @ unit))  # still removes all of it
        assert (outputs @ nudged).square().sum() > change


def test_the_decision_states_what_the_results_file_holds():
    root = Path(__file__).parents[1]
    results = json.loads((root / "benchmarks/results/removals.json").read_text("utf-8"))
    page = (root / "docs/decisions/032-forms-of-removal.md").read_text("utf-8")
    assert set(results) == {"demo", "Qwen2.5-Coder-0.5B"}
    for entry in results.values():
        assert removals.table(entry) in page
