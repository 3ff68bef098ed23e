"""Schedules, logs and evaluation of the mixin, and its wrong uses."""

import pytest
import torch
from trainers import BENIGN, MAIN, VOCABULARY, KLTrainer, logged, lora, tiny, trainer
from transformers import Trainer

from heretic_kl.integrations import TeacherForcedKLMixin

# PEFT asks for the old name, and the new one is not there in all versions that are supported.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing`:FutureWarning")


class Retaining(KLTrainer):
    max_retain_weight = 0.5

    def retain_weight(self):
        return 0.5 * self.training_progress()


@pytest.mark.parametrize(
    ("kind", "schedule", "betas"),
    [
        (KLTrainer, "constant", [0.4, 0.4, 0.4, 0.4]),
        (KLTrainer, "retain", [0.4, 0.4, 0.4, 0.4]),
        (Retaining, "retain", [0.0, 0.1, 0.2, 0.3]),
        (KLTrainer, lambda progress: 1 - progress, [0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_schedules(tmp_path, kind, schedule, betas):
    options = {"teacher": tiny(seed=3), "beta_kl": 0.4, "beta_schedule": schedule}
    found = trainer(tmp_path, kind=kind, arguments={"max_steps": 4}, **options)
    found.train()
    assert logged(found, "beta_kl") == pytest.approx(betas)
    assert len(logged(found, "loss_kl")) == sum(beta > 0 for beta in betas)


def test_the_logged_divergence_is_the_mean_since_the_last_log(tmp_path):
    rows = []
    for every in (1, 2):
        found = trainer(
            tmp_path, teacher=tiny(seed=3), arguments={"max_steps": 4, "logging_steps": every}
        )
        found.train()
        rows.append(logged(found, "loss_kl"))
    each, pairs = rows
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2])


def test_evaluation_is_the_main_loss(tmp_path):
    found = trainer(tmp_path, teacher=tiny(seed=3), eval_dataset=MAIN)
    found.train()
    result = found.evaluate()
    plain = trainer(tmp_path, found.model, Trainer, eval_dataset=MAIN)
    assert result["eval_loss"] == plain.evaluate()["eval_loss"]
    assert "loss_kl" not in result
    assert found.predict(MAIN).metrics["test_loss"] == result["eval_loss"]


def test_a_benign_collator_of_ones_own(tmp_path):
    def stack(rows):
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    rows = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}] * 4
    found = trainer(tmp_path, teacher=tiny(seed=3), benign_dataset=rows, benign_collator=stack)
    found.train()
    assert all(value > 0 for value in logged(found, "loss_kl"))


# --- wrong use ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_kl": -0.1}, "beta_kl must be a number of at least 0, got -0.1"),
        ({"beta_kl": float("nan")}, "beta_kl must be"),
        ({"kl_temperature": 0.0}, "kl_temperature must be positive, got 0"),
        ({"benign_dataset": None}, "beta_kl is 0.3 but there is no benign_dataset"),
        ({"benign_dataset": iter(BENIGN)}, "items by number, got list_iterator"),
        ({"benign_dataset": []}, "benign_dataset is empty"),
        ({"benign_batch_size": 0}, "benign_batch_size must be at least 1, got 0"),
        ({"beta_schedule": "linear"}, "beta_schedule must be .* got 'linear'"),
        ({"teacher": tiny(vocab_size=99)}, f"vocabularies: {VOCABULARY} and 99 tokens"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_a_teacher_that_would_be_trained_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="shares weights that are trained"):
        trainer(tmp_path, model, teacher=model)
    adapted = lora(tiny())
    with pytest.raises(ValueError, match="shares weights that are trained"):
        trainer(tmp_path, adapted, teacher=adapted.get_base_model())
    next(adapted.get_base_model().parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="disabling the adapters leaves in place"):
        trainer(tmp_path, adapted)


def test_schedules_out_of_range_are_one_line(tmp_path):
    found = trainer(tmp_path, beta_schedule=lambda progress: -1.0)
    with pytest.raises(ValueError, match="beta_schedule must return .* got -1"):
        found.train()
    found = trainer(tmp_path, beta_schedule="retain")
    found.retain_weight = lambda: 1.5
    with pytest.raises(ValueError, match=r"retain_weight\(\) must be in \[0, 1\], got 1.5"):
        found.train()


def test_a_mixin_that_would_not_run_is_refused(tmp_path):
    with pytest.raises(TypeError, match="Backwards must name TeacherForcedKLMixin before Trainer"):

        class Backwards(Trainer, TeacherForcedKLMixin):
            pass

    class Own(KLTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    with pytest.raises(TypeError, match="compute_loss of Own must call super"):
        trainer(tmp_path, kind=Own).train()
