"""What is the same for every test, whatever machine it runs on."""

import pytest

from heretic_kl.model.loading import devices


@pytest.fixture(autouse=True)
def no_bfloat16_in_hardware(monkeypatch):
    """`--dtype auto` is float32 on every CPU: figures in tests do not depend on the processor."""
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: False)
