"""A longer KL on test prompts: each figure says its N, and what has another N stands apart."""

import json

import pytest
from sessions import run

from heretic_kl import events
from heretic_kl.export import read_reproduction
from heretic_kl.report import front_footnotes, front_rows
from heretic_kl.run.saving.rebuild import rebuild
from heretic_kl.search import UNEDITED, read_study

KL = "teacher_forced_kl"
SHORT = {"trials": 2, "startup_trials": 2, "test_trials": 1}


def tokens(scores):
    return scores[KL].details["kl_tokens"], len(scores[KL].details["profile"])


def test_trials_keep_their_n_and_every_figure_says_which_it_has(workplace, tmp_path):
    session, seen = run(workplace, tmp_path, **SHORT, test_kl_tokens=5)
    with session:
        session.search()
        session.test()
        (number,) = session.tested
        record = next(trial for trial in session.trials if trial.number == number)
        tested = session.tested[number]
        assert tokens(record.scores) == (3, 3) and tokens(tested) == (5, 5)
        assert tokens(session.test_baseline()) == (5, 5)
        assert " nats over 5 positions" in tested[KL].text
        assert " positions" not in record.scores[KL].text
        assert tested[KL].details["noise_floor"] != record.scores[KL].details["noise_floor"]
        notes = front_footnotes(front_rows(session.front, session.tested))
        assert (
            "KL on test prompts is over the first N = 5 positions of a response, on validation "
            "prompts over 3: the two do not compare."
        ) in notes
        saved = session.save(record, tmp_path / "out", "merged")
        assert tokens(saved.saved_scores) == (5, 5)
        name = session.parts.study.name
    card = " ".join((tmp_path / "out/README.md").read_text(encoding="utf-8").split())
    assert "next-token distributions of its first 5 positions are compared" in card
    assert "nats over the first 3 positions, as in the search: batching" in card
    assert "kl_tokens: 5" in card and "--test-kl-tokens 5" in card
    facts = json.loads((tmp_path / "out/reproduce.json").read_text(encoding="utf-8"))
    assert [facts["measurement"][key] for key in ("kl_tokens", "test_kl_tokens")] == [3, 5]
    told = [event for event in seen if isinstance(event, events.TrialTested)]
    assert tokens(told[0].scores) == (5, 5)

    again, _ = run(workplace, tmp_path, **SHORT)  # the same study: its trials do not depend on it
    with again:
        assert len(again.trials) == 2 and not again.tested
        again.test()
        assert tokens(again.tested[number]) == (3, 3)
        assert "positions" not in again.tested[number][KL].text
        assert len(front_footnotes(front_rows(again.front, again.tested))) == len(notes) - 1
    folder = tmp_path / "studies"
    assert tokens(read_study(name, folder).tested[number]) == (3, 3)
    longer = read_study(name, folder, test_tokens=5)
    assert tokens(longer.tested[number]) == tokens(longer.test_baseline) == (5, 5)
    assert UNEDITED not in longer.tested

    wanted = read_reproduction(tmp_path / "out")
    assert wanted.taken_settings()[0]["test_kl_tokens"] == 5
    for other in (5, 4):
        rebuilt, _ = run(workplace, tmp_path / f"anew-{other}", **SHORT, test_kl_tokens=other)
        with rebuilt:
            _, comparison = rebuild(
                rebuilt.parts, wanted, tmp_path / f"out-{other}", overwrite=False
            )
        then, now = comparison.scores[KL]
        assert now.details["kl_tokens"] == other and (then is None) == (other == 4)
        differing = {d.what: (d.then, d.now) for d in comparison.differences}
        assert differing == (
            {f"positions of {KL} on test prompts": ("5", "4")} if then is None else {}
        )


@pytest.mark.parametrize("longer", [None, 3])
def test_by_default_test_scores_have_the_n_of_trials(workplace, tmp_path, longer):
    session, _ = run(workplace, tmp_path, **SHORT, test_kl_tokens=longer)
    with session:
        session.search()
        session.test()
        (scores,) = session.tested.values()
        assert tokens(scores) == (3, 3) and "positions" not in scores[KL].text
        floor = session.calibration.noise_floor.value
        assert scores[KL].details["noise_floor"] == floor
        assert read_study(None, tmp_path / "studies").tested.keys() == session.tested.keys()


def test_a_scorers_own_n_is_the_stronger_one(workplace, tmp_path):
    table = {"settings": {"set_aside_refused": False, "kl_tokens": 2}}
    scorers = {"refusals": {"settings": {"markers": ["flour", "mix"]}}, KL: table}
    session, _ = run(workplace, tmp_path, **SHORT, test_kl_tokens=5, scorers=scorers)
    with session:
        session.search()
        session.test()
        (number,) = session.tested
        (record,) = (trial for trial in session.trials if trial.number == number)
        assert tokens(record.scores) == tokens(session.tested[number]) == (2, 2)
        notes = front_footnotes(front_rows(session.front, session.tested))
        assert not any("do not compare" in note for note in notes)
        session.save(record, tmp_path / "out", "lora")
    card = " ".join((tmp_path / "out/README.md").read_text(encoding="utf-8").split())
    assert "distributions of its first 2 positions are compared" in card
