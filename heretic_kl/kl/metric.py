"""What the number means: the metric's version, directions and thresholds. Holds no code.

A stored table or reference carries `METRIC_VERSION`; two versions never mix.
"""

from typing import Final, Literal

METRIC_VERSION: Final = 1
"""Raised whenever the same two models would measure differently than before."""

Direction = Literal["forward", "reverse", "jensen_shannon"]
"""`forward` is KL(reference || candidate), `reverse` is KL(candidate || reference)."""

DIRECTIONS: Final[tuple[Direction, ...]] = ("forward", "reverse", "jensen_shannon")

NEAR_TIE_MARGIN: Final = 0.1
"""A position is a near tie if the reference's two best tokens differ by less probability."""
