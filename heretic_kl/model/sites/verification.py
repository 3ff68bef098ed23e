"""Verifies that the sites are all that writes to the residual stream. Builds no search edits."""

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
from heretic_kl.model.sites.candidate_modules import ModuleGroup
from heretic_kl.model.sites.discovery import layers_that_write
from heretic_kl.model.sites.output_gain import stream_gains

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest share of a removed direction that may remain. A wrong gain leaves 0.1 to 1; rounding
leaves 1e-6 in float32."""
LOW_PRECISION_TOLERANCE = 0.1
"""In bfloat16 rounding leaves 0.01."""


class Verification(NamedTuple):
    """The sites are all that writes, up to rounding."""

    residue: float
    """Largest share of a removed direction that any layer still adds."""
    layer: int
    """Which layer adds it."""


class Residue:
    """The share of a random direction that each layer still adds once all sites remove it.

    Every layer gets a random stream of its usual size, without the direction and without what its
    norms would turn into the direction: whatever its output then has along the direction, its
    sites have written. The stream is random because real streams hold a few huge numbers, next to
    which rounding would hide what is written.
    """

    def __init__(self, lm: LanguageModel, *, seed: int = 0) -> None:
        self._lm = lm
        self._probe = probe_layers(lm.model, lm.architecture.width, lm.architecture.layers_path)
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(lm.architecture.width, generator=generator)
        self._direction = direction / direction.norm()
        self._groups = [
            ModuleGroup(site.key.layer, site.key.path, {site.key.path: site.module})
            for site in lm.architecture.sites
        ]
        gains = stream_gains(self._probe, self._placed(lm.architecture.sites))
        self._directions = {  # by layer: the direction and what the layer's norms turn into it
            layer: [self._direction, *(gain * self._direction for gain in gains.get(layer, []))]
            for layer in range(len(lm.architecture.layers))
        }
        self._inputs = [
            self._without(_of_usual_size(call.stream_in, generator), self._directions[call.layer])
            for call in self._probe.calls
        ]
        self._ablated_outputs = self._run(lm.architecture.sites)
        self._plan = self._ablation(1)
        self._plan_through_norms = self._ablation(None)

    def layers_that_write(self) -> list[int]:
        """Layers that change the stream even with all sites zero-ablated."""
        outputs = self._probe.run(self._placed(self._lm.architecture.sites))
        return sorted(layers_that_write(self._probe, self._groups, outputs))

    def _ablation(self, count: int | None) -> Plan:
        """Remove the first `count` directions of each layer at every site; None: all of them."""
        plan: dict[SiteKey, Operator] = {}
        for key, facts in self._lm.architecture.facts().items():
            pulled = [facts.pull_back(v) for v in self._directions[key.layer][:count]]
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
            keys: keep only these sites, zero-ablate the others; None: keep all.
            through_norms: also remove what the layer's norms turn into the direction. Some layers
                add their normed stream to the stream (experts that return their input), and with
                it what earlier sites of the same layer wrote.

        Returns:
            (L,) 0 where the direction is fully removed.
        """
        chosen = set(self._plan if keys is None else keys)
        others = [site for site in self._lm.architecture.sites if site.key not in chosen]
        plain = self._along(self._run(others))
        plan = self._plan_through_norms if through_norms else self._plan
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

    def _without(self, stream: Tensor, directions: Sequence[Tensor]) -> Tensor:
        """The stream, changed in place, without some directions."""
        basis, _ = torch.linalg.qr(torch.stack(list(directions), dim=1).double())
        view = self._probe.tokens_first(stream)
        span = basis.to(view.device)
        view.copy_(view.double() - (view.double() @ span) @ span.T)
        return stream

    def _along(self, outputs: Sequence[Tensor]) -> Tensor:
        """Root mean square of each layer's contribution along the direction, (L,)."""
        squares = torch.zeros(len(self._lm.architecture.layers), dtype=torch.float64)
        runs = zip(self._probe.calls, outputs, self._ablated_outputs, strict=True)
        for call, output, ablated_output in runs:
            added = self._probe.tokens_first(output.float() - ablated_output.float())
            along = added @ self._direction.to(added.device)
            squares[call.layer] += float(along.double().square().mean())
        return squares.sqrt()


def _of_usual_size(stream: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.randn(stream.shape, generator=generator).to(stream)
    return values * stream.abs().float().median().clamp_min(1e-3).to(stream.dtype)


def verify_sites(lm: LanguageModel) -> Verification:
    """Check that zero-ablating the sites keeps every layer from writing, and every residue.

    Raises:
        UnsupportedModelError: something besides the sites writes, or editing a site's output does
            not keep it from writing a direction; the layer or site is named.
    """
    residue = Residue(lm)
    failing = residue.layers_that_write()
    if failing:
        raise UnsupportedModelError(
            f"layer {failing[0]} changes the residual stream even with all its sites "
            "zero-ablated: something else in it writes"
        )
    tolerance = TOLERANCE.get(lm.dtype, LOW_PRECISION_TOLERANCE)
    shares = residue.by_layer()
    if float(shares.max()) > tolerance:
        shares = residue.by_layer(through_norms=True)
    worst = int(shares.argmax())
    if float(shares[worst]) <= tolerance:
        return Verification(float(shares[worst]), worst)
    site = _worst_site(lm, residue, worst)
    raise UnsupportedModelError(
        f"{site.key.path} ({type(site.module).__name__}) still writes "
        f"{float(shares[worst]):.0%} of a direction removed from its output: a later step in "
        f"layer {worst} brings the direction back"
    )


def _worst_site(lm: LanguageModel, residue: Residue, layer: int) -> Site:
    sites = [site for site in lm.architecture.sites if site.key.layer == layer]
    return max(sites, key=lambda site: float(residue.by_layer([site.key])[layer]))
