"""Running out of memory lowers one limit and repeats everything, whatever the device calls it."""

import pytest
import torch

from heretic_kl.engine import MemoryLimits
from heretic_kl.errors import MeasurementError
from heretic_kl.model import is_out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"
MPS = "MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB)"
ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU), RuntimeError(MPS)]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "mps"])
def test_candidates_are_halved_first_then_the_batch(error):
    notes, seen = [], []
    limits = MemoryLimits(4, notify=notes.append)

    def work():
        at_once = min(4, limits.candidates)
        seen.append((at_once, limits.batch_size))
        if at_once * limits.batch_size > 1:
            raise error
        return "done"

    assert limits.run(work, candidates=4) == "done"
    assert seen == [(4, 4), (2, 4), (1, 4), (1, 2), (1, 1)]
    assert notes[-1] == "out of memory: batch size is now 1"


def test_an_inner_run_leaves_it_to_the_outer_one():
    limits, outer = MemoryLimits(2), []

    def inner():
        if limits.batch_size > 1:
            raise RuntimeError(CPU)
        return limits.batch_size

    def work():
        outer.append(limits.batch_size)
        return limits.run(inner)

    assert limits.run(work) == 1
    assert outer == [2, 1]


def test_what_is_kept_gives_way_where_keeping_it_ran_out_of_memory():
    class Kept:
        bytes = 600

        def release(self):
            self.bytes = 0

    limits, kept = MemoryLimits(4, cache_bytes=1000), Kept()
    limits.hold(kept)
    assert limits.cache_left == 400

    def work():
        with limits.keeping():
            if limits.cache_bytes > 100:
                raise RuntimeError(CPU)

    limits.run(work)
    assert limits.batch_size == 4 and limits.cache_bytes < 100 and kept.bytes == 0


def test_other_errors_pass_and_the_last_resort_is_one_line():
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    limits = MemoryLimits(1)

    def broken():
        raise RuntimeError("shape mismatch")

    def full():
        raise RuntimeError(CPU)

    with pytest.raises(RuntimeError, match="shape mismatch"):
        limits.run(broken)
    with pytest.raises(
        MeasurementError, match=r"a single candidate, which need about [\d.]+ GiB for the process"
    ):
        limits.run(full)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        MemoryLimits(0)
