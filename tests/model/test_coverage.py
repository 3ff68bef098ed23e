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
REFUSED = {
    "openai-gpt": "layer 0",
    "qwen4_exp": "scaled differently from token to token",
    "qwen4_exp_text": "scaled differently from token to token",
    "rwkv": "layer 0",
}
"""Type -> what the line says."""
RESULTS = json.loads((ROOT / "benchmarks/results/coverage.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in FEW else pytest.mark.architectures)
        for name in type_coverage.decoder_types()
    ],
)
def test_a_type_passes_or_is_refused_with_one_line(model_type, tmp_path):
    found = type_coverage.cover(model_type, tmp_path)
    if found.status == "not built here":
        pytest.skip(found.reason)
    if model_type in REFUSED:
        assert found.status == "refused" and REFUSED[model_type] in found.reason
        return
    assert found.status == "passed", found.reason
    assert found.route == "streamed"


def test_nearly_all_types_pass_and_none_fails():
    found = RESULTS["summary"]
    assert found == coverage_table.summary(RESULTS["types"])
    assert found["passed_share"] >= 0.97 and found["failed"] == 0
    refused = {n for n, one in RESULTS["types"].items() if one["status"] == "refused"}
    assert refused <= set(REFUSED)


def test_the_page_is_made_of_the_results():
    page = (ROOT / "docs/coverage.md").read_text(encoding="utf-8")
    assert page == coverage_table.markdown(RESULTS)
