"""What every test should find alike, whatever machine it runs on."""

import pytest

from heretic_kl.model.loading import loader as loading


@pytest.fixture(autouse=True)
def no_bfloat16_in_hardware(monkeypatch):
    """`--dtype auto` is float32 on every CPU: figures in tests do not depend on the processor."""
    monkeypatch.setattr(loading, "_cpu_multiplies_bfloat16", lambda: False)
