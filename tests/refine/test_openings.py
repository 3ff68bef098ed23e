"""Openings tell refusals from other responses, and their mass is a probability."""

import itertools

import pytest
import torch

from heretic_kl.refine.openings import OpeningSet, mine_openings, opening_log_mass


def test_a_first_token_that_only_refusals_have_is_an_opening():
    refusals = [(1, 2, 3), (1, 4), (5, 6), (5, 7)]
    assert mine_openings(refusals, [(8, 2), (9,)]).openings == ((1,), (5,))


def test_what_other_responses_begin_with_too_is_told_apart_by_later_tokens():
    refusals = [(1, 2, 3), (1, 2, 4), (1, 2, 3)]
    answered = [(1, 9), (1, 8, 2), (1, 7)]
    assert mine_openings(refusals, answered).openings == ((1, 2),)


def test_rare_beginnings_are_left_out_unless_all_are_rare():
    assert mine_openings([(1, 2), (1, 3), (4, 5)], []).openings == ((1,),)
    assert mine_openings([(1, 2), (3, 4)], []).openings in (((1,),), ((3,),))


def test_at_the_greatest_depth_a_beginning_counts_whatever_else_begins_so():
    refusals, answered = [(1, 2, 3)] * 3, [(1, 2, 3)] * 3
    assert mine_openings(refusals, answered, max_depth=2).openings == ((1, 2),)


def test_no_opening_begins_with_another():
    refusals = [(1, 2, 3), (1, 2, 4), (1, 5), (1, 5), (6,), (6, 7)]
    found = mine_openings(refusals, [(1, 9), (1, 2, 9)]).openings
    for one, other in itertools.permutations(found, 2):
        assert other[: len(one)] != one


def test_without_refusals_there_is_nothing_to_mine():
    with pytest.raises(ValueError, match="no refusals"):
        mine_openings([], [(1,)])


def test_contexts_cover_all_nodes():
    openings = OpeningSet(((1,), (2, 3), (2, 4, 5)))
    assert [node.prefix for node in openings.nodes] == [(), (2,), (2, 4)]
    assert openings.contexts == ((2, 4),)


def test_the_mass_is_the_share_of_sequences_that_begin_so():
    """Against enumeration of all sequences of a small random process."""
    vocabulary, prompts = 4, 3
    openings = OpeningSet(((0,), (1, 2), (1, 3, 0), (1, 3, 1)))
    tables = {
        node.prefix: torch.randn(prompts, vocabulary, dtype=torch.float64).log_softmax(-1)
        for node in openings.nodes
    }
    log_mass = opening_log_mass(openings, [tables[node.prefix] for node in openings.nodes])
    for prompt in range(prompts):
        expected = 0.0
        for opening in openings.openings:
            steps = (tables[opening[:d]][prompt, t] for d, t in enumerate(opening))
            expected += float(sum(steps).exp())
        assert float(log_mass[prompt].exp()) == pytest.approx(expected, abs=1e-12)
    everything = OpeningSet(tuple((token,) for token in range(vocabulary)))
    assert torch.allclose(
        opening_log_mass(everything, [tables[()]]), torch.zeros(prompts, dtype=torch.float64)
    )
