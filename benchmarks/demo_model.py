"""The demo model as benchmarks of the engine load it."""

from __future__ import annotations

from typing import Any

CACHE_BYTES = 2**30
"""What a run has by default for all that it keeps."""


def demo_model(dtype: str) -> Any:
    """As any program would load it."""
    from heretic_kl.demo import ensure_demo_model
    from heretic_kl.model import ModelSource, load_model

    folder = ensure_demo_model(notify=lambda message: None)
    return load_model(ModelSource(str(folder)), dtype=dtype)


def as_in_a_run(lm: Any) -> tuple[Any, int]:
    """With weights packed as calibration packs them, and the memory left for the layer cache.

    Changes how the model given runs.
    """
    from heretic_kl.model import packed_bytes, with_packed_weights

    size = packed_bytes(lm)
    if not 0 < size <= CACHE_BYTES:
        return lm, CACHE_BYTES
    return with_packed_weights(lm), CACHE_BYTES - size
