"""The floor across back ends: where it is measured, and that it stands beside every result."""

import pytest
import torch
from gguf_models import built, make_models

from heretic_kl.cli.score.chain_cells import chain_cells
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.score import (
    MeasuredOn,
    card_metadata,
    evaluation_results,
    measure_chain,
    merged_with_lm_eval,
)
from heretic_kl.score.llama import model

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def test_it_is_measured_where_unpacked_weights_fit(models, monkeypatch):
    from heretic_kl.score.llama import candidate

    monkeypatch.setattr(candidate, "free_memory", lambda device: 10**5)
    notices = []
    kl = built(models, notify=notices.append)
    assert kl.score(models / "q8_0.gguf").back_end_floor is None
    (message,) = notices
    assert message.startswith("the floor across back ends is not measured: unpacked, 'q8_0.")


def test_every_table_shows_it(models):
    reference = built(models)
    files = [models / "q8_0.gguf", models / "q4_0.gguf"]
    comparison = reference.compare(files)
    floors = [line.measurement.back_end_floor for line in comparison.ranked]
    assert comparison.cells()[0][5] == "back-end floor"
    assert [line[5] for line in comparison.cells()[1:]] == [f"{floor:.2g}" for floor in floors]
    assert "| back-end floor |" in comparison.to_markdown()
    assert [record["back_end_floor"] for record in comparison.records()] == floors
    assert str(floors[0]) in comparison.to_csv()
    chain = measure_chain(reference, files, [line.measurement for line in comparison.ranked])
    lines = chain_cells(chain)
    assert [line[5] for line in lines[:4]] == [
        "back-end floor",
        *(f"{floor:.2g}" for floor in floors),
        "–",
    ]
    on = MeasuredOn("a", "org/set", 4, "0" * 64, 4, "org/set", "test", "2026-01-02")
    measured = comparison.ranked[0].measurement
    assert f"back_end_floor: {floors[0]}" in card_metadata("q8", measured, on)
    assert f"floor across back ends {floors[0]:.2g}" in evaluation_results(measured, on)
    merged = merged_with_lm_eval({}, measured, on)["configs"]["teacher_forced_kl"]
    assert merged["metadata"]["back_end_floor"] == floors[0]


def test_bands_of_a_reference_in_llama_are_those_of_its_weights(models):
    options = {"bands": True, "reference_cache_type": "f32"}
    live = built(models, reference=models / "f32.gguf", backend="llama.cpp", **options)
    beside = built(models, bands=True)
    for ours, theirs in zip(live.bands, beside.bands, strict=True):
        assert ours.bits == theirs.bits and ours.kl == pytest.approx(theirs.kl, rel=1e-3)
    assert "-bit rounding" in live.score(models / "q4_0.gguf").verdict


def test_a_second_context_runs_in_step_with_the_first(models, monkeypatch):
    monkeypatch.setattr(model, "MOST_ROWS", 4)
    opened = model.LlamaModel(models / "q8_0.gguf", context=64)
    beside = opened.beside()
    beside.block_rows = 2
    sequence = ForcedSequence((1, 2, 3), tuple(range(4, 16)))
    alone = [torch.cat(list(one.blocks(sequence))) for one in (opened, beside)]
    second = beside.blocks(sequence)
    pairs = [(block, torch.cat([next(second), next(second)])) for block in opened.blocks(sequence)]
    for apart, in_step in zip(alone, zip(*pairs, strict=True), strict=True):
        assert torch.equal(apart, torch.cat(in_step))
    del opened  # whose weights the other one holds
    assert torch.equal(torch.cat(list(beside.blocks(sequence))), alone[1])
