"""The mixin with accumulation, mixed precision and resuming."""

import pytest
import torch
from trainers import (
    MAIN,
    KLTrainer,
    logged,
    same,
    tiny,
    trainer,
    weights,
)

# PEFT asks for the old name, and the new one is not there in all versions that are supported.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing`:FutureWarning")


def accumulated(folder, steps, **options):
    return trainer(
        folder,
        tiny(),
        teacher=tiny(seed=3),
        train_dataset=MAIN[:4],
        arguments={
            "max_steps": 1,
            "max_grad_norm": 1e9,
            "per_device_train_batch_size": 4 // steps,
            "gradient_accumulation_steps": steps,
        },
        **options,
    )


@pytest.mark.parametrize("case", ["tokens counted", "not counted", "own loss", "forgetful"])
def test_accumulating_is_one_large_batch(tmp_path, case):
    def own_loss(outputs, labels, num_items_in_batch=None):
        each = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return each / num_items_in_batch

    class Forgetful(KLTrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs)

    gradients, losses = [], []
    for steps in (1, 2, 4):
        options = {"compute_loss_func": own_loss} if case == "own loss" else {}
        kind = Forgetful if case == "forgetful" else KLTrainer
        found = accumulated(tmp_path, steps, kind=kind, **options)
        if case == "not counted":
            found.model_accepts_loss_kwargs = False
        found.train()
        gradients.append(found.gradients)
        losses.append((logged(found, "loss")[0], logged(found, "loss_kl")[0]))
    for other in gradients[1:]:
        for first, second in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    assert losses[0][1] > 0.01
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_bfloat16_autocast_reaches_both(tmp_path):
    model = tiny()
    found = trainer(tmp_path, model, arguments={"bf16": True, "max_grad_norm": 1e9})
    found.train()
    first, second = logged(found, "loss_kl")
    assert first == 0.0 < second  # Float32 beside bfloat16 would differ from the start.
    assert all(g is not None and g.isfinite().all() for g in found.gradients)


def test_a_teacher_in_another_dtype(tmp_path):
    found = trainer(tmp_path, teacher=tiny().bfloat16())
    found.train()
    assert all(value > 0 for value in logged(found, "loss_kl"))
    assert next(found._kl.teacher.parameters()).dtype == torch.bfloat16


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    arguments |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = trainer(tmp_path, arguments=arguments)
    whole.train()
    again = trainer(tmp_path, arguments=arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert same(weights(whole.model), weights(again.model))
    assert logged(whole, "loss_kl") == logged(again, "loss_kl")
