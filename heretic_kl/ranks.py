"""The processes that hold one model together under `torchrun`. Knows nothing about models.

All of them run the same program in the same order. Whatever depends on a storage, a clock, a file
or another server happens on the first one, and the others are told what came of it.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

LONGEST_WAIT = timedelta(days=2)
"""For the first process, which may itself wait for others that share its study."""


PATIENCE = timedelta(minutes=5)
"""For another process to come to the same error."""


class _Ranks:
    """What this process knows of the others; alone until `join`."""

    count = 1
    rank = 0
    group: Any = None
    """On which decisions are told, apart from what the model's parts tell each other."""
    inside = False
    """The first process does now what the others wait for."""


def launched() -> int:
    """How many processes `torchrun` started; 1: it started none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def join() -> None:
    """Have this process and the others of `torchrun` act as one from now on."""
    if launched() == 1 or _Ranks.count > 1:
        return
    import torch

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    _Ranks.count, _Ranks.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    _Ranks.group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    if _Ranks.rank > 0:  # it holds nothing that would have to be let go
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: os._exit(128 + number))


def leave() -> None:
    """End what `join` began, where all processes are done."""
    if _Ranks.count > 1:
        import torch

        torch.distributed.destroy_process_group()
        _Ranks.count, _Ranks.rank = 1, 0


def count() -> int:
    """Processes that act as one; 1 outside of `torchrun`."""
    return _Ranks.count


def is_first() -> bool:
    """Whether this process is the one that prints, stores and writes files."""
    return _Ranks.rank == 0


def from_first(work: Callable[[], T]) -> T:
    """Do work on the first process; return or raise on all of them what it returned or raised.

    Every process calls it. Work inside other such work is done where it is.
    """
    if _Ranks.count == 1 or _Ranks.inside:
        return work()
    if _ending():
        return work() if _Ranks.rank == 0 else None  # type: ignore[return-value]
    import torch

    # Between processes of one user and program, as torch.distributed itself passes objects.
    box: list[tuple[bool, bytes]] = [(True, b"")]
    result: T | Exception | None = None
    if _Ranks.rank == 0:
        _Ranks.inside = True
        try:
            result = work()
            box[0] = True, pickle.dumps(result)
        except Exception as error:
            result = error
            box[0] = False, _pickled(error)
        finally:
            _Ranks.inside = False
    torch.distributed.broadcast_object_list(box, src=0, group=_Ranks.group)
    good, content = box[0]
    if _Ranks.rank > 0:
        result = pickle.loads(content)  # noqa: S301 (see above)
    if not good:
        assert isinstance(result, Exception)
        raise result
    return result  # type: ignore[return-value]


def check_together() -> None:
    """After an error: end this process where another one did not come to the same error.

    It would wait for the other's part of a pass, and the other for its own.
    """
    if _Ranks.count == 1:
        return
    import torch

    barrier = torch.distributed.barrier(_Ranks.group, async_op=True)
    try:
        barrier.wait(PATIENCE)
    except RuntimeError as error:
        raise SystemExit(
            f"heretic-kl: error: process {_Ranks.rank} failed and another one did not: both end"
        ) from error


def on_first(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function run on the first process alone; see `from_first`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return from_first(lambda: function(*args, **kwargs))

    return call


@contextmanager
def held_by_first(make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """A context that the first process alone enters; all get what it yields."""
    with ExitStack() as stack:
        yield from_first(lambda: stack.enter_context(make()))


def _ending() -> bool:
    """Whether an interrupt is on its way out: the others do not listen any more."""
    return not isinstance(sys.exc_info()[1], Exception | None)


def _pickled(error: Exception) -> bytes:
    """An exception, or a plain one of its text where it cannot be rebuilt from its arguments."""
    try:
        content = pickle.dumps(error)
        pickle.loads(content)  # noqa: S301 (just written)
    except Exception:  # whatever its class raises; the error itself is passed on as text
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return content
