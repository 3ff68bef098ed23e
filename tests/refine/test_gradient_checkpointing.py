"""Refinement with layers recomputed in the backward pass: the same gradients from less memory."""

from contextlib import nullcontext
from threading import Thread

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine, forced_sequences
from heretic_kl.model import edited, gradient_checkpointing
from heretic_kl.model.transformers_logging import quiet_transformers
from heretic_kl.prompts import Prompt
from heretic_kl.refine.objective import Example, Objective
from heretic_kl.refine.openings import OpeningSet
from heretic_kl.refine.parameters import LearnableEdit
from heretic_kl.refine.training import Prompts, RefineOptions, refine
from heretic_kl.testing import (
    TINY_CONFIGS,
    load_tiny_model,
    save_tiny_model,
    tiny_tokenizer,
    zoo,
)

SYSTEM = "please tell me about the weather in Rome and then wait I will not mix flour"
HARMLESS = tuple(Prompt(text, SYSTEM) for text in ("how do I make a cake", "tell me", "I wait"))
HARMFUL = tuple(Prompt(text, SYSTEM) for text in ("how do I make a bomb", "bomb Rome please"))
OPENINGS = OpeningSet(((5,), (6, 7)))


def model(family, folder):
    if family in TINY_CONFIGS:
        depth = {"n_layer": 8} if family == "gpt2" else {"num_hidden_layers": 8}
        return load_tiny_model(save_tiny_model(folder, TINY_CONFIGS[family](**depth)))
    with quiet_transformers():
        zoo.tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_tiny_model(folder)


@pytest.fixture(
    scope="module", params=["llama", "gemma2", "gpt2", "qwen3_moe", "gemma3n_text", "zamba2"]
)
def lm(request, tmp_path_factory):
    return model(request.param, tmp_path_factory.mktemp(request.param))


def start_of(lm):
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(2))
    return {key: ablation_operator(direction, 0.4) for key in lm.architecture.facts()}


def prompts_of(engine):
    reference = engine.reference(HARMLESS, 3)
    counts = [len(sequence.scored) for sequence in forced_sequences(reference)]
    hidden = reference.hidden.split(counts)
    examples = [Example(*pair) for pair in zip(forced_sequences(reference), hidden, strict=True)]
    return Prompts(examples, [tuple(engine.encode(prompt)) for prompt in HARMFUL])


def step(lm, checkpointing):
    """(gradients by name, bytes of activations that the graph holds) of one step."""
    engine = Engine(lm, batch_size=2)
    prompts = prompts_of(engine)
    layers = lm.architecture.layers if checkpointing else ()
    objective = Objective(engine.runner, lm.head, OPENINGS, checkpointed=layers)
    edit = LearnableEdit(start_of(lm))
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with edited(lm.architecture, edit.plan):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = objective.terms(prompts.harmless, prompts.harmful)
        loss = terms.kl.mean() + terms.log_mass.mean()
        # On a GPU autograd runs in threads of its own, which see no context variable of this one.
        backward = Thread(target=loss.backward)
        backward.start()
        backward.join()
    gradients = {name: p.grad for name, p in edit.named_parameters()}
    return gradients, sum(storages.values())


@pytest.mark.parametrize("trees", [True, False], ids=["trees", "rectangles"])
def test_gradients_are_the_same_and_fewer_activations_are_held(lm, trees):
    lm = lm if trees else lm.limited(tree_problem="off")
    before = lm.model.config._attn_implementation
    plain, held = step(lm, checkpointing=False)
    again, held_again = step(lm, checkpointing=True)
    assert plain.keys() == again.keys() and any(g.abs().max() > 1e-4 for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    if len(lm.architecture.layers) == 8:
        assert held_again < 0.5 * held
    assert lm.model.config._attn_implementation == before
    assert not any("forward" in vars(layer) for layer in lm.architecture.layers)


def test_passes_without_gradients_run_layers_as_they_are(lm, monkeypatch):
    engine, wrapped = Engine(lm, batch_size=2), []
    prompts = prompts_of(engine)
    name = "heretic_kl.refine.objective.gradient_checkpointing"
    monkeypatch.setattr(name, lambda layers: wrapped.append(layers) or nullcontext())
    layers = lm.architecture.layers
    objective = Objective(engine.runner, lm.head, OPENINGS, checkpointed=layers)
    with torch.no_grad():
        objective.terms(prompts.harmless, prompts.harmful)
    objective.terms(prompts.harmless, prompts.harmful)
    assert wrapped == [(), layers]


def test_a_layer_that_stands_twice_in_the_list_runs_again_once(lm):
    layer = lm.architecture.layers[0]
    with gradient_checkpointing([layer, layer]):
        assert layer.forward.args[0].__self__ is layer
    assert "forward" not in vars(layer)


def test_the_refined_edit_is_the_same_within_rounding(lm):
    engine = Engine(lm, batch_size=2)
    prompts = prompts_of(engine)
    options = RefineOptions(steps=6, check_every=3, warmup=1, mass_limit=1.0)
    plain, again = (
        refine(
            start_of(lm),
            lm.architecture,
            Objective(engine.runner, lm.head, OPENINGS, checkpointed=layers),
            prompts,
            prompts,
            options,
        )
        for layers in ((), lm.architecture.layers)
    )
    assert plain.best.step == again.best.step > 0
    for key, operator in plain.plan.items():
        torch.testing.assert_close(again.plan[key].left, operator.left, rtol=1e-2, atol=1e-3)
