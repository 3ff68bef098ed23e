"""KL against size: names of near candidates stand on different sides of their points."""

import pytest

from heretic_kl.report import size_figure


def row(name, size, kl):
    return {
        **{"name": name, "size": size, "kl": kl, "low": kl / 2, "high": 2 * kl},
        **{"bits": 4.5, "pareto": True, "text": name},
    }


@pytest.mark.parametrize(
    ("size", "kl", "below"),
    [(105.4, 0.092, True), (112.1, 0.092, False), (105.4, 0.3, False), (105.4, 0.0, False)],
    ids=["near", "far in size", "far in KL", "no KL"],
)
def test_the_name_of_a_near_candidate_stands_below(size, kl, below):
    figure = size_figure([row("Q4_K_M", size, kl), row("Q5_0", 105.0, 0.1)], {})
    assert {one["name"]: one["below"] for one in figure.rows} == {"Q4_K_M": below, "Q5_0": False}
    filters = [layer.get("transform", [{}])[0].get("filter") for layer in figure.spec["layer"]]
    assert {"datum.below", "!datum.below"} <= set(filters)
