"""Shows that the sites found are all that writes to the residual stream. Builds no search edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl.ablation import Operator, Plan, SiteKey, ablation_operator
from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.forward.hooks import edited
from heretic_kl.model.language_model import LanguageModel
from heretic_kl.model.sites.architecture import Site, probe_layers
from heretic_kl.model.sites.discovery import Group, not_passed_through
from heretic_kl.model.sites.output_gain import stream_gains

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest share of a direction that may stay. What is not pulled back rightly leaves 0.1 to 1;
rounding leaves 1e-6 in float32."""
LOW_PRECISION_TOLERANCE = 0.1
"""In bfloat16 rounding leaves 0.01."""


class Verification(NamedTuple):
    """That the sites are all that writes, up to rounding."""

    residue: float
    """Largest share of a removed direction that any layer still adds."""
    layer: int
    """Where."""


class Residue:
    """What stays of a random direction in each layer's own contribution once all sites remove it.

    Every layer is given a random stream of its usual size, without the direction and without what
    its norms would turn into the direction: what it then gives along the direction, its sites
    have written. Random, because next to the few huge numbers that real streams hold, rounding
    would hide what is written.

    Args:
        lm: the model.
        seed: of the direction.
    """

    def __init__(self, lm: LanguageModel, *, seed: int = 0) -> None:
        self._lm = lm
        self._probe = probe_layers(lm.model, lm.architecture.width, lm.architecture.layers_path)
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(lm.architecture.width, generator=generator)
        self._direction = direction / direction.norm()
        self._groups = [
            Group(site.key.layer, site.key.path, {site.key.path: site.module})
            for site in lm.architecture.sites
        ]
        gains = stream_gains(self._probe, self._placed(lm.architecture.sites))
        self._turned = {  # by layer: the direction and what the layer's norms turn into it
            layer: [self._direction, *(gain * self._direction for gain in gains.get(layer, []))]
            for layer in range(len(lm.architecture.layers))
        }
        self._inputs = [
            self._less(_of_usual_size(call.before, generator), self._turned[call.layer])
            for call in self._probe.calls
        ]
        self._silent = self._run(lm.architecture.sites)
        self._plan = self._ablation(1)
        self._wide_plan = self._ablation(None)

    def not_passed_through(self) -> list[int]:
        """Layers that change the stream though all sites are silenced."""
        ablated = self._probe.run(self._placed(self._lm.architecture.sites))
        return sorted(not_passed_through(self._probe, self._groups, ablated))

    def _ablation(self, count: int | None) -> Plan:
        """The direction, and (None) all that norms turn into it, removed at every site."""
        plan: dict[SiteKey, Operator] = {}
        for key, facts in self._lm.architecture.facts().items():
            pulled = [facts.pull_back(v) for v in self._turned[key.layer][:count]]
            single = count == 1 and pulled[0].ndim == 1
            directions = (
                pulled[0] if single else torch.cat([p.reshape(-1, p.shape[-1]) for p in pulled])
            )
            plan[key] = ablation_operator(directions, 1.0)
        return plan

    def by_layer(
        self, keys: Sequence[SiteKey] | None = None, *, through_norms: bool = False
    ) -> Tensor:
        """Root mean square of `contribution . v` over tokens, edited over unedited.

        Args:
            keys: let only these sites speak; None: all.
            through_norms: remove also what the layer's norms turn into the direction: some layers
                add a normed stream to itself (experts that do nothing), and with it what earlier
                sites of the same layer wrote.

        Returns:
            (L,) 0 is a full removal.
        """
        chosen = set(self._plan if keys is None else keys)
        others = [site for site in self._lm.architecture.sites if site.key not in chosen]
        plain = self._along(self._run(others))
        plan = self._wide_plan if through_norms else self._plan
        with edited(self._lm.architecture, {key: plan[key] for key in chosen}):
            after = self._along(self._run(others))
        return after / plain.clamp_min(torch.finfo(torch.float32).tiny)

    def _placed(self, sites: Sequence[Site]) -> set[tuple[int, torch.nn.Module]]:
        # In every layer: a module that several share is one site.
        layers = range(len(self._lm.architecture.layers))
        shared = self._lm.architecture.shared
        return {
            (layer, site.module)
            for site in sites
            for layer in (layers if site.key in shared else (site.key.layer,))
        }

    def _run(self, ablated: Sequence[Site]) -> list[Tensor]:
        return self._probe.run(self._placed(ablated), inputs=self._inputs)

    def _less(self, before: Tensor, directions: Sequence[Tensor]) -> Tensor:
        """The stream without some directions."""
        basis, _ = torch.linalg.qr(torch.stack(list(directions), dim=1).double())
        view = self._probe.tokens_first(before)
        span = basis.to(view.device)
        view.copy_(view.double() - (view.double() @ span) @ span.T)
        return before

    def _along(self, after: Sequence[Tensor]) -> Tensor:
        squares = torch.zeros(len(self._lm.architecture.layers), dtype=torch.float64)
        for call, given, ablated in zip(self._probe.calls, after, self._silent, strict=True):
            added = self._probe.tokens_first(given.float() - ablated.float())
            along = added @ self._direction.to(added.device)
            squares[call.layer] += float(along.double().square().mean())
        return squares.sqrt()


def _of_usual_size(before: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.randn(before.shape, generator=generator).to(before)
    return values * before.abs().float().median().clamp_min(1e-3).to(before.dtype)


def direction_residue(lm: LanguageModel, *, seed: int = 0) -> Tensor:
    """What stays of a random direction in each layer's contribution, (L,); see `Residue`."""
    return Residue(lm, seed=seed).by_layer()


def verify_sites(lm: LanguageModel) -> Verification:
    """Check that silencing the sites silences every layer, and the residue of every layer.

    Raises:
        UnsupportedModelError: something that is no site writes, or a site cannot be kept from
            writing a direction by an edit of its output; the layer or site is named.
    """
    residue = Residue(lm)
    failing = residue.not_passed_through()
    if failing:
        raise UnsupportedModelError(
            f"layer {failing[0]} changes the residual stream even while all known outputs are "
            "silenced: something else in it writes"
        )
    tolerance = TOLERANCE.get(lm.dtype, LOW_PRECISION_TOLERANCE)
    found = residue.by_layer()
    if float(found.max()) > tolerance:
        found = residue.by_layer(through_norms=True)
    worst = int(found.argmax())
    if float(found[worst]) <= tolerance:
        return Verification(float(found[worst]), worst)
    site = _worst_site(lm, residue, worst)
    raise UnsupportedModelError(
        f"{site.key.path} ({type(site.module).__name__}) still writes "
        f"{float(found[worst]):.0%} of a direction removed from its output: what follows it in "
        f"layer {worst} brings the direction back"
    )


def _worst_site(lm: LanguageModel, residue: Residue, layer: int) -> Site:
    sites = [site for site in lm.architecture.sites if site.key.layer == layer]
    return max(sites, key=lambda site: float(residue.by_layer([site.key])[layer]))
