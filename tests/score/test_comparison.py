"""Several candidates: records, the Pareto line, the plot, the page, files for the hub."""

import json
import xml.etree.ElementTree as ElementTree

import pandas
import pytest
import torch
import yaml
from huggingface_hub import ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file, save_file

from heretic_kl.errors import ExportError, MeasurementError
from heretic_kl.score import (
    Comparison,
    Document,
    KLMetric,
    MeasuredOn,
    TeacherForcedKL,
    TextKL,
    card_metadata,
    evaluation_results,
    merged_with_lm_eval,
)
from heretic_kl.testing import WORDS, save_tiny_model, tiny_llama

PROMPTS = ["make a cake", "tell me about Rome", "wait please", "how do I make a cake", "mix flour"]
PROMPTS += ["sorry", "what do you know"]


@pytest.fixture(scope="module")
def halved(original, tmp_path_factory):
    """The original in bfloat16: half the size."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "halved", tiny_llama())
    tensors = load_file(original / "model.safetensors")
    rounded = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def kl(original):
    return TeacherForcedKL(original, prompts=PROMPTS, kl_tokens=3, dtype="float32", bands=True)


@pytest.fixture(scope="module")
def comparison(kl, original, other, halved):
    return kl.compare([other, halved, original])


@pytest.fixture
def on():
    return MeasuredOn("org/a", "org/set", 7, "0" * 64, 3, "org/set", "test", "2026-01-02")


class TestRecords:
    def test_a_data_frame_of_candidates(self, comparison, kl, other):
        frame = pandas.DataFrame(comparison.records())
        assert list(frame["kl"]) == sorted(frame["kl"]) and frame["kl"][0] == 0.0
        assert list(frame["bits_per_weight"]) == [32.0, 16.0, 32.0]
        measured = kl.score(other)
        row = frame.iloc[2]
        assert (row["kl"], row["loss"]) == (measured.kl, measured.change.loss.mean)
        assert row["verdict"] == measured.verdict and "-bit rounding" in row["verdict"]

    def test_the_pareto_line_has_what_nothing_is_smaller_and_nearer_than(self, comparison):
        records = comparison.records()
        for record in records:
            beaten = any(
                other["bytes"] <= record["bytes"]
                and other["kl"] <= record["kl"]
                and (other["bytes"], other["kl"]) != (record["bytes"], record["kl"])
                for other in records
            )
            assert record["pareto"] is not beaten
        assert [record["pareto"] for record in records] == [True, True, False]

    def test_a_data_frame_of_positions(self, kl, other):
        measured = kl.score(other)
        frame = pandas.DataFrame(measured.records())
        assert len(frame) == measured.summary.rows
        by_prompt = frame.groupby("prompt")["values"].mean()
        assert by_prompt.mean() == pytest.approx(measured.kl, rel=1e-12)

    def test_models_by_name_and_as_objects(self, kl, other, load):
        named = kl.compare({"mine": load(other)}).records()
        assert named[0]["candidate"] == "mine" and named[0]["bytes"] is None
        assert kl.compare([load(other)]).records()[0]["candidate"] == "candidate 1"
        with pytest.raises(ValueError, match="no candidates"):
            kl.compare([])

    def test_text_compares_too_and_a_measurement_with_several(self, original, other, halved):
        text = [Document(" ".join(WORDS * 2), "long")]
        measured = TextKL(original, text, context=16, stride=6).compare([other, halved])
        near, far = (candidate.measurement for candidate in measured.ranked)
        first, second = far.compare([near, far])
        assert first == far.compare(near) and second.mean_difference == 0.0


class TestPlot:
    def test_png_and_svg(self, comparison, tmp_path):
        comparison.plot(tmp_path / "p.png")
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
        comparison.plot(str(tmp_path / "p.svg"))
        drawn = (tmp_path / "p.svg").read_text()
        ElementTree.fromstring(drawn)
        for word in ("halved", "other", "8 bits", "3 bits", "on the Pareto line"):
            assert word in drawn

    def test_what_cannot_be_drawn(self, comparison, kl, other, load, tmp_path):
        with pytest.raises(ValueError, match="must end in .png or .svg"):
            comparison.plot(tmp_path / "p.pdf")
        bare = Comparison.of(["org/model"], [comparison.ranked[0].measurement])
        with pytest.raises(ExportError, match="no candidate is on this disk"):
            bare.plot(tmp_path / "p.png")


class TestHub:
    def test_a_card_s_metadata_is_what_the_hub_reads(self, comparison, on):
        measurement = comparison.ranked[2].measurement
        text = card_metadata("b", measurement, on)
        assert text.startswith("---\n") and text.endswith("\n---\n")
        data = yaml.safe_load(text.strip("-\n"))
        name, (result,) = model_index_to_eval_results(data["model-index"])
        assert (name, result.metric_value) == ("b", measurement.kl)
        assert result.metric_args["standard_error"] == measurement.summary.standard_error
        assert result.dataset_type == "org/set" and measurement.verdict in result.metric_name
        again = ModelCardData(model_name="b", eval_results=[result])
        assert yaml.safe_load(again.to_yaml()) == data

    def test_an_evaluation_results_file(self, comparison, on):
        measurement = comparison.ranked[2].measurement
        (entry,) = parse_eval_result_entries(yaml.safe_load(evaluation_results(measurement, on)))
        assert (entry.dataset_id, entry.task_id) == ("org/set", "teacher_forced_kl")
        assert entry.value == measurement.kl and "nats" in entry.notes and entry.date
        own = MeasuredOn("a", "p.txt", 7, "0" * 64, 3)
        with pytest.raises(MeasurementError, match="'p.txt' is no dataset of the hub"):
            evaluation_results(measurement, own)

    def test_one_more_task_of_the_harness(self, comparison, on):
        measurement = comparison.ranked[2].measurement
        theirs = {"results": {"arc": {"acc,none": 0.5}}, "versions": {"arc": 1}, "date": 1.0}
        before = json.dumps(theirs)
        merged = json.loads(json.dumps(merged_with_lm_eval(theirs, measurement, on)))
        assert json.dumps(theirs) == before
        assert merged["results"]["arc"] == {"acc,none": 0.5} and merged["date"] == 1.0
        ours = merged["results"]["teacher_forced_kl"]
        assert ours["kl,none"] == measurement.kl
        assert ours["kl_stderr,none"] == measurement.summary.standard_error
        tables = ("versions", "configs", "n-shot", "n-samples", "higher_is_better")
        assert all("teacher_forced_kl" in merged[table] for table in tables)
        assert merged_with_lm_eval({}, measurement, on)["results"].keys() == {"teacher_forced_kl"}
        with pytest.raises(MeasurementError, match="a task 'teacher_forced_kl' already"):
            merged_with_lm_eval(merged, measurement, on)
        with pytest.raises(MeasurementError, match="no results of lm-evaluation-harness"):
            merged_with_lm_eval({"scores": 1}, measurement, on)

    def test_as_a_metric_of_evaluate(self, kl, other):
        metric, measured = KLMetric(kl, "a few prompts"), kl.score(other)
        computed = metric.compute(model=other)
        assert computed["kl"] == measured.kl and computed["verdict"] == measured.verdict
        assert computed["standard_error"] == measured.summary.standard_error
        json.dumps(computed)
        merged = metric.compute(model=other, lm_eval={"results": {"arc": {"acc,none": 0.5}}})
        assert merged["results"].keys() == {"arc", metric.name}
        metadata = merged["configs"][metric.name]["metadata"]
        assert metadata["source"] == "a few prompts" and len(metadata["sha256"]) == 64
        assert metadata["reference"] == "original"

    def test_the_harness_s_own_table_shows_it(self, comparison, on):
        make_table = pytest.importorskip("lm_eval.utils").make_table
        theirs = {"results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1}}}
        theirs |= {"versions": {"arc": 1}, "n-shot": {"arc": 0}, "higher_is_better": {"arc": {}}}
        measurement = comparison.ranked[2].measurement
        table = make_table(merged_with_lm_eval(theirs, measurement, on))
        assert "|kl " in table and f"{measurement.kl:.4f}" in table and "|acc" in table


def test_the_drawing_has_every_candidate_with_a_size(comparison):
    points = comparison.points()
    assert len(points) == 3 and comparison.levels()["8 bits"] > 0.0
    assert all(torch.isfinite(torch.tensor(point["kl"])) for point in points)
