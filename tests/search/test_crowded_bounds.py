"""Fronts that lie at an end of a range are noticed; natural limits are none."""

from heretic_kl.search import SearchSpace, crowded_bounds

MIDDLE = SearchSpace(layers=12).known_good()[0]


def front(count=4, **changed):
    return [{**MIDDLE, **changed} for _ in range(count)]


def test_a_front_in_the_middle_crowds_nothing():
    assert crowded_bounds(front()) == ()


def test_most_of_a_front_at_an_end_is_named():
    edge = {"attention.peak_weight": 1.49}
    assert crowded_bounds(front(**edge)) == ("attention.peak_weight near 1.5",)
    assert crowded_bounds([*front(3, **edge), *front(2)]) == ("attention.peak_weight near 1.5",)
    assert crowded_bounds([*front(2, **edge), *front(2)]) == ()
    assert crowded_bounds(front(**{"direction.position": 0.2})) == ("direction.position near 0.2",)


def test_limits_of_the_edit_itself_and_few_trials_are_no_matter():
    limits = {"attention.peak_weight": 0.0, "mlp.peak_position": 1.0, "mlp.floor": 1.0}
    assert crowded_bounds(front(**limits)) == ()
    assert crowded_bounds(front(2, **{"attention.peak_weight": 1.5})) == ()
