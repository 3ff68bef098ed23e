"""Rows laid out as prompts by positions."""

import os

import pytest
import torch
from safetensors.torch import save_file

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import KLTable, RowStatistics, row_statistics, storage

GENERATOR = torch.Generator().manual_seed(3)
LOGITS = torch.randn(2, 5, 30, generator=GENERATOR)
ROWS = row_statistics(LOGITS[0], LOGITS[1], LOGITS[0].argmax(-1))
PROMPT, POSITION = torch.tensor([2, 0, 0, 2, 2]), torch.tensor([1, 0, 1, 0, 2])
TABLE = KLTable.from_rows(ROWS, PROMPT, POSITION, 3, 4)


def test_rows_land_at_their_place_in_any_order():
    assert (TABLE.prompts, TABLE.positions) == (3, 4)
    assert TABLE.mask.tolist() == [
        [True, True, False, False],
        [False] * 4,
        [True, True, True, False],
    ]
    for name in RowStatistics._fields:
        assert torch.equal(getattr(TABLE, name)[PROMPT, POSITION], getattr(ROWS, name))
    assert not TABLE.values[~TABLE.mask].any()
    order = torch.tensor([4, 2, 0, 1, 3])
    shuffled = RowStatistics(*(column[order] for column in ROWS))
    again = KLTable.from_rows(shuffled, PROMPT[order], POSITION[order], 3, 4)
    for name, column in again.columns().items():
        assert torch.equal(column, getattr(TABLE, name))


def test_round_trip(tmp_path):
    table = KLTable.from_rows(
        ROWS, PROMPT, POSITION, 3, 4, divergence="reverse_kl", temperature=2.0
    )
    path = tmp_path / "deeper" / "table.safetensors"
    table.save(path)
    table.save(path)
    loaded = KLTable.load(path)
    for name, column in table.columns().items():
        assert torch.equal(column, getattr(loaded, name))
        assert column.dtype == getattr(loaded, name).dtype
    assert (loaded.divergence, loaded.temperature) == ("reverse_kl", 2.0)
    assert [entry.name for entry in path.parent.iterdir()] == ["table.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table.safetensors"
    TABLE.save(path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        TABLE.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.safetensors"]


def test_files_that_are_no_tables(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with pytest.raises(MeasurementError, match="there is no heretic-kl table file"):
        KLTable.load(path)
    path.write_text("not safetensors")
    with pytest.raises(MeasurementError, match="cannot be read"):
        KLTable.load(path)
    save_file({"divergence": torch.zeros(2)}, path)
    with pytest.raises(MeasurementError, match="not a heretic-kl table file, but something else"):
        KLTable.load(path)
    storage.save_tensors(path, "heretic-kl table", TABLE.columns(), {"divergence": "forward_kl"})
    with pytest.raises(MeasurementError, match="file is damaged: it has no 'temperature'; store"):
        KLTable.load(path)
    TABLE.save(path)
    monkeypatch.setattr(storage, "METRIC_VERSION", 99)
    with pytest.raises(MeasurementError, match="metric version 2, this is version 99"):
        KLTable.load(path)


def test_a_selection_of_prompts():
    some = TABLE.select_prompts(torch.tensor([2, 0]))
    assert torch.equal(some.mask, TABLE.mask[[2, 0]])


@pytest.mark.parametrize(
    ("prompt", "position", "message"),
    [
        (PROMPT[:4], POSITION, r"prompt_index must be \(5,\), got \(4,\)"),
        (PROMPT + 1, POSITION, r"prompt_index must be in \[0, 3\), got 1 to 3"),
        (PROMPT, POSITION - 1, r"position must be in \[0, 4\), got -1 to 1"),
        (torch.zeros_like(PROMPT), POSITION, "two rows have the same"),
    ],
)
def test_indices_must_fit(prompt, position, message):
    with pytest.raises(ValueError, match=message):
        KLTable.from_rows(ROWS, prompt, position, 3, 4)


def test_columns_must_fit():
    columns = TABLE.columns()
    with pytest.raises(ValueError, match=r"infinite must have.*\(3, 4\), got \(3, 3\)"):
        KLTable(**{**columns, "infinite": columns["infinite"][:, :3]})
    with pytest.raises(ValueError, match="divergence must be"):
        KLTable(**{**columns, "divergence": torch.zeros(3)})
    with pytest.raises(ValueError, match="mask must be bool"):
        KLTable(**{**columns, "mask": columns["mask"].double()})
