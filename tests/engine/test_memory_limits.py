"""Running out of memory lowers one limit and repeats everything, whatever the device calls it."""

import pytest
import torch

from heretic_kl.ablation import Operator
from heretic_kl.engine import Engine, MemoryLimits
from heretic_kl.errors import MeasurementError
from heretic_kl.model import is_out_of_memory, placement
from heretic_kl.model.placement import is_offloaded
from heretic_kl.prompts import Prompt
from heretic_kl.testing import load_tiny_model, save_tiny_model, tiny_llama

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


def test_after_offloading_the_limits_are_those_of_the_start_and_are_lowered_anew():
    offloaded, notes = [], []

    def offload():
        if not offloaded:
            offloaded.append(True)
            return "weights wait"

    def work():
        if not offloaded or limits.batch_size > 2:
            raise RuntimeError(CPU)
        return limits.batch_size, limits.cache_bytes

    limits = MemoryLimits(4, cache_bytes=1000, notify=notes.append, offload=offload)
    assert limits.run(work) == (2, 1000)
    assert [note.split(": ")[1].split(" ")[0] for note in notes] == [
        *("batch", "batch", "cache", "weights", "batch")
    ]
    limits = MemoryLimits(2, offload=lambda: offloaded.pop() and "weights wait")
    assert limits.run(lambda: limits.candidates, candidates=8) == 64


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


PROMPTS = tuple(Prompt(text) for text in ("please make a cake", "how do I get to Rome", "hello"))


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model", tiny_llama())


def as_on_accelerator(monkeypatch, lm):
    """The weights count as on an accelerator, which is full until the layers are offloaded."""
    monkeypatch.setattr(placement, "on_accelerator", lambda tensor: True)

    def full(*args):
        if not is_offloaded(lm.architecture.layers[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    lm.architecture.layers[-1].register_forward_pre_hook(full)


def results(lm, notify):
    """What an engine of batch size 2 says of a model, without an edit and with one."""
    engine = Engine(lm, 2, cache_bytes=2**20, notify=notify)
    site = lm.architecture.sites[0]
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, site.weight().shape[0], 1, generator=generator) / 8
    plan = {site.key: Operator(left, right)}
    return [
        engine.residual_mean(PROMPTS, 1.0),
        engine.hidden_states_of([None, plan], PROMPTS, 3),
        torch.tensor([r.tokens for r in engine.responses(PROMPTS, 4)]),
    ]


def test_weights_are_offloaded_last_and_results_stay_the_same(monkeypatch, folder):
    lm, notes = load_tiny_model(folder), []
    expected = results(load_tiny_model(folder), notes.append)
    assert not notes
    as_on_accelerator(monkeypatch, lm)
    offloaded = results(lm, notes.append)
    assert [note.split(" ")[4] for note in notes] == ["size", "memory", "layers'"]
    assert "GiB) wait in the machine's memory until they run" in notes[-1]
    for one, two in zip(expected, offloaded, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "problem", ["cpu", "no memory", "hooks", "not enough", "past hooks", "cache past hooks"]
)
def test_where_weights_cannot_be_offloaded_the_run_stops_with_the_estimate(
    monkeypatch, folder, problem
):
    lm = load_tiny_model(folder)
    as_on_accelerator(monkeypatch, lm)
    layer = lm.architecture.layers[0]
    if problem == "cpu":
        monkeypatch.undo()
    elif problem == "no memory":
        monkeypatch.setattr(placement, "free_memory", lambda device: 1000)
    elif problem == "hooks":
        layer._hf_hook = object()
    elif problem == "not enough":
        always = torch.OutOfMemoryError("CUDA out of memory")
        monkeypatch.setattr(lm.body, "forward", lambda **_: (_ for _ in ()).throw(always))
    elif problem == "cache past hooks":

        def pre(module, args, parts):
            if parts.get(lm.capabilities.cache_argument) is not None:
                assert not is_offloaded(module)

        layer.register_forward_pre_hook(pre, with_kwargs=True)
    else:
        layer.register_forward_pre_hook(
            lambda module, _: module.mlp.down_proj.weight.sum().item() and None
        )
    before = {name: values.clone() for name, values in lm.model.state_dict().items()}
    with pytest.raises(
        MeasurementError,
        match=r"need about [\d.]+ GiB .*: use shorter .*--device-map auto or a lar",
    ):
        Engine(lm, 1).residual_mean(PROMPTS, 1.0)
    if hasattr(layer, "_hf_hook"):
        del layer._hf_hook
    assert not is_offloaded(lm.model)
    after = lm.model.state_dict()
    assert all(torch.equal(values, after[name]) for name, values in before.items())


def test_where_weights_do_not_go_back_the_run_stops_with_one_line(monkeypatch, folder):
    """What the failed check left is free by then."""
    lm, left = load_tiny_model(folder), []
    as_on_accelerator(monkeypatch, lm)
    monkeypatch.setattr(placement, "clear_device_memory", lambda: left.append("cleared"))

    def past_hooks(module, args):
        module.mlp.down_proj.weight.sum().item()

    def full(module):
        left.append("back")
        raise torch.OutOfMemoryError("CUDA out of memory")

    lm.architecture.layers[0].register_forward_pre_hook(past_hooks)
    monkeypatch.setattr("accelerate.hooks.remove_hook_from_submodules", full)
    with pytest.raises(MeasurementError, match=r"the device has no room for them any more: end"):
        Engine(lm, 1).residual_mean(PROMPTS, 1.0)
    assert left == ["cleared", "back"]
