"""How much runs and how much is kept at once, and less of both where a pass runs out of memory.

Knows nothing about what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar
from weakref import WeakSet

from heretic_kl import ranks
from heretic_kl.errors import MeasurementError
from heretic_kl.model import clear_device_memory, is_out_of_memory, memory_needed

T = TypeVar("T")

MOST_CANDIDATES = 64
"""Side by side, until memory runs out."""


class Kept(Protocol):
    """Something that is kept to save time and can be computed again."""

    @property
    def bytes(self) -> int:
        """Memory that it takes now."""
        ...

    def release(self) -> None:
        """Give the memory back."""
        ...


class MemoryLimits:
    """How many sequences and candidates run at once, and how much is kept for later ones.

    Args:
        batch_size: most sequences in a batch.
        cache_bytes: memory for all that is kept of the unedited model.
        notify: told, in words, when a limit had to be lowered.
        offload: moves the model's weights out of the way, and says so; None: it cannot.

    Raises:
        ValueError: `batch_size` is below 1.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        cache_bytes: int = 0,
        notify: Callable[[str], None] = lambda message: None,
        offload: Callable[[], str | None] = lambda: None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.candidates = MOST_CANDIDATES
        self.cache_bytes = cache_bytes
        self.notify = notify
        self._offload = offload
        self._first = batch_size, MOST_CANDIDATES, cache_bytes
        self._kept: WeakSet[Kept] = WeakSet()
        self._running = self._keeping = False

    @property
    def cache_left(self) -> int:
        """Bytes of `cache_bytes` that nothing takes."""
        return self.cache_bytes - self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """What is kept takes now."""
        return sum(store.bytes for store in self._kept)

    def hold(self, store: Kept) -> None:
        """Count something towards `cache_bytes` for as long as it is in use."""
        self._kept.add(store)

    def release(self) -> None:
        """Give all kept memory back; it is computed again when it is needed."""
        for store in self._kept:
            store.release()
        clear_device_memory()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Where memory runs out in the block, less is kept from then on."""
        self._keeping = True
        yield
        self._keeping = False  # stays set for `run` where the block raised

    def run(self, work: Callable[[], T], *, candidates: int = 1) -> T:
        """Do work; where memory runs out, lower a limit and do all of it again.

        Half as many candidates at once come first, then half the batch size, then offloading, after
        which the limits are those of the start again: there is room.
        Inside another `run` that one does all of its work again, so that reference and candidates
        always run in the same batches.

        Args:
            work: what to do; reads the limits anew each time it is called.
            candidates: K, how many it has to run.

        Raises:
            MeasurementError: memory runs out with one candidate and one sequence, and offloading is
                not possible or not enough.
        """
        if self._running:
            return work()
        while True:
            self._running, self._keeping = True, False
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                _end_together(error)
                message, needed = self._lowered(candidates), memory_needed(error)
                cause = error.with_traceback(None)  # which holds the failed attempt's tensors
            finally:
                self._running = False
            # Outside the handler, so that the failed attempt's tensors are free.
            clear_device_memory()
            if message is None and (message := self._offload()) is not None:
                self.batch_size, self.candidates, self.cache_bytes = self._first
                self.release()
                message += "; batches, candidates and what is kept are as large as at first again"
            if message is None:
                raise MeasurementError(
                    "out of memory with a single prompt and a single candidate, which need "
                    f"{needed}: use shorter prompts, fewer --kl-tokens, --device-map auto or a "
                    "larger device"
                ) from cause
            clear_device_memory()
            self.notify(f"out of memory: {message}")

    def _lowered(self, candidates: int) -> str | None:
        """Lower one limit; which one, in words, or None where nothing can be lowered."""
        at_once = min(candidates, self.candidates)
        if self._keeping and self.cache_bytes:
            return self._keep_less(self.cache_bytes // 4)
        if at_once > 1:
            self.candidates = at_once // 2
            return f"{self.candidates} candidates run at once now"
        if self.batch_size > 1:
            self.batch_size //= 2
            for store in self._kept:  # of other batches
                store.release()
            return f"batch size is now {self.batch_size}"
        return self._keep_less(0) if self.cache_bytes else None

    def _keep_less(self, cache_bytes: int) -> str:
        self.cache_bytes = cache_bytes
        for store in self._kept:
            store.release()
        return f"cache memory is now {cache_bytes / 2**20:.0f} MB"


def if_memory_allows(work: Callable[[], T]) -> T | None:
    """Do work; None where memory runs out."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _end_together(error)
    clear_device_memory()
    return None


def _end_together(error: Exception) -> None:
    """Of several processes with one model, one may be out of memory while the others compute."""
    if ranks.count() > 1:
        raise MeasurementError(
            "out of memory: processes that share a model cannot run less on their own; give a "
            "smaller --batch-size, a smaller --parallel-candidates or more processes"
        ) from error
