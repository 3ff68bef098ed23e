"""`heretic-kl inspect` on models of several kinds."""

import json

import pytest

from heretic_kl.cli import main as cli
from heretic_kl.testing import save_tiny_model, tiny_gemma2, tiny_llama, tiny_tokenizer
from heretic_kl.testing.zoo import tiny_model


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(folder, model_type):
    tiny_model(model_type).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def inspected(capsys, *words):
    assert cli.main(["inspect", *words, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dense_model_as_tables(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "llama", tiny_llama())
    assert cli.main(["inspect", str(folder), "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    for line in ("self_attn.o_proj  attention  0-2", "mlp.down_proj     mlp        0-2"):
        assert line in shown
    assert "norm modes            none, row, normalized_row" in shown
    assert "saving                merged or as an adapter" in shown


def test_json_to_a_file_beside_the_tables(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "gemma", tiny_gemma2())
    assert cli.main(["inspect", str(folder), "--json=out.json"]) == 0
    assert "a norm or scale" in capsys.readouterr().out
    inspection = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert inspection["layers"] == 3 and inspection["residue"] < 1e-5
    assert {(group["place"], group["gains"]) for group in inspection["sites"]} == {
        ("self_attn.o_proj", 1),
        ("mlp.down_proj", 1),
    }


def test_a_mixture_of_experts(tmp_path, capsys):
    inspection = inspected(capsys, saved(tmp_path / "moe", "qwen3_moe"))
    (experts,) = (group for group in inspection["sites"] if group["place"] == "mlp.experts")
    assert [(t["name"], t["axis"]) for t in experts["tensors"]] == [("down_proj", 1)]
    assert "many experts in one tensor" in inspection["norm_problem"]
    assert inspection["residue"] < 1e-5


def test_a_hybrid(tmp_path, capsys):
    inspection = inspected(capsys, saved(tmp_path / "hybrid", "nemotron_h"))
    components = {group["place"]: group["component"] for group in inspection["sites"]}
    assert components["mixer.out_proj"] == components["mixer.o_proj"] == "attention"
    assert components["mixer.experts"] == components["mixer.shared_experts.down_proj"] == "mlp"


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bert", "attends in both directions"),
        ("openai-gpt", "changes the residual stream even with"),
        ("rwkv", "changes the residual stream even with"),
        ("reformer", "a second state of the residual stream's width"),
    ],
)
def test_what_cannot_be_edited_is_one_line(tmp_path, capsys, model_type, reason):
    assert cli.main(["inspect", saved(tmp_path / "m", model_type)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and reason in errors[0]


def test_an_encoder_decoder_is_refused(tmp_path, capsys):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    assert cli.main(["inspect", str(tmp_path / "t5")]) == 1
    assert "(t5) is an encoder-decoder; only decoder-only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "no model given; usage: heretic-kl inspect MODEL"),
        (["m", "--json="], "json_file must be a path"),
        (["m", "--json", "gone/out.json"], "there is no folder 'gone'"),
        (["m", "--dtyp", "auto"], "did you mean --dtype?"),
        (["./nothing"], "no model at './nothing'"),
    ],
)
def test_mistakes(capsys, words, error):
    assert cli.main(["inspect", *words]) in (1, 2)
    assert error in capsys.readouterr().err


def test_help(capsys):
    assert cli.main(["inspect", "--help"]) == 0
    assert "--json FILE" in capsys.readouterr().out
