"""`heretic-kl score`: what it measures, prints and writes, and what it refuses in one line."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import jsonschema
import pytest
import torch

from heretic_kl.cli import main as cli
from heretic_kl.cli.score.settings import read_score_settings
from heretic_kl.kl import METRIC_VERSION, KLTable
from heretic_kl.testing import save_tiny_model, tiny_llama

ROOT = Path(__file__).parents[2]
PROMPTS = "make a cake\ntell me about Rome\nwait please\nhow do I make a cake\nmix flour\nsorry\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "a", tiny_llama())
    save_tiny_model(folder / "b", tiny_llama(), seed=1)
    save_tiny_model(folder / "stranger", tiny_llama())
    file = folder / "stranger" / "tokenizer.json"
    file.write_text(file.read_text().replace('"weather"', '"climate"'))
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, models):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text(PROMPTS)
    for name in ("a", "b", "stranger"):
        (tmp_path / name).symlink_to(models / name)
    return tmp_path


def score(*words, reference="a", candidates=("b",), prompts=("--prompts", "p.txt")):
    named = [word for name in candidates for word in ("--candidate", str(name))]
    tokens = ["--kl-tokens", "3"] if prompts else []
    fixed = ["--reference", str(reference), *named, *prompts, *tokens, "--device", "cpu"]
    return cli.main(["score", *fixed, *map(str, words)])


def one_line(capsys, code, expected_code=1):
    captured = capsys.readouterr()
    assert code == expected_code, captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("heretic-kl: error:")]
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err + captured.out
    return errors[0]


class TestResults:
    def test_tables_on_stdout_progress_on_stderr(self, capsys):
        assert score() == 0
        out, err = capsys.readouterr()
        assert out.startswith("What was compared\n  reference  a (float32)\n")
        assert "6 prompts of p.txt" in out and "95% interval" in out
        assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
        assert "Measuring the reference a" in err and "Measuring" not in out

    def test_quiet_keeps_notices(self, capsys, here):
        (here / "bare").symlink_to("a")
        assert score("--quiet", "--chat-template", "none") == 0
        assert capsys.readouterr().err == ""

    def test_a_model_against_itself_is_zero_everywhere(self, capsys):
        assert score("--json", "-", candidates=["a"]) == 0
        [found] = json.loads(capsys.readouterr().out)["candidates"]
        assert found["mean"] == found["standard_error"] == found["median"] == 0.0
        assert found["interval"] == {"low": 0.0, "high": 0.0}
        assert found["top1_agreement"] == 1.0 and found["mean_probability_change"] == 0.0
        assert found["near_tie_share"] == 0.0 and found["infinite_count"] == 0
        assert all(place["mean"] == 0.0 for place in found["profile"])
        assert found["below_noise_floor"] is True
        assert score(candidates=["a"]) == 0
        assert "below the noise floor" in capsys.readouterr().out

    def test_batch_sizes_agree(self, capsys):
        means = []
        for size in (1, 4):
            assert score("--json", "-", "--batch-size", size, "--dtype", "float32") == 0
            means.append(json.loads(capsys.readouterr().out)["candidates"][0]["mean"])
        assert means[0] == pytest.approx(means[1], abs=1e-6)

    def test_several_candidates_are_paired_with_the_first(self, capsys, here):
        words = ["--json", "out/o.json", "--table", "out/t.safetensors"]
        assert score(*words, candidates=["b", "a", "b"]) == 0
        out = capsys.readouterr().out
        assert "Minus candidate 1, paired by prompt" in out and "distinguishable" in out
        plain = json.loads((here / "out/o.json").read_text())
        first, second, third = plain["candidates"]
        assert first["against_first"] is None
        assert second["against_first"]["mean_difference"] == pytest.approx(-first["mean"])
        assert third["against_first"]["mean_difference"] == 0.0
        assert not third["against_first"]["distinguishable"]
        tables = sorted(path.name for path in (here / "out").glob("t*"))
        assert tables == [f"t-{n}.safetensors" for n in (1, 2, 3)]
        assert KLTable.load(here / "out/t-2.safetensors").values.sum() == 0.0

    def test_json_states_what_is_needed_to_do_it_again(self, here, capsys):
        words = ["--response", "sampled(3)", "--prompts.limit", "4", "--prompts.system", "wait"]
        assert (
            score(*words, "--temperature", "0.7", "--divergence", "reverse_kl", "--json", "o.json")
            == 0
        )
        text = (here / "o.json").read_text()
        assert "NaN" not in text and "Infinity" not in text
        plain = json.loads(text)
        assert plain["reference"]["name"] == "a" and plain["candidates"][0]["name"] == "b"
        assert (plain["response"], plain["divergence"], plain["temperature"]) == (
            "sampled(3)",
            "reverse_kl",
            0.7,
        )
        assert plain["prompts"]["count"] == 4 and len(plain["prompts"]["sha256"]) == 64
        assert plain["settings"]["prompts"]["system"] == "wait"
        assert (
            plain["versions"]["torch"] == torch.__version__
            and plain["metric_version"] == METRIC_VERSION
        )
        assert plain["date"].startswith("20") and plain["failure"] is None
        as_documented(plain)
        assert "sampled(3), of the reference" in capsys.readouterr().out

    def test_the_worst_places_are_named(self, here, capsys):
        assert score("--worst", 2, "--json", "o.json", candidates=["b", "a"]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert "Worst prompts of candidate 1" in out and "Worst positions of candidate 2" in out
        first, second = json.loads((here / "o.json").read_text())["candidates"]
        worst = first["worst_prompts"][0]
        assert PROMPTS.splitlines()[worst["prompt"] - 1] == worst["text"]
        assert f"{worst['kl']:.3g}" in out and len(first["worst_positions"]) == 2
        assert second["worst_positions"][0]["kl"] == 0.0
        assert "loss in log p(token)" in out and "Change of p(token)" in out
        as_documented(json.loads((here / "o.json").read_text()))
        assert second["change"]["loss"]["mean"] == 0.0 == second["change"]["buckets"][0]["change"]

    def test_the_split_by_refusal(self, here, capsys, monkeypatch):
        from heretic_kl.score import teacher_forced_kl

        words = ["--refusal-prompts", "p.txt", "--json", "o.json", "--quiet"]
        assert score(*words) == 0
        assert "refuses none of 12 prompts: the KL is not split" in capsys.readouterr().err
        assert json.loads((here / "o.json").read_text())["candidates"][0]["split"] is None
        monkeypatch.setattr(teacher_forced_kl, "find_openers", lambda *words: (5, 9))
        assert score(*words, "--save-reference", "r.safetensors") == 0
        assert "KL of refusing or not" in capsys.readouterr().out
        as_documented(json.loads((here / "o.json").read_text()))
        [shown] = json.loads((here / "o.json").read_text())["candidates"]
        parts = [shown["split"][name]["mean"] for name in ("behaviour", "remainder")]
        assert sum(parts) == pytest.approx(shown["mean"], rel=1e-9)

    def test_every_file_of_many_candidates(self, here, capsys):
        words = ["--bands", "--plot", "out/p.png", "--html", "o.html", "--ranking", "r.csv"]
        words += ["--hub-metadata", "h.md", "--json", "o.json", "--save-reference", "r.safetensors"]
        assert score(*words, candidates=["b", "a"]) == 0
        out = capsys.readouterr().out
        assert "8 bits, blocks of 32" in out and "-bit rounding of this model; floor" in out
        assert (here / "out/p.png").read_bytes().startswith(b"\x89PNG")
        plain = json.loads((here / "o.json").read_text())
        as_documented(plain)
        assert [row["candidate"] for row in plain["ranking"]] == ["a", "b"]
        assert plain["candidates"][0]["verdict"] in out
        page = (here / "o.html").read_text()
        for shown in (plain["candidates"][0]["verdict"], "figure-size", "8 bits, blocks of 32"):
            assert shown in page
        assert "Nearest to the reference first" in page and "from heretic-kl score." in page
        assert str(plain["candidates"][1]["mean"]) in (here / "h-2.md").read_text()
        assert (here / "r.csv").read_text().count("\n") == 3
        assert score(reference="r.safetensors", candidates=["a"], prompts=()) == 0
        assert "8 bits, blocks of 32" in capsys.readouterr().out  # kept with the reference

    def test_one_file_with_the_harness_s_results(self, here, capsys):
        (here / "lm.json").write_text('{"results": {"arc": {"acc,none": 0.5}}}')
        assert score("--hub-metadata", "h.json", "--lm-eval", "lm.json", "--quiet") == 0
        merged = json.loads((here / "h.json").read_text())["results"]
        assert merged["arc"] == {"acc,none": 0.5} and merged["teacher_forced_kl"]["kl,none"] > 0

    def test_one_table_takes_the_name_as_it_is(self, here):
        assert score("--table", "t.safetensors", "--threads", 1) == 0
        assert KLTable.load(here / "t.safetensors").prompts == 6

    def test_candidates_in_another_dtype(self, capsys):
        assert score("--candidate-dtype", "bfloat16", candidates=["a"]) == 0
        out = capsys.readouterr().out
        assert "candidate  a (bfloat16)" in out and "Dtypes differ" in out

    def test_what_was_measured_before_a_failure_is_kept(self, here, capsys, monkeypatch):
        from heretic_kl.score import TeacherForcedKL

        real = TeacherForcedKL.score

        def failing(self, candidate, **options):
            if candidate == "a":
                raise torch.OutOfMemoryError
            return real(self, candidate, **options)

        monkeypatch.setattr(TeacherForcedKL, "score", failing)
        assert score("--json", "o.json", candidates=["b", "a"]) == 1
        out, err = capsys.readouterr()
        assert "candidate  b" in out and "out of memory while 'a' was measured" in err
        plain = json.loads((here / "o.json").read_text())
        assert len(plain["candidates"]) == 1 and "out of memory" in plain["failure"]


class TestText:
    @pytest.fixture
    def words(self, here):
        (here / "wiki.raw").write_text(PROMPTS.replace("\n", " ") * 4)
        rows = [{"text": line, "category": "ask"} for line in PROMPTS.splitlines()[:4]]
        (here / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return ["--text", "wiki.raw", "--text", "t.jsonl", "--context", "16", "--stride", "8"]

    def test_a_table_by_file_and_category(self, words, here, capsys):
        assert score(*words, "--json", "o.json", candidates=["b", "a"], prompts=()) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80 and "by position" not in out
        assert "16 of 16 tokens" not in out and "of 16 tokens, the last 8 of each scored" in out
        shown = [line.split() for line in out.splitlines()]
        groups = {line[0]: line for line in shown if line[:1] in (["wiki.raw"], ["ask"])}
        plain = json.loads((here / "o.json").read_text())
        first, second = plain["candidates"]
        by_name = {group["name"]: group for group in first["groups"]}
        for name, line in groups.items():
            assert line[1] == f"{by_name[name]['mean']:.4g}"
        assert len(groups) == 2 and any(line[:1] == ["macro-average"] for line in shown)
        assert second["mean"] == 0.0 and "paired by cluster" in out
        assert plain["text"]["files"] == ["wiki.raw", "t.jsonl"] and "prompts" not in plain
        assert plain["settings"]["stride"] == 8
        as_documented(plain)

    @pytest.mark.parametrize(
        ("more", "expected"),
        [
            (["--stride", "16"], "--stride 16 must be less than --context 16"),
            (["--prompts", "p.txt"], "--prompts has no effect with --text"),
            (["--save-reference", "r.safetensors"], "--save-reference has no effect with --text"),
            (["--refusal-prompts", "p.txt"], "--refusal-prompts has no effect with --text"),
        ],
    )
    def test_flags_that_do_not_fit_are_refused(self, words, more, expected, capsys, nothing):
        assert expected in one_line(capsys, score(*words, *more, prompts=()), 2)

    def test_window_flags_need_text(self, capsys, nothing):
        line = one_line(capsys, score("--stride", "8"), 2)
        assert "--stride has no effect without --text FILE" in line

    def test_text_is_checked_before_anything_runs(self, capsys, nothing):
        line = one_line(capsys, score("--text", "gone.txt", prompts=()))
        assert "gone.txt: no such text file" in line


class TestStoredReferences:
    def test_they_measure_as_the_model_did(self, here, capsys):
        assert score("--save-reference", "r.safetensors", "--json", "-", candidates=["a"]) == 0
        before = json.loads(capsys.readouterr().out)
        words = {"reference": "r.safetensors", "prompts": ()}
        assert score("--json", "-", candidates=["a"], **words) == 0
        after = json.loads(capsys.readouterr().out)
        assert after["candidates"] == before["candidates"]
        assert after["prompts"]["sha256"] == before["prompts"]["sha256"]
        assert after["reference"]["model"] == "a" and after["reference"]["stored"]
        assert "batch_size" not in after["settings"]
        assert score("--worst", "1", candidates=["a"], **words) == 0
        out = capsys.readouterr().out
        assert "r.safetensors, stored from a (float32)" in out
        assert "<|start|> user" in out  # text by the candidate's tokenizer
        assert "another head" in one_line(capsys, score(candidates=["b"], **words))

    def test_logits_measure_any_head(self, here, capsys):
        assert score("--save-reference", "r.safetensors", "--store", "logits") == 0
        assert score(reference="r.safetensors", prompts=()) == 0

    @pytest.mark.parametrize(
        "flag",
        [
            "--kl-tokens 3",
            "--prompts p.txt",
            "--prompts.limit 3",
            "--divergence forward_kl",
            "--temperature 1",
        ]
        + ["--response greedy", "--chat-template none", "--response-prefix x", "--dtype float32"]
        + [
            "--bands",
            "--refusal-prompts builtin:harmful",
            "--batch-size 4",
            "--no-noise-floor",
            "--save-reference s.safetensors",
        ],
    )
    def test_flags_without_effect_are_refused(self, here, capsys, flag):
        code = score(*flag.split(), reference="r.safetensors", prompts=())
        line = one_line(capsys, code, 2)
        shown = flag.split()[0].replace(".limit", "")
        assert f"{shown} has no effect on a stored reference" in line

    def test_a_file_that_is_none(self, here, capsys):
        (here / "r.safetensors").write_text("x")
        line = one_line(capsys, score(reference="r.safetensors", prompts=()))
        assert "cannot be read" in line
        line = one_line(capsys, score(reference="gone.safetensors", prompts=()))
        assert "there is no heretic-kl reference file" in line


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


def as_documented(plain):
    """Check a document against docs/score.schema.json, which knows every key."""
    schema = json.loads((ROOT / "docs" / "score.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(plain)


@pytest.fixture
def nothing(monkeypatch):
    """No weights may be loaded."""
    from heretic_kl.score import loader

    def loaded(*words, **options):
        raise AssertionError("a model was loaded before everything was checked")

    monkeypatch.setattr(loader, "load_to_measure", loaded)


def adapter(folder, model, base):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(model)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(loaded, config).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
