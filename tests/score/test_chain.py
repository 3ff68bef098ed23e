"""Several models: step by step, and in order of their KL."""

import csv
import io
import json
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic_kl.cli import main as cli
from heretic_kl.score import Comparison, Document, TeacherForcedKL, TextKL, measure_chain, rank
from heretic_kl.testing import WORDS, save_tiny_model, tiny_llama

DOCS = Path(__file__).parents[2] / "docs"
PROMPTS = ["make a cake", "tell me about Rome", "wait please", "how do I make a cake", "mix flour"]
PROMPTS += ["sorry", "what do you know"]


def nudged(original, folder, amounts):
    """The original with its head moved along fixed random directions, by these amounts."""
    save_tiny_model(folder, tiny_llama())
    tensors = load_file(original / "model.safetensors")
    for seed, amount in enumerate(amounts):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(tensors["lm_head.weight"].shape, generator=generator)
        tensors["lm_head.weight"] += amount * noise
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def edited(original, tmp_path_factory):
    return nudged(original, tmp_path_factory.mktemp("models") / "edited", [0.05])


@pytest.fixture(scope="module")
def edited_twice(original, tmp_path_factory):
    return nudged(original, tmp_path_factory.mktemp("models") / "twice", [0.05, 0.03])


@pytest.fixture(scope="module")
def kl(original):
    return TeacherForcedKL(original, prompts=PROMPTS, kl_tokens=4, dtype="float32")


class TestChain:
    def test_a_step_is_measured_from_the_model_before_it(self, kl, original, edited, edited_twice):
        models = [edited, edited_twice]
        chain = measure_chain(kl, models, [kl.score(model) for model in models])
        places = [(pair.earlier, pair.later, pair.is_step) for pair in chain.pairs]
        assert places == [(0, 1, True), (0, 2, False), (1, 2, True)]
        step = chain.pairs[2].measurement
        # The same prompts and responses, now from the edited model to the next one.
        one, two = (load_file(model / "model.safetensors")["lm_head.weight"] for model in models)
        hidden = kl.reference.hidden  # the body is the same in all three
        p, q = ((hidden @ weight.T).double().log_softmax(-1) for weight in (one, two))
        expected = (p.exp() * (p - q)).sum(-1)
        assert torch.allclose(step.table.values[step.table.mask], expected, rtol=1e-4, atol=1e-9)
        assert chain.whole is chain.pairs[1].measurement
        assert chain.sum_of_steps == chain.pairs[0].measurement.kl + step.kl
        beyond = chain.beyond_the_steps()
        assert beyond.mean_difference == pytest.approx(chain.whole.kl - chain.sum_of_steps)

    def test_a_step_back_takes_all_of_it_back(self, kl, original, edited):
        models = [edited, original]
        chain = measure_chain(kl, models, [kl.score(model) for model in models])
        assert chain.whole.kl == 0.0 and chain.sum_of_steps > 0.0
        beyond = chain.beyond_the_steps()
        assert beyond.distinguishable
        assert beyond.mean_difference == pytest.approx(-chain.sum_of_steps)

    def test_over_text(self, original, edited, edited_twice):
        text = [Document(" ".join(WORDS * 3), "words")]
        kl = TextKL(original, text, context=20, stride=10, dtype="float32")
        chain = measure_chain(
            kl, [edited, edited_twice], [kl.score(edited), kl.score(edited_twice)]
        )
        assert len(chain.pairs) == 3 and chain.pairs[2].measurement.groups[0].name == "words"


class TestRanking:
    def test_the_nearest_is_first_and_equals_share_a_letter(self, kl, edited, edited_twice, other):
        names = [str(other), str(edited_twice), str(edited), str(edited)]
        ranked = rank(names, [kl.score(name) for name in names])
        assert [Path(line.name).name for line in ranked] == ["edited", "edited", "twice", "other"]
        assert [line.group for line in ranked] == ["a", "a", "b", "c"]
        assert ranked[0].beyond_best is None and ranked[1].beyond_best.mean_difference == 0.0
        best, last = ranked[0].measurement.kl, ranked[3].measurement.kl
        assert ranked[3].beyond_best.mean_difference == pytest.approx(last - best)

    def test_files(self, kl, edited, other):
        names = [str(other), str(edited)]
        ranked = rank(names, [kl.score(name) for name in names])
        comparison = Comparison(ranked)
        rows = list(csv.DictReader(io.StringIO(comparison.to_csv())))
        assert [row["candidate"] for row in rows] == [str(edited), str(other)]
        assert float(rows[1]["kl"]) == ranked[1].measurement.kl
        assert rows[0]["beyond_best"] == "" and rows[1]["distinguishable"] == "True"
        head, rule, first, second = comparison.to_markdown().splitlines()
        assert head.startswith("| group | candidate |") and set(rule) == set("| -")
        assert first.startswith("| a | edited |") and second.startswith("| b | other |")


class TestCommand:
    def run(self, *words):
        return cli.main(["score", "--kl-tokens", "2", "--prompts.limit", "7", *map(str, words)])

    def test_chain_and_ranking(self, original, edited, edited_twice, tmp_path, capsys):
        target = tmp_path / "o.json"
        words = ["--chain", original, edited, edited_twice, "--json", target]
        assert self.run(*words, "--ranking", tmp_path / "r.md", "--bands") == 0
        out = capsys.readouterr().out
        assert "From step to step, nats" in out and "whole minus steps" in out
        assert "Nearest to the reference first" in out
        schema = json.loads((DOCS / "score.schema.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(json.loads(target.read_text()))
        chain = json.loads(target.read_text())["chain"]
        assert [(pair["from"], pair["to"]) for pair in chain["pairs"]] == [(0, 1), (0, 2), (1, 2)]
        assert [len(pair["bands"]) for pair in chain["pairs"]] == [5, 5, 0]  # of the first model
        assert len(chain["models"]) == 3 and chain["sum_of_steps"] > 0.0
        assert (tmp_path / "r.md").read_text().count("\n") == 4

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--chain", "a", "b", "c", "--reference", "d"], "leave out --reference"),
            (["--chain", "a", "b"], "at least three models"),
            (["--chain", "a.safetensors", "b", "c"], "begins with a model"),
            (["-r", "a", "--candidate", "b", "--ranking", "r.txt"], "must end in .csv or .md"),
        ],
    )
    def test_mistakes(self, words, expected, capsys):
        assert self.run(*words) == 2
        assert expected in capsys.readouterr().err
