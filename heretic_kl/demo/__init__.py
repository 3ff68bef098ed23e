"""The demo model: real, small, offline after one download, and it refuses.

`benchmarks/demo_adapter` is how the refusals got in.
"""

from heretic_kl.demo.build import ensure_base_model, ensure_demo_model

__all__ = ["ensure_base_model", "ensure_demo_model"]
