"""What the number means: the metric's version, divergences and thresholds. Holds no code.

A stored table or reference carries `METRIC_VERSION`; two versions never mix.
"""

from typing import Final, Literal

METRIC_VERSION: Final = 2
"""Raised whenever the same two models would measure differently than before."""

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
"""`forward_kl` is KL(reference || candidate), `reverse_kl` is KL(candidate || reference)."""

DIVERGENCES: Final[tuple[Divergence, ...]] = ("forward_kl", "reverse_kl", "jensen_shannon")

NEAR_TIE_MARGIN: Final = 0.1
"""A position is a near tie if the reference's two best tokens differ by less probability."""
