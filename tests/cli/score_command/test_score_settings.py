"""`heretic-kl score`: its settings, as documented."""

import subprocess
import sys

import pytest
from score_runs import ROOT

from heretic_kl.cli import main as cli
from heretic_kl.cli.score.settings import read_score_settings


class TestSettings:
    def test_defaults(self):
        settings = read_score_settings(["--reference", "a", "--candidate", "b"])
        assert (settings.kl_tokens, settings.response) == (8, "greedy")
        assert settings.divergence == "forward_kl"
        assert settings.dataset.describe() == "builtin:harmless test"
        assert settings.noise_floor and not settings.stored

    def test_candidates_add_up_in_order(self):
        words = ["-r", "a", "--candidate", "b", "c,d", "--candidate", "e"]
        assert read_score_settings(words).candidate == ("b", "c,d", "e")

    def test_a_built_in_set_is_tested_on_unless_told(self):
        words = ["--reference", "a", "--candidate", "b", "--prompts", "builtin:harmful"]
        assert read_score_settings(words).dataset.split == "test"
        assert read_score_settings([*words, "--prompts.split", "train"]).dataset.split == "train"

    def test_what_all_commands_share_comes_from_everywhere(self, here, monkeypatch):
        (here / "config.toml").write_text(
            'dtype = "float32"\ntrials = 3\nthreads = 2\nbatch_size = 0\n'
            'prompts.harmful.train.source = "p.txt"\n'
        )
        monkeypatch.setenv("HERETIC_KL_THREADS", "1")
        monkeypatch.setenv("HERETIC_KL_PROMPTS__HARMFUL__TRAIN__LIMIT", "1")
        settings = read_score_settings(["--reference", "a", "--candidate", "b"])
        assert (settings.dtype, settings.threads, settings.batch_size) == ("float32", 1, 16)
        assert settings.dataset.source == "builtin:harmless"
        # Of a stored reference a dtype for all commands is no mistake, a flag for it is one.
        words = ["--reference", "r.safetensors", "--candidate", "b"]
        assert read_score_settings(words).dtype == "float32"

    @pytest.mark.parametrize("words", [["score", "--help"], ["score"], ["score", "--kl-tokens"]])
    def test_help_and_mistakes_import_nothing_heavy(self, words):
        heavy = "{'torch', 'transformers', 'datasets', 'optuna', 'rich', 'peft', 'numpy'}"
        code = (
            f"import sys; from heretic_kl.cli.main import main; main({words})\n"
            f"print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": str(ROOT), "COLUMNS": "80", "PATH": ""},
        )
        assert done.stderr.splitlines()[-1] == "[]"

    def test_the_help_fits_and_names_every_flag(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        assert cli.main(["score", "--help-all"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        for flag in ("--response", "--store", "--candidate-dtype", "--base", "--no-noise-floor"):
            assert flag in text
        assert cli.main(["--help"]) == 0
        assert "Measure any models against a reference" in capsys.readouterr().out
