"""What the unedited model computes at layer boundaries, kept so that candidates need not.

Below the lowest edited layer a candidate is the unedited model: its hidden states there are the
same numbers. Kept within a memory budget at evenly spread boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from heretic_kl.model import PrefixCache, layer_inputs, resumed_at, returns_tuple

PREFIX = -1
"""Stands for the shared prefix where batches are numbered."""


class Trunk:
    """Hidden states entering the boundaries' layers, batch by batch.

    Args:
        layers: of the model.
        boundaries: which layers' inputs are kept.
    """

    def __init__(self, layers: Sequence[nn.Module], boundaries: Sequence[int]) -> None:
        self.boundaries = tuple(sorted(boundaries))
        self.prefix: PrefixCache | None = None
        self._layers = layers
        self._states: dict[tuple[int, int], Tensor] = {}  # (batch, boundary) -> (B, T, D)
        self._as_tuple: list[bool] = []

    @property
    def bytes(self) -> int:
        """Memory that the kept states take."""
        return sum(state.numel() * state.element_size() for state in self._states.values())

    def boundary_for(self, lowest: int | None) -> int | None:
        """The highest boundary at or below the lowest edited layer; None: run all layers."""
        fitting = [b for b in self.boundaries if lowest is not None and b <= lowest]
        return max(fitting, default=None)

    @contextmanager
    def recording(self, batch: int) -> Iterator[None]:
        """Keep what enters the boundaries while the unedited model runs a batch."""

        def keep(boundary: int, hidden: Tensor) -> None:
            self._states[batch, boundary] = hidden.detach().clone()

        with (
            layer_inputs(self._layers, self.boundaries, keep),
            returns_tuple(self._layers, self._as_tuple),
        ):
            yield

    @contextmanager
    def resuming(self, batch: int, boundary: int, candidates: int) -> Iterator[None]:
        """Have a forward pass of the batch, K times over, start at the boundary."""
        kept = self._states[batch, boundary]
        # A copy also for one candidate: a layer may write into what it is given.
        hidden = kept.repeat(candidates, *[1] * (kept.dim() - 1))
        with resumed_at(self._layers, boundary, hidden, as_tuple=self._as_tuple[0]):
            yield


def spread_boundaries(layers: int, bytes_each: int, budget: int) -> tuple[int, ...]:
    """As many layers as the budget allows to keep the inputs of, evenly spread, none of them 0.

    Args:
        layers: L.
        bytes_each: what the states at one boundary take.
        budget: bytes for all of them.
    """
    count = min(layers - 1, budget // max(1, bytes_each))
    if count < 1:
        return ()
    return tuple(sorted({round(index * layers / (count + 1)) for index in range(1, count + 1)}))
