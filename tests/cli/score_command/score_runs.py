"""Small models and calls of `heretic-kl score` that several tests share."""

import json
import warnings
from pathlib import Path

from heretic_kl.cli import main as cli

ROOT = Path(__file__).parents[3]
PROMPTS = "make a cake\ntell me about Rome\nwait please\nhow do I make a cake\nmix flour\nsorry\n"


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
