"""A keyboard and a session for tests of the picker."""

from collections.abc import Iterator

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from ui_samples import FakeSession, trial


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.fixture
def session() -> FakeSession:
    """A front of trials 1, 0, 2, with the knee at 0, in the middle."""
    return FakeSession(trial(0, 10, 0.02), trial(1, 0, 0.09), trial(2, 60, 0.001))
