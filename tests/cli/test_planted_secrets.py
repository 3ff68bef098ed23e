"""A token, keys, a password and a home folder are planted; nothing that is written has them."""

import importlib.util
import shutil
import sqlite3
from pathlib import Path

import pytest

from heretic_kl import files
from heretic_kl.search.storage import backends

TOKEN = "hf_PlantedTokenPlantedTokenPlanted"
KEY = "sk-planted-key-of-a-judge-0123456789"
PASSWORD = "planted-pass-word"
USER = "planted-user"
SECRETS = (TOKEN, KEY, PASSWORD)


@pytest.fixture
def planted(workplace, tmp_path, monkeypatch):
    """A home with a copy of the workplace in it, and secrets in the environment."""
    home = tmp_path / "home" / USER
    home.mkdir(parents=True)
    for name in ("model", "a.txt", "b.txt"):
        (home / name).symlink_to(workplace / name)
    text = (workplace / "config.toml").read_text().replace(str(workplace), str(home))
    (home / "config.toml").write_text(text)
    for name, value in (("HOME", str(home)), ("HF_TOKEN", TOKEN), ("OPENAI_API_KEY", KEY)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def database(planted, monkeypatch):
    """A database server whose URL has a password; a file stands for it."""
    file = planted / "studies.db"
    monkeypatch.setattr(backends, "_make_tables", lambda url: None)
    monkeypatch.setattr(backends, "_server", lambda url: backends._sqlite(f"sqlite:///{file}"))
    return f"postgresql+psycopg://me:{PASSWORD}@host/studies"


def leaks(folder, written, secrets):
    """Which secrets stand in the files of a folder or in what was printed, and where."""
    places = {"printed": written.encode()}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.name != "config.toml":
            places[str(path.relative_to(folder))] = path.read_bytes()
    return [(name, s) for name, data in places.items() for s in secrets if s.encode() in data]


def run(capsys, *words):
    from heretic_kl.cli.main import main

    capsys.readouterr()
    code = main([str(word) for word in words])
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize("form", ["merged", "lora"])
def test_nothing_written_has_a_secret_or_the_home(planted, capsys, form):
    words = ["--study-name=mine", "--keep-responses=all", "--pick=knee", "--save=saved"]
    words += [f"--save-as={form}", "--refine", "--refinement.trials=1", "--refinement.steps=2"]
    code, written = run(capsys, *words, "--json", "--debug")
    assert code == 0, written
    code, more = run(capsys, "report", "mine", "--output=report.html")
    assert code == 0, more
    assert (planted / "report.html").exists() and (planted / "saved" / "reproduce.json").exists()
    names = {path.name for path in (planted / "studies").iterdir()}
    assert {"mine.journal", "mine.log", "mine.report.json"} <= names
    assert leaks(planted, "", (*SECRETS, USER)) == []
    assert leaks(planted, written + more, SECRETS) == []  # paths are told to whoever named them


def test_files_of_other_commands_have_no_secret_and_no_home(planted, capsys, tmp_path):
    """Each is given paths in the home, and a key where it takes one."""
    model, prompts = planted / "model", planted / "a.txt"
    (planted / "text.txt").write_text((planted / "a.txt").read_text() * 9, encoding="utf-8")
    assert run(capsys, "--study-name=mine", "--trials=2", "--test-trials=0")[0] == 0
    text = ["--text", planted / "text.txt", "--context=16", "--stride=8"]
    of_prompts = ["--prompts", prompts, "--kl-tokens=2", "--html=s.html", "--ranking=s.md"]
    of_prompts += [
        "--save-reference=s.safetensors",
        "--table=rows.safetensors",
        "--hub-metadata=m.md",
    ]
    both = ["score", "--reference", model, "--candidate", model, "--device=cpu"]
    commands = [
        [*both, *of_prompts, "--json=s.json"],
        [*both, *text, "--html=t.html", "--ranking=t.csv", "--json=t.json"],
        ["score", "--reference=s.safetensors", "--candidate", model, "--json=again.json"],
        ["evaluate", "--candidate", model, "--html=e.html", "--json=e.json"],
        ["inspect", model, "--json=i.json"],
        ["worker", "mine", "--trials=3"],
        ["slurm", "--workers=2", "--folder=jobs"],
    ]
    if importlib.util.find_spec("lm_eval"):
        shutil.copytree(Path(__file__).parent / "tasks", planted / "tasks")
        bench = ["bench", "mine", "--trial=0", "--task=cakes", "--json=b.json"]
        commands.append([*bench, "--tasks-folder", planted / "tasks"])
    for words in commands:
        code, written = run(capsys, *words)
        assert code == 0, written
        assert leaks(tmp_path / "none", written, SECRETS) == []
    jobs = planted / "jobs"  # the owner's own, readable by no other: they name what is to be run
    assert leaks(jobs, "", SECRETS) == []
    shutil.rmtree(jobs)
    shutil.rmtree(planted / "tasks", ignore_errors=True)
    assert leaks(planted, "", (*SECRETS, USER)) == []


def test_a_study_that_names_the_home_by_its_short_name_is_continued(planted, capsys):
    assert run(capsys, "--study-name=mine", f"--model={planted / 'model'}")[0] == 0
    assert "~/model" in (planted / "studies" / "mine.journal").read_text()
    code, written = run(capsys, "save", "mine", "--trial=0", "--save=saved")
    assert code == 0, written


def test_a_password_of_the_storage_stays_in_the_url(planted, database, capsys):
    words = ["--study-name=mine", "--pick=knee", "--save=saved", f"--storage={database}"]
    code, written = run(capsys, *words, "--debug")
    assert code == 0, written
    assert leaks(planted, "", (*SECRETS, USER)) == []
    assert leaks(planted, written, SECRETS) == []
    with sqlite3.connect(planted / "studies.db") as connection:
        assert connection.execute("select count(*) from trials").fetchone()[0] >= 4


def test_a_failed_trial_keeps_no_path_of_the_home(planted, capsys):
    (planted / "broken.py").write_text(
        "from heretic_kl.scoring import Scorer, Score\n"
        "class Broken(Scorer):\n"
        "    calls = 0\n"
        "    def requests(self):\n"
        "        return []\n"
        "    def score(self, results):\n"
        "        self.calls += 1\n"
        "        if self.calls == 1:\n"
        "            return Score(0.0, '0')\n"
        f"        raise RuntimeError('no answer at https://me:{PASSWORD}@host with {TOKEN}')\n"
    )
    words = ["--study-name=mine", f"--scorers.broken.use={planted / 'broken.py'}:Broken"]
    code, written = run(capsys, *words, "--debug")
    assert code == 0 and "no answer" in written  # all trials failed, and the search went on
    names = {path.name for path in (planted / "studies").iterdir()}
    assert {"mine.journal", "mine.log"} <= names
    assert leaks(planted / "studies", written, SECRETS) == []
    assert leaks(planted / "studies", "", (USER,)) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/model", "~/model"),
        ('{"model": "/home/me/a b", "x": 1}', '{"model": "~/a b", "x": 1}'),
        ("sqlite:////home/me/x.db", "sqlite:///~/x.db"),
        ("/mnt/home/me/model", "/mnt/home/me/model"),
        ("/home/men/model", "/home/men/model"),
        ('  File "/home/me/x.py", line 1', '  File "~/x.py", line 1'),
    ],
)
def test_the_home_is_a_tilde(monkeypatch, text, shown):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.without_home(text) == shown
