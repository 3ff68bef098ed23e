"""How strongly each layer is edited. Knows nothing about tensors or modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightKernel:
    """A tent over the layers: `peak_weight` at `peak_position`, falling linearly to the floor.

    A weight of 1 removes the direction, less removes part of it, more reflects it.
    `weight_at(layer)` is 0 beyond `reach`: those layers are not edited.
    """

    peak_weight: float
    """Weight at the peak."""
    peak_position: float
    """Where the peak stands, in layers from the first (0), fractions allowed."""
    floor_weight: float
    """Weight at the distance `reach` from the peak."""
    reach: float
    """Largest distance from the peak, in layers, at which a layer is still edited."""

    def __post_init__(self) -> None:
        if self.reach < 0:
            raise ValueError(f"reach must be at least 0 layers, got {self.reach}")

    def weight_at(self, layer: int) -> float:
        """Weight at one layer; 0 beyond the reach."""
        distance = abs(layer - self.peak_position)
        if distance > self.reach:
            return 0.0
        if self.reach == 0:
            return self.peak_weight
        return self.peak_weight + (self.floor_weight - self.peak_weight) * distance / self.reach
