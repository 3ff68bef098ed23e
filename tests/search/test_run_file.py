"""What a run records beside its study: merged, finite, and refused where it is not ours."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from heretic_kl.errors import StudyError
from heretic_kl.search import RunFile


def test_tables_are_merged_and_the_rest_is_replaced(tmp_path):
    file = RunFile(tmp_path, "s")
    assert file.read() == {}
    file.update({"model": "a", "commands": {"1": "x", "2": "y"}})
    file.update({"model": "b", "commands": {"2": "z"}, "numbers": [1.0, float("nan")]})
    assert file.read() == {
        "format": 1,
        "model": "b",
        "commands": {"1": "x", "2": "z"},
        "numbers": [1.0, None],
    }


def test_text_that_is_no_unicode_is_kept(tmp_path):
    file = RunFile(tmp_path, "s")
    file.update({"responses": ["\ud800 \x00 \u202e</script>"]})
    assert file.read()["responses"] == ["\ud800 \x00 \u202e</script>"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}'])
def test_a_file_of_another_sort_is_an_error_of_one_line(tmp_path, content):
    file = RunFile(tmp_path, "s")
    file.path.write_text(content)
    with pytest.raises(StudyError, match="report.json") as caught:
        file.read()
    assert "\n" not in str(caught.value)


def test_processes_that_share_a_study_lose_none_of_each_others_entries(tmp_path):
    def add(number):
        RunFile(tmp_path, "s").update({"commands": {str(number): "x"}})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(24)))
    assert len(json.loads((tmp_path / "s.report.json").read_text())["commands"]) == 24
    assert [path.name for path in tmp_path.iterdir()] == ["s.report.json"]


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot write") as caught:
        RunFile(tmp_path / "file", "s").update({})
    assert "\n" not in str(caught.value)
