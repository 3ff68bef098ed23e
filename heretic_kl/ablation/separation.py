"""How far apart two groups of residuals lie, layer by layer. Knows nothing about prompts or models.

Layer `l` of every tensor here is the residual stream *after* layer `l`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Separation:
    """Refused against answered prompts; every tensor is (L,) float64 on the CPU."""

    auroc: Tensor
    """On held-out prompts, see `auroc`; 0.5 is chance."""
    cosine: Tensor
    """Between the two mean residuals."""
    difference_norm: Tensor
    """Length of the difference of the two means."""
    residual_norm: Tensor
    """Length of a residual, averaged over all prompts."""
    silhouette: Tensor
    """Mean silhouette of the two groups, -1 to 1, by Euclidean distance (Rousseeuw 1987)."""


@dataclass(frozen=True)
class Projection:
    """The residuals of one layer in a plane."""

    layer: int
    refused: Tensor
    """(P, 2) float64."""
    answered: Tensor
    """(Q, 2) float64."""
    variance: float
    """Share of the variance that lies in the plane, 0 to 1."""


def measure_separation(
    refused: Tensor,  # (P, L, D) residuals
    answered: Tensor,  # (Q, L, D)
) -> Separation:
    """Every measure of separation, for every layer."""
    means = [group.double().mean(0) for group in (refused, answered)]  # (L, D)
    lengths = torch.cat([refused, answered]).double().norm(dim=-1)  # (P + Q, L)
    per_layer = (
        auroc(refused, answered),
        torch.cosine_similarity(means[0], means[1], dim=-1),
        (means[0] - means[1]).norm(dim=-1),
        lengths.mean(0),
        silhouette(refused, answered),
    )
    return Separation(*(values.cpu() for values in per_layer))


def auroc(
    refused: Tensor,  # (P, L, D) residuals
    answered: Tensor,  # (Q, L, D)
) -> Tensor:
    """How well directions tell held-out prompts apart, layer by layer, as an AUROC.

    Two-fold cross-validation: the difference of means of one half of the prompts (every second
    one) projects the other half, and the AUROC is the share of pairs in which the refused prompt
    lies further along it; ties count half. The mean of both folds, in [0, 1]; 0.5 is chance.

    Returns:
        (L,) float64.
    """
    folds = []
    for held_out in (0, 1):
        train, test = 1 - held_out, held_out
        difference = refused[train::2].double().mean(0) - answered[train::2].double().mean(0)
        high = (refused[test::2].double() * difference).sum(-1)  # (P / 2, L)
        low = (answered[test::2].double() * difference).sum(-1)  # (Q / 2, L)
        margin = high[:, None] - low[None]
        folds.append(((margin > 0).double() + 0.5 * (margin == 0).double()).mean((0, 1)))
    return torch.stack(folds).mean(0)


def silhouette(
    refused: Tensor,  # (P, L, D) residuals
    answered: Tensor,  # (Q, L, D)
) -> Tensor:
    """Mean silhouette of two groups, layer by layer; a group of one point scores 0.

    Returns:
        (L,) float64.
    """
    points = torch.cat([refused, answered]).transpose(0, 1).double()  # (L, P + Q, D)
    first = torch.zeros(points.shape[1], dtype=torch.bool, device=points.device)
    first[: len(refused)] = True
    same = first[:, None] == first[None]
    others = (same.sum(1) - 1).clamp_min(1)
    scores = []
    for layer in points:  # (P + Q, P + Q) distances of one layer at a time
        distances = torch.cdist(layer, layer)
        inside = (distances * same).sum(1) / others
        outside = (distances * ~same).sum(1) / (~same).sum(1)
        largest = torch.maximum(inside, outside).clamp_min(torch.finfo(torch.float64).tiny)
        lone = same.sum(1) == 1
        scores.append(torch.where(lone, 0.0, (outside - inside) / largest).mean())
    return torch.stack(scores)


def project(
    refused: Tensor,  # (P, L, D) residuals
    answered: Tensor,  # (Q, L, D)
    layer: int,
) -> Projection:
    """The residuals of one layer on their first two principal components, both groups pooled."""
    points = torch.cat([refused[:, layer], answered[:, layer]]).double().cpu()
    centred = points - points.mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    plane = torch.zeros(len(points), 2, dtype=torch.float64)
    axes = min(2, len(singular))
    plane[:, :axes] = left[:, :axes] * singular[:axes]
    total = float(singular.square().sum())
    share = float(singular[:2].square().sum()) / total if total > 0 else 0.0
    return Projection(layer, plane[: len(refused)], plane[len(refused) :], share)
