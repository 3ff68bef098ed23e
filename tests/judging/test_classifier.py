"""A text classifier as a judge: labels, safetensors, no code, the model's own words."""

import json

import pytest
import torch

from heretic_kl.errors import ConfigError, HereticKLError, ScorerError
from heretic_kl.judging import TextClassifier, check_judge
from heretic_kl.judging.judgement import SAMPLES
from heretic_kl.prompts import Prompt
from heretic_kl.testing import WORDS, save_tiny_classifier, save_tiny_model, tiny_llama

LABELS = {"LABEL_0": "answered", "LABEL_1": "refusal", "LABEL_2": "evasion"}
TEXTS = [" ".join(WORDS[n : n + 2 + n % 7]) for n in range(0, len(WORDS), 2)] + ["x " * 900]
PAIRS = [(Prompt(f"tell me {n}"), text) for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_classifier(tmp_path_factory.mktemp("c") / "c", labels=3)


def load(folder, labels=LABELS, **options):
    return TextClassifier.load(str(folder), labels=labels, **options)


@pytest.mark.parametrize("reads_prompt", [False, True])
def test_it_says_what_the_model_says_alone_and_in_batches(folder, reads_prompt):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    judge = load(folder, reads_prompt=reads_prompt)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt, text in PAIRS:
        parts = (prompt.user, text) if reads_prompt else (text,)
        ids = tokenizer(*parts, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            expected.append(LABELS[f"LABEL_{int(model(**ids).logits.argmax())}"])
    assert len(set(expected)) > 1
    assert [j.verdict for j in judge.judge(PAIRS)] == expected
    assert [judge.judge([pair])[0].verdict for pair in PAIRS] == expected


def test_nothing_is_sent_and_nothing_costs(folder):
    (judgement,) = load(folder).judge(PAIRS[:1])
    assert (judgement.requests, judgement.prompt_tokens, judgement.problem) == (0, 0, "")


def test_numbers_that_are_none_are_no_verdict(folder):
    judge = load(folder)
    judge.model.score.weight.data.fill_(float("nan"))
    assert {j.verdict for j in judge.judge(PAIRS)} == {None}


def test_labels_that_are_verdicts_need_no_map(folder, tmp_path):
    named = save_tiny_classifier(tmp_path / "n", labels=["Answered", "REFUSAL"])
    assert load(named, labels={}).verdicts == ("answered", "refusal")
    assert load(named, labels={"REFUSAL": "evasion"}).verdicts == ("answered", "evasion")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({**LABELS, "LABEL_7": "refusal"}, "labels.LABEL_7: .* has no such label; it has LABEL_0"),
        ({"LABEL_0": "answered"}, "label 'LABEL_1' of .* has no verdict"),
        (dict.fromkeys(LABELS, "answered"), "one must be answered and another one not"),
        (dict.fromkeys(LABELS, "refusal"), "one must be answered and another one not"),
    ],
)
def test_wrong_labels_are_one_line(folder, labels, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder, labels=labels)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_used_is_one_line(folder, tmp_path):
    causal = save_tiny_model(tmp_path / "causal", tiny_llama())
    pickled = save_tiny_classifier(tmp_path / "pickled", labels=3)
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    broken = save_tiny_classifier(tmp_path / "broken", labels=3)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    for source, message in (
        (tmp_path / "nowhere", "nowhere"),
        (bare, "holds no config.json"),
        (causal, "is no text classifier"),
        (pickled, "has no safetensors weights"),
        (broken, "broken"),
    ):
        labels = {"LABEL_0": "answered", "LABEL_1": "refusal"} if source == causal else LABELS
        with pytest.raises(HereticKLError, match=message) as caught:
            load(source, labels=labels)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="device = 'cuda:99' cannot be used"):
        load(folder, device="cuda:99")


def test_code_of_a_classifier_is_never_run(tmp_path):
    folder = save_tiny_classifier(tmp_path / "c", labels=3)
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Config: pass\n"
    (folder / "code.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModelForSequenceClassification", "AutoTokenizer")
    config |= {"model_type": "strange", "auto_map": dict.fromkeys(names, "code.Config")}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HereticKLError, match="never run for a judge"):
        load(folder)
    assert not ran.exists()


def test_it_is_known_by_its_content(folder, tmp_path):
    again = save_tiny_classifier(tmp_path / "again", labels=3)
    other = save_tiny_classifier(tmp_path / "other", labels=3, seed=1)
    identities = [load(place).identity for place in (folder, again, other)]
    assert identities[0] == identities[1] != identities[2]
    assert len(identities[0]) == 64


def test_a_random_classifier_fails_the_check_and_a_fitted_one_passes(folder):
    judge = load(folder)
    with pytest.raises(ScorerError, match=r"judge .* says \w+ of .*, which is \w+: use another"):
        check_judge(judge)
    fit(judge, [verdict for _, verdict in SAMPLES])
    check_judge(judge)


def fit(judge, verdicts):
    """Set the head so that the samples get these verdicts: two equations a label."""
    states = []
    for (_, text), _ in SAMPLES:
        ids = judge.tokenizer([text], return_tensors="pt")
        states.append(judge.model.model(**ids).last_hidden_state[0, -1])
    wanted = torch.tensor([[float(v == verdict) for v in judge.verdicts] for verdict in verdicts])
    solution = torch.linalg.lstsq(torch.stack(states), wanted, driver="gelsd").solution
    judge.model.score.weight.data = solution.T.contiguous()
