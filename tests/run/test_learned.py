"""Refined trials say what they were learned with, and a run says if it asks for something else."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

from heretic_kl.ablation import EditParameters, LearningSettings, Refinement
from heretic_kl.config.tables import RefinementTable
from heretic_kl.report import details_lines, trial_details
from heretic_kl.run.trials.learned import learned_otherwise
from heretic_kl.search import TrialRecord

ASKED = LearningSettings(100, "direction", 1, 0.05, 16, None, 1.0, seed=3)
LEARNED = Refinement("", start=0, steps=87, form="direction", rank=1, mass_limit=0.1, asked=ASKED)


def refined(**changes):
    asked = replace(ASKED, **changes) if changes else None
    return SimpleNamespace(number=7, refinement=replace(LEARNED, asked=asked))


def test_the_defaults_are_told_from_what_was_asked_for():
    table = RefinementTable()
    same = SimpleNamespace(number=6, refinement=LEARNED)  # another limit and fewer steps came of it
    assert learned_otherwise([same, refined(), refined(seed=4)], table) is None
    many = RefinementTable(trials=9, gradient_checkpointing=True)
    assert learned_otherwise([same], many) is None
    notice = learned_otherwise([same, refined(kl_tokens=3, beta_kl=5.0)], many)
    assert notice == (
        "refined trials learned with other settings (beta_kl 5.0, now unset; kl_tokens 3, now 16): "
        "7; further ones are learned with these"
    )
    ends = "7; no other is learned: raise --refinement.trials or name another --study-name"
    assert learned_otherwise([refined(form="factors")] * 3, table).endswith(f"7, 7, {ends}")


def test_older_studies_without_it_are_read():
    content = json.loads(json.dumps(asdict(LEARNED)))
    assert Refinement.from_dict(content) == LEARNED
    del content["asked"]
    assert Refinement.from_dict(content) == replace(LEARNED, asked=None)


def test_the_details_of_a_trial_state_it():
    def shown(refinement):
        edit = EditParameters(1.0, {}, refinement=refinement)
        return "\n".join(details_lines(trial_details(TrialRecord(7, "complete", {}, edit))))

    line = (
        "learned with  KL over 16 positions at temperature 1, dual ascent; 100 steps asked for, "
        "first limit on refusal mass 0.05, seed 3"
    )
    assert line in shown(LEARNED)
    assert "learned with" not in shown(replace(LEARNED, asked=None))
