"""The study of KL over several positions: measured on a tiny model, analysed on synthetic rows."""

import hashlib
import inspect
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from heretic_kl.cli.score.settings import ScoreSettings
from heretic_kl.config import Settings
from heretic_kl.kl import Head, jensen_shannon, row_statistics
from heretic_kl.kl_options import KLOptions
from heretic_kl.prompts import DatasetSpec, load_prompts
from heretic_kl.score import DEFAULT_PROMPTS, TeacherForcedKL
from heretic_kl.testing import load_tiny_model, save_tiny_model, tiny_llama

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks.study_kl_tokens.__main__ import grouped, main, run_all  # noqa: E402
from benchmarks.study_kl_tokens.analysis import analyse, scatter  # noqa: E402
from benchmarks.study_kl_tokens.damage import dissimilarity, repetition, text_class  # noqa: E402
from benchmarks.study_kl_tokens.divergences import (  # noqa: E402
    ReferenceDistributions,
    compare,
    prefix_means,
    table,
)
from benchmarks.study_kl_tokens.edits import NOTHING, WEIGHTS, Edit, all_edits  # noqa: E402
from benchmarks.study_kl_tokens.page.__main__ import analysed, page  # noqa: E402
from benchmarks.study_kl_tokens.page.figures import draw_all  # noqa: E402
from benchmarks.study_kl_tokens.page.rule import (  # noqa: E402
    cheapest,
    checks,
    findings,
    prompts_to_rank,
    prompts_to_state,
    recommendation,
    recommended,
)
from benchmarks.study_kl_tokens.rows import Row, RowsFile  # noqa: E402
from benchmarks.study_kl_tokens.task import (  # noqa: E402
    DATA,
    POSITIONS,
    SIZES,
    human_texts,
    panel_prompts,
    prompts,
)
from benchmarks.study_kl_tokens.variants import (  # noqa: E402
    COMPOSITE,
    MAIN,
    MEASURES,
    OPERATORS,
    Study,
)
from benchmarks.study_kl_tokens.weights import changed, fine_tuned, weight_change  # noqa: E402

NAMED = {"model": "tiny", "dtype": "float32"}
EVERY = 12


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studied") / "model"
    save_tiny_model(folder, tiny_llama(max_position_embeddings=512))
    return load_tiny_model(folder)


@pytest.fixture(scope="module")
def measured(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HERETIC_KL_CACHE", str(folder))
        yield run_all(lm, SIZES["tiny"], folder / "tiny.jsonl", EVERY, 1, NAMED)


def test_the_list_has_over_120_distinct_edits_and_the_same_ones_every_time():
    edits = all_edits(30)
    assert len({edit.name for edit in edits}) == len(edits) > 120
    assert edits == all_edits(30) and edits[0].name == NOTHING
    assert {*WEIGHTS, "learned", "early", "random draw"} < set(Counter(e.family for e in edits))


def test_groups_hold_every_edit_once_and_weights_change_alone():
    edits = all_edits(30)
    groups = grouped(edits, 6)
    assert Counter(e.name for g in groups for e in g) == Counter(e.name for e in edits)
    assert all(len(g) == 1 for g in groups for e in g if e.changes_weights or e.name == NOTHING)


def test_an_edit_that_does_nothing_has_no_kl_and_no_damage(measured):
    study = Study(measured)
    for name, values in study.nothing.arrays.items():
        if name.split()[0] in ("greedy", "sampled", "paired", "text", "own", "dissimilarity"):
            share = name == "text better"
            assert float(values.nan_to_num().abs().max()) == pytest.approx(0, abs=1e-5), share
    assert float(study.nothing.arrays["changed"].max()) == 0


def test_ablations_and_weight_edits_are_measured_and_differ(measured):
    study = Study(measured)
    assert {"noise", "rounding", "random draw"} & set(study.families)
    kl = study.variant(64).values()
    assert np.unique(kl).size == len(kl) and (kl > 0).all()
    assert all(np.isfinite(study.damage[name]).all() for name in study.damage)


def test_a_run_that_was_killed_goes_on_and_measures_the_same(measured, lm, monkeypatch, tmp_path):
    monkeypatch.setenv("HERETIC_KL_CACHE", str(tmp_path))
    lines = measured.path.read_text(encoding="utf-8").splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[:4]) + lines[4][:100], encoding="utf-8")
    continued = run_all(lm, SIZES["tiny"], part, EVERY, 1, NAMED)
    rows = {row.edit: row for row in RowsFile.read(part).rows}
    assert set(rows) == {row.edit for row in measured.rows} and len(continued.rows) == len(rows)
    for row in RowsFile.read(measured.path).rows:
        before = row.arrays["greedy forward"]
        assert torch.allclose(rows[row.edit].arrays["greedy forward"], before, rtol=1e-2, atol=1e-5)


def test_a_file_of_other_settings_is_left_alone_with_one_line(measured, lm, monkeypatch, tmp_path):
    monkeypatch.setenv("HERETIC_KL_CACHE", str(tmp_path))
    before = measured.path.read_bytes()
    with pytest.raises(SystemExit, match="was measured with another edits: use another --out"):
        run_all(lm, SIZES["tiny"], measured.path, EVERY + 1, 1, NAMED)
    assert measured.path.read_bytes() == before


def test_all_divergences_at_once_are_those_of_the_library():
    torch.manual_seed(0)
    head = Head(torch.randn(50, 8))
    hidden, other = torch.randn(7, 8), torch.randn(7, 8)
    tokens = torch.randint(50, (7,))
    rows = compare(ReferenceDistributions(hidden, head), other, head, tokens)
    p, q = head.logits(hidden), head.logits(other)
    for name, divergence in (("forward", "forward_kl"), ("reverse", "reverse_kl")):
        expected = row_statistics(p, q, tokens, divergence=divergence)
        assert torch.allclose(getattr(rows, name), expected.values, atol=1e-9)
        assert torch.allclose(rows.log_probability.exp(), expected.candidate_probability)
    shannon = jensen_shannon(reference=p, candidate=q, reduction="none")
    assert torch.allclose(rows.jensen_shannon, shannon, atol=1e-9)
    same = compare(ReferenceDistributions(hidden, head), hidden, head, tokens)
    assert float(same.forward.max()) < 1e-12


def test_means_stop_where_a_response_ends():
    values = table(torch.tensor([1.0, 3.0, 5.0]), [2, 1], 64)
    means = prefix_means(values)
    assert means[0].tolist() == [1.0] + [2.0] * 7 and means[1].tolist() == [5.0] * 8
    halved = prefix_means(values, 0.5 ** torch.arange(64.0, dtype=torch.float64))
    assert float(halved[0, 1]) == pytest.approx((1 + 3 / 2) / 1.5)


@pytest.mark.parametrize(
    "edit",
    [
        Edit("n", "noise", {"size": 0.2, "part": "early", "seed": 0}),
        Edit("r", "rounding", {"bits": 4, "part": None}),
    ],
)
def test_changed_weights_come_back_bit_for_bit(lm, edit):
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    with changed(lm, weight_change(lm, edit, [])):
        after = lm.model.state_dict()
        differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ and (edit.name == "r" or all(".layers.0." in name for name in differ))
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


def test_a_fine_tune_changes_the_mlps_alone_and_predicts_its_text_better(lm):
    ids = [list(range(4, 24))]
    first, second = fine_tuned(lm, ids, 4, 2)
    assert set(first) == {f"{layer}.mlp.down_proj" for layer in range(3)}
    assert all(float((second[name] - first[name]).abs().max()) > 0 for name in first)

    def loss():
        out = lm.model(input_ids=torch.tensor(ids), labels=torch.tensor(ids))
        return float(out.loss)

    untaught, edit = loss(), Edit("t", "fine-tune", {"snapshot": 1, "scale": 1.0})
    with changed(lm, weight_change(lm, edit, [first, second])):
        assert loss() < untaught


def test_text_measures():
    assert repetition("a b c d e f") == 0 and repetition("one two three four " * 5) > 0.7
    assert dissimilarity(["the same", "zzz"], ["the same", "other words"])[0] == 0
    assert text_class("yes yes yes yes yes yes yes yes yes") == "degenerate"
    assert text_class("The capital of Italy is Rome, on the Tiber.") == "content"


def test_the_prompts_are_those_of_the_measured_rows():
    content = (DATA / "prompts.jsonl").read_bytes()
    digest = "d66cd7d4980c8a4358c4781f268fb1076c40ba27943cc66160778cd00fd5db4b"
    assert hashlib.sha256(content).hexdigest() == digest, "measured rows cannot be continued"
    panel = [prompt for chosen in panel_prompts(3).values() for prompt in chosen]
    assert len({prompt.user for prompt in panel}) == 18
    largest = SIZES["full"]
    assert len(prompts("harmless", "validation", largest.checked, largest.kl + 8)) == 16
    with pytest.raises(ValueError, match="49 harmless validation prompts are wanted"):
        prompts("harmless", "validation", 17, 32)


def test_a_quick_run_measures_a_model_and_writes_what_it_took(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HERETIC_KL_CACHE", str(tmp_path))
    save_tiny_model(tmp_path / "small", tiny_llama(max_position_embeddings=512))
    out = tmp_path / "kl_tokens_small_quick.jsonl"
    command = ["--quick", "--model", str(tmp_path / "small"), "--out", str(out), "--threads", "1"]
    main([*command, "--dtype", "float32"])
    file, timed = RowsFile.read(out), json.loads(out.with_suffix(".json").read_text())
    assert file.header["sizes"] == vars(SIZES["quick"]) and len(file.rows) >= 10
    assert timed["cpu_seconds"] > 0 and timed["edits"] == len(Study(file).rows)
    assert "CPU seconds in all" in capsys.readouterr().out


def test_passages_that_are_measured_are_not_those_that_are_tuned_on():
    held_out, tuning = ({text.text for text in human_texts(use)} for use in ("held out", "tuning"))
    assert held_out and tuning and not held_out & tuning


def synthetic(tmp_path, edits=40, prompts=12, late=True):
    """Rows whose damage shows only at positions from 8 on (or only at the first one)."""
    draw = torch.Generator().manual_seed(0)
    header = {
        **NAMED, "date": "", "machine": {"threads": 1}, "edits": 1, "right": [1, 0, 1],
        "sizes": vars(SIZES["tiny"]),
        "text_groups": ["prose", "code", "scripts"], "lengths": {"greedy": [64] * prompts},
        "confidence": torch.rand(prompts, 64, generator=draw),
        "timings": [
            {"prompts": p, "positions": n, "seconds": 0.1 + 0.02 * p + 0.001 * p * n}
            for p in (3, 6, 12)
            for n in (1, 8, 64)
        ],
    }  # fmt: skip
    rows = []
    for index in range(edits + 1):
        size = index / edits
        noise = torch.rand(prompts, 64, generator=draw)
        values = 0.5 + 0.1 * noise
        place = slice(8, None) if late else slice(0, 1)
        values[:, place] = 0.2 * noise[:, place] + 2 * size
        both = prefix_means(values).expand(2, -1, -1)
        damage = torch.full((3,), size, dtype=torch.float64)
        arrays = {name: damage for name in (*COMPOSITE[3:], "degenerate", "evasive")}
        arrays |= dict.fromkeys(("own", "own code", "own scripts", "false refusals"), damage)
        arrays |= dict.fromkeys(("text nll", "text better", "text gain", "text loss"), damage)
        arrays["refused"] = torch.tensor([float(index == 0)])
        arrays["parting"] = torch.full((prompts,), 8.0)
        arrays["greedy forward positions"] = values
        names = [
            f"{p} {d}"
            for p in ("greedy", "sampled")
            for d in ("forward", "reverse", "jensen_shannon")
        ]
        arrays |= dict.fromkeys((*names, "paired forward"), both)
        arrays["free"] = both[0]
        name, family = (NOTHING, NOTHING) if index == 0 else (f"edit {index}", "random draw")
        rows.append(Row(name, family, {}, 1.0, arrays))
    return Study(RowsFile(tmp_path / "none.jsonl", header, rows))


def test_damage_that_shows_late_is_seen_by_more_positions(tmp_path):
    figures = analyse(synthetic(tmp_path), draws=50)
    useful = figures["groups"]["useful"]
    correlation = {
        n: useful["spearman"][f"greedy forward uniform mean, {n}"]["composite"] for n in POSITIONS
    }
    assert correlation[64]["value"] > 0.99 > 0.6 > abs(correlation[1]["value"])
    assert correlation[64]["low"] <= correlation[64]["value"] <= correlation[64]["high"]
    assert useful["more_than_first"]["64"]["composite"]["low"] > 0
    assert useful["partial"]["64"]["composite"]["low"] > 0.9
    right = figures["ties"]["all edits"]["right"]
    assert right["64"]["value"] > 0.95 and abs(right["1"]["value"] - 0.5) < 0.3
    assert right["1"]["low"] < right["1"]["value"] < right["1"]["high"]
    every = figures["groups"][OPERATORS]["spearman"]
    assert all(set(values) == {"composite", *MEASURES} for values in every.values())
    assert set(useful["spearman"]["free-running, 64"]) == {"composite"}
    assert figures["regret"]["picks"]["greedy forward uniform mean, 64"]["regret"] == 0
    assert figures["parting"]["median_kl_before"] < figures["parting"]["median_kl_from_there"]


def test_damage_that_shows_at_once_is_not_seen_better_by_more_positions(late_and_early):
    more = late_and_early[1]["groups"]["useful"]["more_than_first"]["64"]["composite"]
    assert more["value"] < 0 and not math.isnan(more["low"])


def test_precision_grows_with_prompts_and_cost_is_the_fitted_line(tmp_path):
    cells = {
        (c["prompts"], c["tokens"]): c
        for c in analyse(synthetic(tmp_path), 10)["precision"]["cells"]
    }
    assert cells[12, 8]["seconds"] == pytest.approx(0.1 + 0.24 + 0.096, abs=1e-3)
    assert cells[12, 64]["relative_error"] < cells[3, 64]["relative_error"]


def test_few_edits_of_a_group_give_no_figures(tmp_path):
    assert analyse(synthetic(tmp_path, edits=8), 10)["groups"]["useful"] is None


def test_the_page_shows_figures_of_every_model_and_draws_them(tmp_path):
    figures = [analyse(synthetic(tmp_path), draws=20) for _ in range(2)]
    figures[1]["model"] = "qwen05"
    timed = {"cpu_seconds": 90, "edits": 12}
    text = page({"models": figures, "unfinished": {"base": 5}, "quick": timed})
    useful = figures[0]["groups"]["useful"]["spearman"]["greedy forward uniform mean, 16"]
    assert f"{useful['composite']['value']:.2f} (" in text and "tiny, useful" in text
    assert "took 1.5 CPU minutes for 12 edits" in text and "What held on each of tiny, Qwen" in text
    assert "qwen05" not in text and len(text.partition("## Every variant")[2].split("\n")) > 80
    assert "<" not in text and "None" not in text and "base: 5 edits" in text
    files = draw_all(figures, tmp_path)
    assert len(files) == 4 and all(f"figures/{file.name}" in text for file in files)


@pytest.fixture(scope="module")
def late_and_early(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return [analyse(synthetic(folder, late=late), draws=40) for late in (True, False)]


def test_a_default_changes_only_where_all_conditions_hold(late_and_early):
    late, early = late_and_early
    best = recommended([late, late])
    assert best is not None and best.tokens > 3
    assert recommended([late, early]) is None and recommended([early, early]) is None
    assert len(checks([late])) == 7
    assert cheapest(late)["tokens"] >= 16 and cheapest(early)["tokens"] == 1


def test_numbers_of_prompts_follow_from_correlation_and_error():
    cells = [
        {"tokens": 3, "prompts": p, "spearman": s, "relative_error": e}
        for p, s, e in ((3, 0.80, 0.5), (6, 0.895, 0.4), (12, 0.90, 0.2))
    ]
    model = {"precision": {"cells": cells}}
    assert prompts_to_rank(model, 3) == 6
    assert prompts_to_state(model, 3, 0.2) == 12 and prompts_to_state(model, 3, 0.1) == 48


def test_a_finding_holds_where_its_interval_is_above_chance(late_and_early):
    late, early = late_and_early
    by_text = {finding.text: finding.holds for finding in findings([late, early])}
    assert by_text["gain of N = 16 over N = 1 (useful)"] == [True, False]
    assert len(by_text) == 8


def test_the_defaults_are_those_that_the_page_recommends():
    text = (ROOT / "benchmarks/results/kl_tokens.json").read_text(encoding="utf-8")
    chosen = recommendation(json.loads(text)["models"])
    assert (chosen.kind, KLOptions().position_decay) == (MAIN, 1.0)  # uniform weights
    assert Settings.model_fields["kl_tokens"].default == chosen.search_tokens
    measured_alone = inspect.signature(TeacherForcedKL).parameters["kl_tokens"].default
    assert measured_alone == ScoreSettings.model_fields["kl_tokens"].default == chosen.score_tokens
    for spec in (DEFAULT_PROMPTS, DatasetSpec("builtin:harmless", "validation")):
        assert chosen.rank_prompts <= len(load_prompts(spec)) < chosen.state_prompts


def test_the_page_is_that_of_the_results_file():
    text = (ROOT / "benchmarks/results/kl_tokens.json").read_text(encoding="utf-8")
    assert page(json.loads(text)) == (ROOT / "docs/evidence.md").read_text(encoding="utf-8")


def test_the_results_file_is_that_of_the_measured_rows():
    text = (ROOT / "benchmarks/results/kl_tokens.json").read_text(encoding="utf-8")
    for figures in json.loads(text)["models"]:
        file = ROOT / f"benchmarks/results/kl_tokens_{figures['model']}.jsonl"
        study = Study(RowsFile.read(file))
        assert figures["edits"] == len(study.rows) and figures["scatter"] == scatter(study)


def test_a_model_of_few_edits_is_named_and_not_analysed(measured, tmp_path):
    with pytest.raises(SystemExit, match="nothing measured in"):
        analysed(tmp_path)
    (tmp_path / "kl_tokens_few.jsonl").write_bytes(measured.path.read_bytes())
    with pytest.raises(SystemExit, match="has 20 edits yet"):
        analysed(tmp_path)
