"""Two processes with parts of one model do what one process does."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heretic_kl import ranks
from heretic_kl.cli.main import main
from heretic_kl.search import read_study
from heretic_kl.testing import save_tiny_model, tiny_gpt2, tiny_llama, tiny_qwen2

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

WORDS = "how do I make a cake please tell me about the weather in Rome first mix flour".split()
KINDS = {"harmful": "a", "harmless": "b", "borderline": "b"}
SPLITS = {"train": "[:6]", "validation": "[6:9]", "test": "[9:]"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    save_tiny_model(folder / "llama", tiny_llama(attention_bias=True))
    save_tiny_model(folder / "tied", tiny_qwen2())
    save_tiny_model(folder / "gpt2", tiny_gpt2())
    lines = ['response_prefix = ""', 'prompt_set = "builtin"', "directions.by_response = false"]
    lines += ['scorers.refusals.settings.markers = ["flour", "mix"]']
    lines += ["scorers.teacher_forced_kl.settings.set_aside_refused = false"]
    for index, name in enumerate(("a", "b")):
        prompts = [" ".join(WORDS[(i + index) % 9 :][: 3 + i % 5]) for i in range(12)]
        (folder / f"{name}.txt").write_text("\n".join(prompts), encoding="utf-8")
    for kind, name in KINDS.items():
        for use, part in SPLITS.items():
            source = json.dumps(str(folder / f"{name}.txt"))
            lines.append(f'prompts.{kind}.{use} = {{source = {source}, split = "{part}"}}')
    (folder / "config.toml").write_text("\n".join(lines), encoding="utf-8")
    return folder


def in_processes(count, words, folder, *, wait_for_all=False):
    """Run the command in forked processes, as torchrun would start them; their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [{**shared, "RANK": n, "LOCAL_RANK": n} for n in range(count)]
    processes = [context.Process(target=_run, args=(words, place, folder)) for place in places]
    for process in processes:
        process.start()
    for process in processes if wait_for_all else processes[:1]:
        process.join(600)
    for process in processes[1:]:
        if processes[0].exitcode:  # as torchrun does
            process.terminate()
        process.join(600)
    return [process.exitcode for process in processes]


def _run(words, place, folder):
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}{place['RANK']}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
    os.environ.update({"TORCHELASTIC_RUN_ID": "x", **{k: str(v) for k, v in place.items()}})
    code = main([str(word) for word in words])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def search(workplace, folder, model, *words):
    return [
        *("optimize", "-c", workplace / "config.toml", "--model", workplace / model),
        *("--dtype=float32", "--trials=3", "--max-response-tokens=6", "--batch-size=4"),
        *("--kl-tokens=3", "--test-trials=1", f"--study-dir={folder}", "--study-name=s"),
        *("--pick=knee", f"--save={folder / 'saved'}", *words),
    ]


def alike(one, two):
    """Two studies: the same parameters, and scores within the noise floor."""
    assert len(one.records) == len(two.records)
    for first, second in zip(one.records, two.records, strict=True):
        hidden = ("refine.sha256",)
        parameters = [
            {k: v for k, v in record.parameters.items() if k not in hidden}
            for record in (first, second)
        ]
        assert parameters[0] == parameters[1]
        assert first.state == second.state
        learned = first.edit.refinement is not None
        for name, score in first.scores.items():
            near = pytest.approx(score.value, rel=0.02 if learned else 1e-4, abs=1e-7)
            assert second.scores[name].value == near
    return True


def same_tensors(one, two):
    ours, theirs = load_file(one), load_file(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0.02, atol=1e-3)
    return True


def test_two_processes_search_refine_and_save_as_one(workplace, tmp_path, capfd):
    words = ["--refinement.trials=1", "--refinement.steps=8"]
    assert main([str(w) for w in search(workplace, tmp_path / "1", "llama", *words)]) == 0
    (tmp_path / "2").mkdir()
    codes = in_processes(2, search(workplace, tmp_path / "2", "llama", *words), tmp_path)
    assert codes == [0, 0], (tmp_path / "err0").read_text()
    assert (tmp_path / "out1").read_text() == (tmp_path / "err1").read_text() == ""
    one, two = (read_study("s", tmp_path / name) for name in "12")
    learned = [record.refinement for record in one.records if record.refinement]
    assert len(one.records) - len(learned) == 3 and len(learned) > 1  # one edit, some strengths
    assert alike(one, two)
    file = Path("saved") / "model.safetensors"
    assert same_tensors(tmp_path / "1" / file, tmp_path / "2" / file)


def test_an_adapter_of_a_model_with_tied_weights(workplace, tmp_path, capfd):
    """And a study that was begun by one process is continued by two."""
    words = ["--no-refine", "--save-as=lora", "--edit.norm=row"]
    once = search(workplace, tmp_path / "1", "tied", *words)
    assert main([str(w) for w in once]) == 0
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    shutil.rmtree(tmp_path / "2" / "saved")
    twice = search(workplace, tmp_path / "2", "tied", *words)
    codes = in_processes(2, [*twice, "--trials=4"], tmp_path)
    assert codes == [0, 0], (tmp_path / "err0").read_text()
    assert len(read_study("s", tmp_path / "2").records) == 4
    file = Path("saved") / "adapter_model.safetensors"
    assert (tmp_path / "2" / file).exists()
    if read_study("s", tmp_path / "2").front == read_study("s", tmp_path / "1").front:
        assert same_tensors(tmp_path / "1" / file, tmp_path / "2" / file)


def test_score_under_torchrun(workplace, tmp_path, capfd):
    save_tiny_model(tmp_path / "other", tiny_llama(attention_bias=True), seed=1)
    words = ["score", "--reference", workplace / "llama", "--candidate", tmp_path / "other"]
    words += ["--prompts", workplace / "a.txt", "--kl-tokens=3", "--batch-size=4"]
    words += ["--dtype=float32", "--response-prefix="]
    assert main([str(w) for w in [*words, f"--json={tmp_path / '1.json'}"]]) == 0
    codes = in_processes(2, [*words, f"--json={tmp_path / '2.json'}"], tmp_path)
    assert codes == [0, 0], (tmp_path / "err0").read_text()
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "12")
    first, second = (document["candidates"][0]["mean"] for document in (one, two))
    assert second == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--device-map=auto"], "--device-map spreads a model over one process"),
        (["--quantization=bnb_4bit"], "quantized weights are not split among processes"),
        (["--workers=2"], "leave --workers out"),
        (["--model=GPT2"], "no tensor-parallel plan in transformers"),
        (["--model=ODD"], "its 1 key value heads do not divide by 2"),
    ],
)
def test_what_cannot_be_split_is_one_line(workplace, tmp_path, words, line):
    save_tiny_model(tmp_path / "odd", tiny_llama(num_key_value_heads=1))
    places = {"--model=GPT2": workplace / "gpt2", "--model=ODD": tmp_path / "odd"}
    words = [f"--model={places[w]}" if w in places else w for w in words]
    codes = in_processes(2, search(workplace, tmp_path, "llama", *words), tmp_path)
    assert codes[0] in (1, 2)
    errors = (tmp_path / "err0").read_text().splitlines()
    assert line in errors[-1] and errors[-1].startswith("heretic-kl: error: ")


def test_a_process_that_fails_alone_ends_all(workplace, tmp_path, monkeypatch):
    """Instead of waiting for the other one for ever."""
    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=5))
    (tmp_path / "alone.py").write_text(
        "import os\n"
        "from heretic_kl.scoring import Score, Scorer\n"
        "class Alone(Scorer):\n"
        "    asked = 0\n"
        "    def requests(self):\n"
        "        Alone.asked += 1\n"
        "        if Alone.asked > 2 and os.environ['RANK'] == '1':\n"
        "            raise RuntimeError('only here')\n"
        "        return []\n"
        "    def score(self, results):\n"
        "        return Score(0.0, '0')\n"
    )
    words = search(workplace, tmp_path, "llama", f"--scorers.alone.use={tmp_path}/alone.py:Alone")
    assert all(in_processes(2, words, tmp_path, wait_for_all=True))
    assert "process 1 failed and another one did not" in (tmp_path / "err1").read_text()
    states = {record.state for record in read_study("s", tmp_path).records}
    assert states <= {"interrupted", "failed"}  # and the edits are measured by the next run


def test_other_commands_stay_alone(tmp_path):
    assert in_processes(2, ["inspect", tmp_path], tmp_path, wait_for_all=True) == [2, 2]
    assert "does not run under torchrun" in (tmp_path / "err0").read_text()


def launched(words):
    """The command under the real launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line = [*launcher, "--nproc-per-node=2", "-m", "heretic_kl", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(line, cwd=Path(__file__).parents[2], text=True, **pipes)


def started_by(number):
    """Processes that a process started, and those that these started."""
    children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    return {int(child) for child in children}.union(*(started_by(child) for child in children))


def runs(number):
    """Whether a process has not ended; one that waits for its parent to look has."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.e2e
def test_the_launcher_itself_searches_and_saves(workplace, tmp_path):
    process = launched(search(workplace, tmp_path, "llama", "--no-refine"))
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    assert len(read_study("s", tmp_path).records) == 3
    assert (tmp_path / "saved" / "model.safetensors").exists()


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_term_to_the_launcher_ends_all_processes_and_loses_no_trial(workplace, tmp_path):
    """They end by themselves: the launcher kills what has not ended 30 seconds after TERM."""
    words = ["--no-refine", "--trials=100000", "--startup-trials=100000"]
    process = launched(search(workplace, tmp_path, "llama", *words))
    journal = tmp_path / "s.journal"
    try:
        while process.poll() is None:
            if journal.exists() and journal.read_text().count('"state":1') > 2:
                break
            time.sleep(0.2)
        processes = started_by(process.pid)
        process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=25)[0]
    finally:
        process.kill()
    assert len(processes) >= 2 and not any(map(runs, processes)), text
    assert "finished trials are kept in the study" in text
    records = read_study("s", tmp_path).records
    states = {record.state for record in records}
    assert "complete" in states and states <= {"complete", "screened", "stopped", "interrupted"}
    numbers = [record.number for record in records]
    assert numbers == list(range(len(numbers))), "no trial is lost"
