"""`heretic-kl score`: what it measures, prints and writes, and what it refuses in one line."""

import json

import pytest
import torch
import yaml
from score_documents import as_documented
from score_runs import PROMPTS, adapter, one_line, score

from heretic_kl.kl import METRIC_VERSION, KLTable
from heretic_kl.kl.head import REFERENCE_KIND
from heretic_kl.kl.storage import load_tensors, save_tensors


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

    def test_evaluation_results_of_a_text_that_the_hub_has(self, here, capsys):
        (here / "wiki.txt").write_text("make a cake and tell me about Rome please " * 9)
        words = ["--text", "wiki.txt", "--context", "12", "--stride", "6", "--quiet"]
        words += ["--hub-metadata", "h.yaml", "--hub-dataset", "org/wiki"]
        assert score(*words, prompts=()) == 0
        [entry] = yaml.safe_load((here / "h.yaml").read_text())
        assert entry["dataset"] == {"id": "org/wiki", "task_id": "teacher_forced_kl"}
        assert "last 6 positions of" in entry["notes"] and "windows" in entry["notes"]

    def test_the_panel_is_named_with_its_version(self, here, capsys):
        words = ["--prompts", "builtin:panel", "--prompts.limit", "2", "--kl-tokens", "1"]
        words += ["--json", "o.json", "--hub-metadata", "h.yaml", "--hub-dataset", "org/panel"]
        assert score(*words, prompts=()) == 0
        plain = json.loads((here / "o.json").read_text())
        as_documented(plain)
        assert plain["prompts"]["version"] == 1
        shown = f"builtin:panel test, version 1 ({plain['prompts']['sha256'][:12]})"
        assert shown in capsys.readouterr().out
        assert score(*words[:6], "--hub-metadata", "h.md", prompts=()) == 0
        assert "2 of builtin:panel, version 1" in (here / "h.md").read_text()

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
            (["--refusal-prompts", "p.txt"], "--refusal-prompts has no effect with --text"),
        ],
    )
    def test_flags_that_do_not_fit_are_refused(self, words, more, expected, capsys, nothing):
        assert expected in one_line(capsys, score(*words, *more, prompts=()), 2)

    def test_the_reference_is_stored_too(self, words, here, capsys):
        keep = ["--save-reference", "r.safetensors", "--store", "head", "--json", "-"]
        assert score(*words, *keep, candidates=["b"], prompts=()) == 0
        out, err = capsys.readouterr()
        before = json.loads(out)
        megabytes = (here / "r.safetensors").stat().st_size / 1e6
        assert f"stored the reference in r.safetensors: {megabytes:.3g} MB" in err
        stored = {"reference": "r.safetensors", "prompts": ()}
        assert score(*words, "--json", "-", candidates=["b"], **stored) == 0
        after = json.loads(capsys.readouterr().out)
        assert after["candidates"] == before["candidates"] and after["text"] == before["text"]
        assert after["reference"]["stored"] and not before["reference"]["stored"]
        assert after["reference"]["model"] == "a" and "batch_size" not in after["settings"]
        assert after["settings"]["context"] == 16
        as_documented(after)
        line = one_line(capsys, score(*words[:-1], "4", **stored))
        assert "another stride (stored 8, now 4)" in line
        assert "name the same files with --text" in one_line(capsys, score(**stored))
        code = score(*words, "--bands", **stored)
        assert "--bands has no effect on a stored reference" in one_line(capsys, code, 2)
        code = score("--text", "wiki.raw", "--write-llama-base", "k", **stored)
        line = one_line(capsys, code, 2)
        assert "--write-llama-base has no effect on a stored reference" in line
        keep = ["--save-reference", "s.safetensors", "--write-llama-base", "k"]
        line = one_line(capsys, score("--text", "wiki.raw", *keep, prompts=()), 2)
        assert "--save-reference has no effect with --write-llama-base" in line

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
        (here / "x.gguf").write_bytes(b"GGUF" + bytes([3, *[0] * 19]))
        code = score("--backend", "llama.cpp", candidates=["a", "x.gguf"], **words)
        assert "--store head" in one_line(capsys, code)  # before the first is measured

    def test_text_is_by_the_first_tokenizer_that_there_is(self, here, capsys):
        assert score("--save-reference", "r.safetensors", candidates=["a"]) == 0
        adapter(here / "bare", "a", "a")
        words = {"reference": "r.safetensors", "prompts": (), "candidates": ["bare", "a"]}
        capsys.readouterr()
        assert score("--worst", "1", **words) == 0
        assert "<|start|> user" in capsys.readouterr().out

    def test_a_damaged_one_is_refused_before_a_candidate_is_loaded(self, here, capsys, request):
        assert score("--save-reference", "r.safetensors", "--store", "head") == 0
        tensors, facts = load_tensors("r.safetensors", REFERENCE_KIND)
        head, _ = load_tensors("r.safetensors", REFERENCE_KIND, "head")
        tensors |= {"head.numbers": head["numbers"], "head.weight": 2 * head["weight"]}
        save_tensors("r.safetensors", REFERENCE_KIND, tensors, facts)
        request.getfixturevalue("nothing")
        line = one_line(capsys, score(reference="r.safetensors", prompts=()))
        assert "r.safetensors is damaged: its head is not the one" in line

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
