"""Whole runs on tiny models of every type: the kinds by default, all with `-m architectures`."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# At the end: a library named like one of these files must go on being found first.
sys.path.append(str(ROOT / "benchmarks"))

import coverage_table  # noqa: E402
import type_coverage  # noqa: E402

FEW = (
    "deepseek_v3 falcon_h1 gemma2 gemma4_text gpt2 gpt_oss jamba llama mamba2 qwen3_moe qwen3_next"
).split()
REJECTED = {
    "openai-gpt": "layer 0",
    "qwen4_exp": "scaled differently from token to token",
    "qwen4_exp_text": "scaled differently from token to token",
    "rwkv": "layer 0",
}
"""Type -> what the error says."""
RESULTS = json.loads((ROOT / "benchmarks/results/coverage.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in FEW else pytest.mark.architectures)
        for name in type_coverage.decoder_types()
    ],
)
def test_a_type_passes_or_is_rejected_with_a_one_line_error(model_type, tmp_path):
    coverage = type_coverage.cover(model_type, tmp_path)
    if coverage.status == "not built here":
        pytest.skip(coverage.reason)
    if model_type in REJECTED:
        assert coverage.status == "rejected" and REJECTED[model_type] in coverage.reason
        return
    assert coverage.status == "passed", coverage.reason
    assert coverage.route == "streamed"


def test_nearly_all_types_pass_and_none_fails():
    counts = RESULTS["summary"]
    assert counts == coverage_table.summary(RESULTS["types"])
    assert counts["passed_share"] >= 0.97 and counts["failed"] == 0
    rejected = {name for name, one in RESULTS["types"].items() if one["status"] == "rejected"}
    assert rejected <= set(REJECTED)


def test_the_page_is_made_of_the_results():
    page = (ROOT / "docs/coverage.md").read_text(encoding="utf-8")
    assert page == coverage_table.markdown(RESULTS)
