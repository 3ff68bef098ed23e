from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from card_facts import REFUSALS, facts
from huggingface_hub import ModelCard

from heretic_kl.ablation import LearningSettings, Refinement
from heretic_kl.errors import ExportError, printable
from heretic_kl.export import (
    CardPicture,
    LoraFacts,
    PromptFacts,
    ScoreFacts,
    add_figures,
    model_card,
    portable,
    portable_text,
    stated_license,
    write_card,
    write_reproduction,
)
from heretic_kl.scoring import Score


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter_is_yaml_with_base_licence_and_tags():
    front = front_matter(model_card(facts()))
    del front["model-index"]
    assert front == {
        "base_model": "someone/tiny",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["heretic-kl", "directional-ablation"],
    }
    front = front_matter(model_card(facts(license={}, base_is_hub_id=False, base_name="tiny")))
    assert "base_model" not in front and "license" not in front


def test_the_hub_reads_every_score_with_its_interval_and_the_metric_version():
    data = ModelCard(model_card(facts())).data
    refusals, kl = data.eval_results
    assert data.model_name == "tiny-edited"
    assert (refusals.metric_type, refusals.metric_value) == ("refusals", 0.06)
    assert refusals.metric_name == "refusals: 6/100 (6%, 3% to 12%)"
    version = facts().versions["heretic-kl"]
    assert refusals.metric_args == {
        "unit": "share",
        "interval_95": [0.03, 0.12],
        "original": 0.9,
        "heretic_kl": version,
    }
    assert refusals.dataset_name == "100 harmful test prompts (bad.txt, train[:100])"
    assert refusals.dataset_type == "bad.txt" and refusals.dataset_config == "harmful"
    assert refusals.dataset_args == {"count": 100, "sha256": "a" * 64}
    assert kl.metric_value == 0.0321
    assert kl.metric_args == {
        "unit": "nats",
        "interval_95": [0.0241, 0.0409],
        "standard_error": 0.004,
        "kl_tokens": 3,
        "metric_version": 2,
        "heretic_kl": version,
    }
    assert kl.dataset_name == "test prompts (prompts of its own)"


@pytest.mark.parametrize("saved", [None, Score(None, "unscored"), Score(float("nan"), "nan")])
def test_a_score_that_is_no_number_is_no_result(saved):
    front = front_matter(model_card(facts(scores={"refusals": ScoreFacts(None, None, saved)})))
    assert "model-index" not in front and "model_name" not in front


def test_an_adapter_says_how_near_it_comes():
    exact = model_card(facts(form="lora", lora=LoraFacts(1, True, 0.0, 0.0)))
    assert front_matter(exact)["library_name"] == "peft"
    assert front_matter(exact)["base_model_relation"] == "adapter"
    assert "rank 1) expresses the edit exactly" in exact
    assert "PeftModel.from_pretrained(model, " in exact and "original = 'someone/tiny'" in exact
    near = model_card(facts(form="lora", lora=LoraFacts(16, False, 0.123, 0.3)))
    assert "misses 12.3% of the change" in near and "30.0% of one module" in near


def test_the_card_states_cost_edit_prompts_and_limits():
    card = model_card(facts())
    assert (
        "| refusals | 90/100 (90%, 83% to 94%) | 5/100 (5%, 2% to 11%) | 6/100 (6%, 3% to 12%) |"
        in card
    )
    kl = "0.0321 ± 0.0040 nats, 0.0241 to 0.0409"
    assert f"| teacher_forced_kl | – | {kl} | {kl} |" in card
    for text in (
        "teacher-forced",
        "first 3 positions",
        "KL(original || edited)",
        "then over prompts",
        "batching and padding alone give 1.2e-09",
        "| attention | 1.25 | 14.50 | 0.3 | 9.00 |",
        "layer 12.50 (of 0 to 29)",
        "norm mode `row`",
        "Trial 17 of 30, picked by rule `knee`",
        "| `mlp_on` | False |",
        "| harmful | test | bad.txt, train[:100] | 100 | `aaaaaaaaaaaaaaaa` |",
        "phrase rule",
        "100 harmful and 90 harmless",
        "version 2 of the metric",
        "## Intended use",
        "Responsible use",
        "Seed 4",
    ):
        assert text in card, text
    assert "come from refusing or not" not in card  # it is not told apart
    assert "first 1 position are" not in card
    assert "its first 1 position are" in model_card(facts(kl_tokens=1))
    kl = facts().scores["teacher_forced_kl"]
    other = replace(kl, saved=replace(kl.saved, details={"kl_tokens": 8}))
    both = model_card(facts(scores={"code_kl": other, "teacher_forced_kl": kl}))
    assert "its first positions (`code_kl` 8, `teacher_forced_kl` 3) are compared" in both


def test_the_card_states_both_parts_of_the_kl():
    parts = {"behaviour": {"mean": 0.02, "standard_error": 0.003}}
    parts["remainder"] = {"mean": 0.0121, "standard_error": 0.004}
    scores = facts().scores["teacher_forced_kl"]
    kl = replace(scores, saved=replace(scores.saved, details=parts))
    card = model_card(facts(scores={"teacher_forced_kl": kl}))
    assert (
        "Of the saved model's `teacher_forced_kl`, 0.0200 ± 0.0030 nats come from refusing or not "
        "at the first token, and 0.0121 ± 0.0040 nats from everything else."
    ) in card


def test_the_card_of_a_learned_edit_says_what_was_learned_and_how_strong_it_was_kept():
    learned = Refinement("d" * 64, 29, 120, "direction", 1, 0.05, strength=0.9)
    card = model_card(facts(trial_number=31, edit=replace(facts().edit, refinement=learned)))
    assert "Trial 31, refined after 30 others, picked by rule `knee`" in card
    assert "From this start (trial 29) the direction of every site's operator" in card
    assert "multiplied by 0.90 afterwards" in card
    assert "stay below 0.05. All of it" in card  # an older study does not say what with
    asked = LearningSettings(100, "direction", 1, 0.1, 16, 20.0, 2.0, 7)
    card = model_card(facts(edit=replace(facts().edit, refinement=replace(learned, asked=asked))))
    stated = "KL over 16 positions at temperature 2, fixed weight 20; seed 7"
    assert f"stay below 0.05 ({stated}). All of it" in card


def test_no_path_of_this_machine_and_no_secret_reaches_card_or_file(tmp_path):
    write_card(tmp_path, facts())
    write_reproduction(tmp_path, facts())
    for name in ("README.md", "reproduce.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        for leak in ("/home", "/var/lib", "~/", "hunter2", "hf_abc", str(tmp_path), '"abc"'):
            assert leak not in text, (name, leak)
        assert platform.node() not in text or len(platform.node()) < 4


def test_text_from_elsewhere_can_hold_no_markup(tmp_path):
    bad = "\x1b[2J\x9bx<script>a|b`c\\`d\n```\n# e [f](g)"
    score = Score(0.5, bad)
    card = model_card(
        facts(
            name=bad,
            base_name=bad,
            base_is_hub_id=False,
            pick_rule=bad,
            parameters={bad: bad},
            scores={bad: ScoreFacts(score, score, score, role="minimize", kind="harmful")},
            prompts=(PromptFacts("harmful", "test", bad, 9, "a" * 64),),
            command=f"heretic-kl '{bad}'",
            license={"license_name": bad},
        )
    )
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    card = add_figures(tmp_path, [CardPicture("p", b"", bad, bad)])[0].read_text(encoding="utf-8")
    assert printable(card) == card
    _, front, text = card.split("---\n", 2)
    before, command, after = text.split("\n````\n")
    around = before + after
    assert "<script" not in front + around and "&lt;script&gt;" in around
    assert "\n# e" not in around and "\n# e" in command
    for line in around.splitlines():
        marks = re.sub(r"\\.", "", line)  # what is escaped is none
        assert marks.count("`") % 2 == 0 or line.startswith("```")
        assert "](g" not in re.sub("`[^`]*`", "", line)
        assert marks.count("|") in (0, 3, 5, 6) or "KL(original || edited)" in line


def test_rendering_is_pure():
    assert model_card(facts()) == model_card(facts())
    assert not re.search(r"\d{4}-\d{2}-\d{2}", model_card(facts()))


def test_the_reproduction_file_holds_what_a_rerun_needs(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    write_card(tmp_path, facts())
    path = write_reproduction(tmp_path, facts(lora=LoraFacts(1, True, 0.0, 0.0)))
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["trial"]["parameters"] == {"attention_peak": 1.25, "mlp_on": False}
    assert content["trial"]["edit"] == {
        "direction_position": 12.5,
        "norm": "row",
        "refinement": None,
        "kernels": {
            "attention": {
                "peak_weight": 1.25,
                "peak_position": 14.5,
                "floor_weight": 0.3,
                "reach": 9.0,
            }
        },
    }
    saved = content["test_scores"]["refusals"]["saved"]
    assert Score.from_dict(saved) == REFUSALS[2]
    assert content["test_scores"]["teacher_forced_kl"]["trial"]["details"] == {"worst": "inf"}
    assert content["settings"]["model"] == "tiny"
    assert content["settings"]["response_prefix"] == "/no_think"
    assert content["settings"]["api_token"] == "***"
    assert content["settings"]["storage"] == "postgresql://***@db/studies"
    assert content["prompts"][1]["sha256"] == "b" * 64
    assert content["measurement"]["metric_version"] == 2
    assert content["test_scores"]["refusals"].keys() == {"original", "trial", "saved"}
    assert content["seed"] == 4
    assert {"python", "torch", "transformers", "optuna", "heretic-kl"} <= set(content["versions"])
    assert content["files"] == {
        "model.safetensors": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()},
        "sub/a.txt": {"bytes": 1, "sha256": hashlib.sha256(b"a").hexdigest()},
    }
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--model /srv/models/tiny --kl-tokens 3", "--model tiny --kl-tokens 3"),
        ("--save=/a/b/c/", "--save=c"),
        ("--model '/home/Jo Do/c' x", "--model 'c' x"),
        ("~/x/y and ~me/z", "y and z"),
        (r"C:\Users\me\m.gguf", "m.gguf"),
        (r"\\server\share\m", "m"),
        ("https://host/a/b and org/model", "https://host/a/b and org/model"),
        ("3/64 (5%) and/or ./rel/path ../up/x", "3/64 (5%) and/or ./rel/path ../up/x"),
        ("sqlite:////var/s.db sqlite:///rel/s.db", "sqlite:///s.db sqlite:///s.db"),
        ("--hub-token abc --api-key=x", "--hub-token *** --api-key=***"),
        ("train[:100] a / b", "train[:100] a / b"),
        ("next-token distributions", "next-token distributions"),
    ],
)
def test_portable_text(text, expected):
    assert portable_text(text) == expected


def test_portable_data():
    data = {
        "path": Path("/a/b c/d"),
        "list": ["/x/y", 1, None, True, 2.5],
        "my_token": "t",
        "kl_tokens": "3",
        "system": "/think hf_abcdefghijkl",
        "note": "see /x/y for it",
    }
    assert portable(data) == {
        "path": "d",
        "list": ["y", 1, None, True, 2.5],
        "my_token": "***",
        "kl_tokens": "3",
        "system": "/think ***",
        "note": "see y for it",
    }


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other # ours\nlicense_name: 'my-licence'\nlicense_link: LICENSE",
            {"license": "other", "license_name": "my-licence", "license_link": "LICENSE"},
        ),
        ("license:\n- mit\n- gpl-3.0\ntags:\n- a", {"license": ("mit", "gpl-3.0")}),
        ("tags:\n- license: mit", {}),
    ],
)
def test_the_licence_of_the_original_is_read_from_its_card(tmp_path, front, expected):
    (tmp_path / "README.original.md").write_text(f"---\n{front}\n---\n# Model\nlicense: no\n")
    assert stated_license(tmp_path) == expected
    card = model_card(replace(facts(), license=expected))
    stated = {k: v for k, v in front_matter(card).items() if k.startswith("license")}
    assert stated == {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()}


def test_no_card_and_no_front_matter_state_no_licence(tmp_path):
    assert stated_license(tmp_path) == {} == stated_license(None)
    (tmp_path / "README.md").write_text("license: mit\n")
    assert stated_license(tmp_path) == {}


def test_pictures_are_added_to_a_card_once(tmp_path):
    write_card(tmp_path, facts())
    before = (tmp_path / "README.md").read_text()
    for count in (2, 1):
        pictures = [CardPicture(f"p{i}", b"png", "4 [x]\ntrials", "Small.") for i in range(count)]
        files = add_figures(tmp_path, pictures)
        assert files == [
            tmp_path / "README.md",
            *(tmp_path / f"figures/p{i}.png" for i in range(count)),
        ]
        card = (tmp_path / "README.md").read_text()
        assert card.count("## Figures") == 1 and card.count("![4 x trials](figures/p") == count
    assert re.sub(r"## Figures\n.*?(?=## )", "", card, flags=re.DOTALL) == before
    assert (tmp_path / "figures/p0.png").read_bytes() == b"png"


def test_pictures_are_added_to_no_other_readme(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ExportError, match="holds no card"):
            add_figures(folder, [])
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
