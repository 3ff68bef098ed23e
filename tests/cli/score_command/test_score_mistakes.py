"""`heretic-kl score`: every mistake is one line."""

import pytest
from score_runs import adapter, one_line, score

from heretic_kl.cli import main as cli
from heretic_kl.kl import KLTable


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ([], "no reference given: name the original with --reference"),
            (["--reference", "a"], "no candidate given"),
            (["--refrence", "a"], "unknown flag --refrence; did you mean --reference?"),
            (["--reference", "a", "b"], "unexpected argument 'b'; a model is given as --candidate"),
            (["--kl-tokens", "0"], "kl_tokens must be a whole number from 1 to 1024, got '0'"),
            (["--kl-tokens", "many"], "must be a whole number"),
            (["--kl-tokens"], "--kl-tokens needs a value"),
            (["--candidate"], "--candidate needs a value"),
            (["--no-quiet=yes"], "--no-quiet takes no value"),
            (["--batch-size", "0"], "batch_size must be a whole number, 1 or more"),
            (["--temperature", "nan"], "temperature must be a number above 0, got 'nan'"),
            (["--temperature", "inf"], "temperature must be a number above 0, got 'inf'"),
            (["--temperature", "0"], "temperature must be a number above 0"),
            (["--position-decay", "1.5"], "above 0, at most 1, got '1.5' (--position-decay)"),
            (["--divergence", "forward"], "forward is now forward_kl"),
            (["--divergence", "forwardkl"], "got 'forwardkl' (--divergence); did you mean forward"),
            (["--dtype", "int8"], "dtype must be one of auto, float32"),
            (["--response", "sampled"], "sampled(SEED), for instance sampled(0), got 'sampled'"),
            (["--table", "t.csv"], "table must be a path that ends in .safetensors, got 't.csv'"),
            (["--direction", "forward"], "unknown flag --direction; it is now --divergence"),
            (["--limit", "3"], "unknown flag --limit; it is now --prompts.limit"),
            (["--responses", "greedy"], "unknown flag --responses; it is now --response"),
            (["--sequential"], "unknown flag --sequential; it was removed"),
            (["--reference", "a", "--candidate", "b", "--store", "logits"], "--save-reference"),
            (["--reference", "a", "--candidate", "b", "--prompts", ""], "must be text, not empty"),
            (["--worst", "-1"], "worst must be a whole number"),
            (["-r", "a", "--candidate", "b", "--plot", "p.pdf"], "must end in .png or .svg"),
            (["-r", "a", "--candidate", "b", "--hub-metadata", "h"], "end in .md, .yaml or .json"),
            (["-r", "a", "--candidate", "b", "--hub-metadata", "h.yaml"], "a dataset of the hub"),
            (["-r", "a", "--candidate", "b", "--lm-eval", "l.json"], "--lm-eval has no effect"),
            (
                ["-r", "a", "--candidate", "b", "--hub-dataset", "o/d"],
                "--hub-dataset has no effect",
            ),
            (
                "-r a --candidate b --hub-metadata h.yaml --hub-dataset d".split(),
                "--hub-dataset d: must be OWNER/NAME",
            ),
            (
                ["--reference", "a", "--candidate", "b", "--divergence", "reverse_kl"]
                + ["--refusal-prompts", "builtin:harmful"],
                "--refusal-prompts splits forward_kl alone",
            ),
        ],
    )
    def test_wrong_usage_is_one_line_and_code_2(self, words, expected, capsys):
        assert expected in one_line(capsys, cli.main(["score", *words]), 2)

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--json", "folder"], "a folder of that name exists"),
            (["--table", "p.txt/t.safetensors"], "cannot be written"),
            (["--json", "p.txt"], "that file is read already"),
            (["--table", "x.safetensors", "--save-reference", "./x.safetensors"], "--table goes"),
            (["--base", "a"], "--base has no effect"),
            (["--html", "p.txt"], "that file is read already"),
            (["--hub-metadata", "h.json", "--lm-eval", "gone.json"], "No such file"),
            (["--hub-metadata", "h.json", "--lm-eval", "p.txt"], "not JSON"),
        ],
    )
    def test_targets_are_checked_before_anything_runs(self, words, expected, here, capsys, nothing):
        (here / "folder").mkdir()
        assert expected in one_line(capsys, score(*words), 2)

    def test_models_are_checked_before_anything_runs(self, here, capsys, nothing):
        line = one_line(capsys, score(candidates=["b", "stranger"]))
        assert "'stranger' cannot be compared" in line and "another tokenizer (reference '" in line
        assert "no model at './gone'" in one_line(capsys, score(candidates=["./gone"]))
        assert "no model at './gone'" in one_line(capsys, score(reference="./gone"))
        line = one_line(capsys, score("--chat-template", "gone.jinja"))
        assert "'gone.jinja' does not exist" in line

    def test_prompts_are_checked_before_anything_runs(self, here, capsys, nothing):
        (here / "empty.txt").write_text("\n")
        line = one_line(capsys, score(prompts=("--prompts", "empty.txt")))
        assert "holds no prompts" in line
        line = one_line(capsys, score("--prompts.split", "nowhere", prompts=()))
        assert "no split 'nowhere'" in line

    def test_what_cannot_be_stored_is_found_before_anything_runs(
        self, here, capsys, nothing, monkeypatch
    ):
        (here / "wiki.raw").write_text("make a cake please " * 8)
        words = ["--save-reference", "r.safetensors", "--store"]
        llama = ["--backend", "llama.cpp", *words]
        for store in ("hidden", "head"):
            code = score(*llama, store, reference="a.gguf", candidates=["b.gguf"])
            assert "no hidden states to store: add --store logits" in one_line(capsys, code, 2)
        monkeypatch.setattr("heretic_kl.score.stored.free_memory", lambda device: 1000)
        line = one_line(capsys, score(*words, "logits"))
        assert "logits of up to 18 positions take up to" in line and "--store head" in line
        text = ["--text", "wiki.raw", "--context", "16", "--stride", "8"]
        line = one_line(capsys, score(*words, "logits", *text, prompts=()))
        assert "logits of up to 24 positions" in line

    def test_an_adapter_without_a_base(self, here, capsys, nothing, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        adapter(here / "adapter", here / "a", "no-such-org/no-such-model")
        line = one_line(capsys, score(candidates=["adapter"]))
        assert "names 'no-such-org/no-such-model' as its base" in line and "--base" in line

    def test_an_adapter_with_one(self, here, capsys):
        adapter(here / "adapter", here / "a", "no-such-org/no-such-model")
        assert score("--base", "a", candidates=["adapter"]) == 0
        assert "candidate  adapter (float32)" in capsys.readouterr().out

    def test_a_disk_that_fills_up_costs_the_file_alone(self, here, capsys, monkeypatch):
        def full(self, path):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(KLTable, "save", full)
        code = score("--table", "t.safetensors")
        assert "95% interval" in (captured := capsys.readouterr()).out
        assert code == 1 and captured.err.endswith("cannot be written: No space left on device\n")

    def test_an_interrupt_promises_no_trials(self, capsys, monkeypatch):
        from heretic_kl.cli.score import run as score_command

        def interrupted(arguments, prompts, observer):
            raise KeyboardInterrupt

        monkeypatch.setattr(score_command, "_measure", interrupted)
        assert score() == 130
        assert capsys.readouterr().err == "\nheretic-kl: interrupted\n"
