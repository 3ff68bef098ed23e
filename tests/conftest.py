"""What is the same for every test, whatever machine it runs on."""

from collections import Counter

import pytest
from hub_server import TOKEN, Hub

from heretic_kl.model.loading import devices


@pytest.fixture(autouse=True)
def no_bfloat16_in_hardware(monkeypatch):
    """`--dtype auto` is float32 on every CPU: figures in tests do not depend on the processor."""
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback, to which the token `hub_server.TOKEN` in HF_TOKEN may write."""
    with Hub(TOKEN) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def computed(monkeypatch):
    """Counts what the original model computes and a study shares; not the noise floor's passes."""
    from heretic_kl.engine import Engine, Runner

    done = Counter()
    pass_over, read = Runner.hidden_states, Engine._residuals

    def hidden_states(runner, sequences, part="reference"):
        done["passes"] += part == "reference"
        return pass_over(runner, sequences, part)

    def residuals(engine, prompts):
        done["prompts read"] += len(prompts)
        return read(engine, prompts)

    monkeypatch.setattr(Runner, "hidden_states", hidden_states)
    monkeypatch.setattr(Engine, "_residuals", residuals)
    return done
