"""The KL as a training loss inside a transformers Trainer."""

import copy

import pytest
import torch
from trainers import (
    BENIGN,
    MAIN,
    KLTrainer,
    logged,
    lora,
    same,
    tiny,
    trainer,
    weights,
)
from transformers import Trainer

from heretic_kl.kl import kl_divergence_loss
from heretic_kl.testing import tiny_gpt2

# PEFT asks for the old name, and the new one is not there in all versions that are supported.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("options", [{"benign_dataset": None}, {"teacher": tiny(seed=3)}])
def test_beta_nought_is_the_plain_trainer_bit_for_bit(tmp_path, options):
    runs = []
    for kind, more in ((Trainer, {}), (KLTrainer, {"beta_kl": 0, **options})):
        found = trainer(tmp_path, tiny(tiny_gpt2), kind, {"max_steps": 6}, **more)
        found.train()
        runs.append(found)
    plain, off = runs
    assert same(weights(plain.model), weights(off.model))
    history = [entry for entry in off.state.log_history if "loss" in entry]
    assert all("loss_kl" not in entry and "beta_kl" not in entry for entry in history)
    assert logged(plain, "loss") == logged(off, "loss")


def test_the_teacher_is_frozen_and_stays_as_it_was(tmp_path):
    teacher = tiny(tiny_gpt2, seed=3)
    before = weights(teacher)
    found = trainer(tmp_path, tiny(tiny_gpt2), teacher=teacher)
    start = weights(found.model)
    found.train()
    assert same(weights(teacher), before) and not same(weights(found.model), start)
    assert all(p.grad is None for p in teacher.parameters())


def test_without_a_teacher_it_is_the_model_as_it_was(tmp_path):
    found = trainer(tmp_path)
    before = weights(found.model)
    found.train()
    assert same(weights(found._kl.teacher), before)
    assert not any(p.requires_grad for p in found._kl.teacher.parameters())
    first, second = logged(found, "loss_kl")
    assert first == 0.0 < second


def test_the_gradient_is_that_of_both_losses(tmp_path):
    model, teacher = tiny(), tiny(seed=3)
    twin = copy.deepcopy(model)
    found = trainer(
        tmp_path,
        model,
        teacher=teacher,
        beta_kl=0.5,
        kl_temperature=2.0,
        arguments={"max_steps": 1, "max_grad_norm": 1e9},
        train_dataset=MAIN[:4],
        benign_dataset=BENIGN[:4],
    )
    found.train()
    main = {key: torch.tensor([item[key] for item in MAIN[:4]]) for key in MAIN[0]}
    benign = {key: torch.tensor([item[key] for item in BENIGN[:4]]) for key in BENIGN[0]}
    loss = twin(**main).loss
    divergence = kl_divergence_loss(
        twin(benign["input_ids"]).logits,
        teacher.eval()(benign["input_ids"]).logits,
        loss_mask=benign["labels"] != -100,
        temperature=2.0,
    )
    (loss + 0.5 * divergence).backward()
    for gradient, parameter in zip(found.gradients, twin.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
    assert logged(found, "loss_kl")[0] == pytest.approx(divergence.item(), rel=1e-5)
    assert logged(found, "loss")[0] == pytest.approx((loss + 0.5 * divergence).item(), rel=1e-5)


@pytest.mark.parametrize("case", ["copy", "given", "adapter"])
def test_dropout_is_off_in_the_teacher_alone(tmp_path, case):
    model = lora(tiny()) if case == "adapter" else tiny(tiny_gpt2)
    given = tiny(tiny_gpt2).train() if case == "given" else None
    found = trainer(tmp_path, model, teacher=given, arguments={"max_steps": 1})
    modes = []
    for each in {model, found._kl.teacher or model}:
        each.register_forward_pre_hook(lambda m, args: modes.append((m is model, m.training)))
    found.train()
    assert modes == [(True, True), (case == "adapter", False), (True, True)]
    assert logged(found, "loss_kl")[0] > 0
    assert given is None or given.training


def test_all_benign_items_have_their_turn(tmp_path):
    drawn = []

    class Recording(list):
        def __getitem__(self, index):
            drawn.append(index)
            return super().__getitem__(index)

    found = trainer(
        tmp_path,
        benign_dataset=Recording(BENIGN),
        benign_batch_size=2,
        arguments={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    )
    found.train()
    assert len(drawn) == 2 * 2 * 2 and sorted(drawn) == list(range(8))


def test_benign_batches_do_not_move_the_main_ones(tmp_path):
    class Recording(KLTrainer):
        def compute_loss(self, model, inputs, **options):
            self.seen = [*getattr(self, "seen", []), inputs["input_ids"].clone()]
            return super().compute_loss(model, inputs, **options)

    seen = []
    for beta in (0, 0.3):
        # Three epochs, with dropout.
        found = trainer(tmp_path, tiny(tiny_gpt2), Recording, {"max_steps": 9}, beta_kl=beta)
        found.train()
        seen.append(found.seen)
    assert same(*seen)


# --- PEFT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_teacher_of_an_adapter_is_its_base(tmp_path, checkpointing):
    base = tiny()
    twin = copy.deepcopy(base)
    found = trainer(
        tmp_path, lora(base), arguments={"max_steps": 1, "gradient_checkpointing": checkpointing}
    )
    assert found._kl.teacher is None
    batch = {"input_ids": torch.tensor([item["input_ids"] for item in BENIGN])}
    with torch.no_grad():
        logits = found._teacher_logits(None, found.model, batch)
        torch.testing.assert_close(logits, twin(**batch).logits)
        assert not torch.allclose(logits, found.model(**batch).logits)
    flags = {name: p.requires_grad for name, p in found.model.named_parameters()}
    start = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    found.train()
    assert {name: p.requires_grad for name, p in found.model.named_parameters()} == flags
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, start[name]) != ("lora_" in name), name
    assert logged(found, "loss_kl")[0] > 0


def test_checkpointing_changes_nothing_but_memory(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        once = {"max_steps": 1, "gradient_checkpointing": checkpointing}
        found = trainer(tmp_path, lora(tiny()), arguments=once)
        found.train()
        gradients.append([g for g in found.gradients if g is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_a_frozen_adapter_beside_the_trained_one_stays_frozen(tmp_path):
    model = lora(tiny())
    frozen = [n for n, _ in model.named_parameters() if "lora_" in n and "layers.0" in n]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and name not in frozen)
    found = trainer(tmp_path, model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    found.train()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name and name not in frozen)
        assert name not in frozen or torch.equal(parameter, start[name])
