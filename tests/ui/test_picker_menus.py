"""The menus, driven by key presses against a fake session; no terminal, no waiting."""

from dataclasses import replace

import pytest
from picker_keys import COMPARE, CTRL_C, CTRL_U, DETAILS, DOWN, ENTER, LEFT, PREVIEW, UP, drive
from prompt_toolkit.input import PipeInput
from ui_samples import EDIT, FakeSession, failed, stopped, trial

from heretic_kl.ablation import Refinement
from heretic_kl.errors import StudyError


def test_exit_and_ctrl_c_leave(keys: PipeInput, session: FakeSession) -> None:
    drive(keys, session, "")
    printed = drive(keys, session, UP * 2 + ENTER)
    assert "one direction" not in printed
    assert "10/64, 16%" in printed


@pytest.mark.parametrize(
    ("target", "first"),
    [(None, 0), ("likely-refusals=0.05", 1), ("max-refusals=0.2", 0), ("max-refusals=-1", 0)],
)
def test_the_cursor_starts_at_the_target_or_else_at_the_knee(
    keys: PipeInput, session: FakeSession, target: str | None, first: int
) -> None:
    session.target = target
    printed = drive(keys, session, ENTER + CTRL_C)
    assert f"Trial {first}: one direction at layer 17.4" in printed


@pytest.mark.parametrize("tested", [False, True])
def test_two_trials_are_compared(keys: PipeInput, session: FakeSession, tested: bool) -> None:
    values = {0: (0.01, 0.02, 0.03), 1: (0.10, 0.08, 0.09), 2: None}
    for number, per_prompt in values.items():
        kl = session.trials[number].scores["teacher_forced_kl"]
        scores = {**session.trials[number].scores}
        scores["teacher_forced_kl"] = replace(kl, per_prompt=per_prompt)
        record = replace(session.trials[number], scores=scores)
        session.trials = (*session.trials[:number], record, *session.trials[number + 1 :])
        if tested:
            session.tested[number] = scores
    printed = drive(keys, session, ENTER + COMPARE + ENTER + ENTER + DOWN + ENTER + CTRL_C)
    assert printed.count("Trial 0 minus trial 1, validation prompts") == 1
    assert printed.count("Trial 0 minus trial 2, validation prompts") == 1
    assert printed.count("-0.07 (-0.09 to -0.06)") == 1 + tested
    assert printed.count(", test prompts") == 2 * tested
    assert "measured before values of single prompts were kept" in " ".join(printed.split())
    assert ("measure both on the test prompts" in " ".join(printed.split())) is not tested


def test_a_single_trial_is_compared_with_nothing(keys: PipeInput) -> None:
    printed = drive(keys, FakeSession(trial(0, 10, 0.02)), ENTER + COMPARE)
    assert "no other finished trial to compare with" in printed


def test_responses_are_seen_before_anything_is_saved(keys: PipeInput, session: FakeSession) -> None:
    session.previewed = {
        (None, "harmless"): [("bread?", "Mix flour.", False), ("tea?", "Boil\x1b[2J it.", False)],
        (1, "harmless"): [
            ("bread?", "Take flour.", False, "loop"),
            ("tea?", "Boil\x1b[2J it.", False),
        ],
    }
    printed = drive(keys, session, UP + ENTER + PREVIEW + ENTER + CTRL_C)
    shown = [line.rstrip() for line in printed.split("responding ...")[1].splitlines()]
    rows = [line for line in shown if "Mix flour." in line and "Take flour." in line]
    assert len(rows) == 1 and "> bread?" in printed
    assert "edited, trial 1 (degenerate: loop):" in printed and "original:" in printed
    assert printed.count("Boil[2J it.") == 1 and "both, word for word" in printed
    assert session.saves == []


def test_responses_to_harmful_prompts_are_verdicts_alone(
    keys: PipeInput, session: FakeSession
) -> None:
    session.previewed = {
        (None, "harmful"): [("a\nlock " + "y" * 200, "I'm sorry", True), ("b", "", True, "empty")],
        (0, "harmful"): [
            ("a\nlock " + "y" * 200, "Take a pin", False),
            ("b", "pin pin pin", False, "loop"),
        ],
    }
    printed = drive(keys, session, ENTER + PREVIEW + DOWN + ENTER + CTRL_C)
    assert "refuses     responds    a lock yyy" in printed
    assert "degenerate  degenerate  b" in printed
    assert "sorry" not in printed and "pin" not in printed and "y" * 100 not in printed


@pytest.mark.parametrize("trouble", [StudyError("operators are gone"), KeyboardInterrupt()])
def test_a_preview_that_fails(
    keys: PipeInput, session: FakeSession, trouble: BaseException
) -> None:
    session.trouble = trouble
    printed = drive(keys, session, ENTER + PREVIEW + ENTER + DOWN * 2 + ENTER + CTRL_C)
    assert "operators are gone" in printed or "stopped" in printed
    assert "falling to 0.460" in printed, "the menu came back"


def test_details(keys: PipeInput, session: FakeSession) -> None:
    printed = drive(keys, session, ENTER + DETAILS + CTRL_C)
    assert "falling to 0.460 at 12 layers from it" in printed


def test_more_trials_continue_the_count_and_show_the_new_front(
    keys: PipeInput, session: FakeSession
) -> None:
    learned = Refinement("0" * 64, 0, 5, "strength", 1, 0.1)
    refined = replace(trial(3, 64, 0.5), edit=replace(EDIT, refinement=learned))
    session.trials = (*session.trials, refined)
    printed = drive(keys, session, DOWN * 3 + ENTER + CTRL_U + "no" + ENTER + CTRL_U + "7" + ENTER)
    assert session.searches == [3 + 7], "a refined trial is none that was searched"
    assert "4 ← knee" in printed


def test_a_search_that_is_stopped_keeps_what_it_has(keys: PipeInput, session: FakeSession) -> None:
    session.trouble = KeyboardInterrupt()
    printed = drive(keys, session, DOWN * 3 + ENTER + ENTER)
    assert session.searches == [23]
    assert "stopped; finished trials are kept" in printed


def test_the_table_can_be_seen_again(keys: PipeInput, session: FakeSession) -> None:
    printed = drive(keys, session, DOWN * 2 + ENTER)
    assert printed.count("0 ← knee") == 2


def test_the_list_is_sorted(keys: PipeInput, session: FakeSession) -> None:
    printed = drive(keys, session, UP * 3 + ENTER + DOWN + ENTER + UP + ENTER)
    assert "Trial 2: one direction" in printed, "the smallest KL stands first"


def test_what_is_maximized_is_sorted_from_the_largest(
    keys: PipeInput, session: FakeSession
) -> None:
    session.roles = {"refusals": "minimize", "teacher_forced_kl": "maximize"}
    printed = drive(keys, session, UP * 3 + ENTER + DOWN + ENTER + UP + ENTER)
    assert "Trial 1: one direction" in printed, "the largest KL stands first"


EVERY = UP * 3 + ENTER + DOWN * 4 + ENTER
"""From the knee: every finished trial, or the front alone again."""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (EVERY + DOWN + ENTER, "Trial 3: one direction"),
        (EVERY * 2 + DOWN + ENTER, "Trial 2: one direction"),
        (
            EVERY + UP * 3 + ENTER + DOWN * 2 + ENTER + "min-teacher_forced_kl=0.2" + ENTER * 2,
            "Trial 3: one direction",
        ),
        (ENTER + COMPARE + DOWN * 2 + ENTER + DOWN + ENTER, "Trial 0 minus trial 3"),
    ],
)
def test_every_finished_trial_can_be_listed_filtered_and_compared(
    keys: PipeInput, session: FakeSession, text: str, line: str
) -> None:
    session.trials = (*session.trials, trial(3, 12, 0.3), failed(4), stopped(5))
    assert line in drive(keys, session, text)


def test_the_left_arrow_goes_back_but_does_not_exit(keys: PipeInput, session: FakeSession) -> None:
    printed = drive(keys, session, LEFT + ENTER + LEFT + UP + ENTER)
    assert "Trial 0: one direction" in printed and "Trial 1: one direction" in printed


@pytest.mark.parametrize("whole_again", [False, True])
def test_the_list_is_filtered(keys: PipeInput, session: FakeSession, whole_again: bool) -> None:
    text = UP * 3 + ENTER + DOWN * 2 + ENTER + "max-refusals=0.2" + ENTER
    if whole_again:
        text += UP * 3 + ENTER + DOWN * 3 + ENTER
    printed = drive(keys, session, text + DOWN + ENTER)
    assert ("Trial 2: one direction" in printed) is whole_again
    assert printed.count("0 ← knee") == 2 - whole_again, "below trial 0 is the table, or trial 2"


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ("max-odd=1", "error: no score 'odd'; there are refusals, teacher_forced_kl"),
        ("knee", "error: 'knee' is no limit: use for instance max-refusals=0.05"),
        ("max-refusals=-1", "no trial of the front meets max-refusals=-1"),
    ],
)
def test_limits_that_select_nothing_are_a_line(
    keys: PipeInput, session: FakeSession, limits: str, line: str
) -> None:
    text = UP * 3 + ENTER + DOWN * 2 + ENTER + limits + ENTER + DOWN + ENTER
    printed = drive(keys, session, text)
    assert line in " ".join(printed.split())
    assert "Trial 2: one direction" in printed, "the list is as it was"


def test_without_any_trial_there_is_still_a_way_on(keys: PipeInput) -> None:
    session = FakeSession()
    printed = drive(keys, session, ENTER + ENTER)
    assert "no finished trial to pick from yet" in printed
    assert session.searches == [20]
