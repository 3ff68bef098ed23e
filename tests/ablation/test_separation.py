"""Separation of two groups: chance for equal ones, whole for distant ones, whatever the origin."""

import torch

from heretic_kl.ablation import measure_separation, project
from heretic_kl.ablation.separation import auroc, silhouette

LAYERS, WIDTH = 3, 16


def groups(first: int = 40, second: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = (
        torch.randn(count, LAYERS, WIDTH, generator=generator) for count in (first, second)
    )
    return one, other


def test_auroc_is_chance_for_equal_groups_and_whole_for_distant_ones() -> None:
    one, other = groups(200, 200)
    assert torch.allclose(auroc(one, other), torch.full((LAYERS,), 0.5).double(), atol=0.12)
    assert torch.equal(auroc(one + 9.0, other), torch.ones(LAYERS).double())
    shift = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(auroc(one + shift, other + shift), auroc(one, other), atol=1e-3)
    same = torch.ones(4, 1, 2)
    assert torch.equal(auroc(same, same), torch.tensor([0.5]).double())


def test_silhouette_lies_between_its_bounds_and_is_symmetric() -> None:
    one, other = groups()
    near, far = silhouette(one, other), silhouette(one + 50.0, other)
    assert torch.all(near.abs() < 0.1) and torch.all(far > 0.9) and torch.all(far <= 1)
    assert torch.allclose(near, silhouette(other, one))
    same = torch.ones(3, 1, 2)
    assert torch.equal(silhouette(same, same), torch.zeros(1).double())


def test_silhouette_by_hand() -> None:
    one, other = torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([[[4.0]]])
    # 0: inside 1, outside 4; 1: inside 1, outside 3; 4 is alone in its group.
    assert torch.allclose(silhouette(one, other), torch.tensor([(3 / 4 + 2 / 3 + 0) / 3]).double())


def test_norms_and_cosines_by_hand() -> None:
    one, other = torch.zeros(2, 1, 2), torch.zeros(2, 1, 2)
    one[..., 0], other[..., 1] = 3.0, 4.0
    separation = measure_separation(one, other)
    assert separation.cosine.item() == 0.0
    assert separation.difference_norm.item() == 5.0 and separation.residual_norm.item() == 3.5


def test_a_projection_keeps_distances_where_two_axes_hold_everything() -> None:
    generator = torch.Generator().manual_seed(3)
    plane = torch.linalg.qr(torch.randn(WIDTH, 2, generator=generator)).Q
    flat = torch.randn(9, 1, 2, generator=generator) @ plane.T
    projection = project(flat[:4], flat[4:], 0)
    assert projection.refused.shape == (4, 2) and projection.answered.shape == (5, 2)
    assert abs(projection.variance - 1) < 1e-9
    drawn = torch.cat([projection.refused, projection.answered])
    distances = torch.cdist(flat[:, 0].double(), flat[:, 0].double())
    assert torch.allclose(torch.cdist(drawn, drawn), distances, atol=1e-5)
    lone = project(flat[:1], flat[1:2] * 0 + flat[:1], 0)
    assert torch.equal(lone.refused, torch.zeros(1, 2).double()) and lone.variance == 0.0
