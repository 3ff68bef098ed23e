"""What the callback reports, and that a training does not notice it."""

import json
import random
import warnings

import pytest
import torch

from heretic_kl.errors import MeasurementError
from heretic_kl.integrations import TeacherForcedKLCallback
from heretic_kl.score import TeacherForcedKL
from heretic_kl.testing import save_tiny_model, tiny_llama, tiny_tokenizer

PROMPTS = ["make a cake", "tell me about Rome", "wait please"]
OPTIONS = {"prompts": PROMPTS, "kl_tokens": 3}
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_llama(attention_dropout=0.2)
    return save_tiny_model(tmp_path_factory.mktemp("m") / "m", config)


class Lines(torch.utils.data.Dataset):
    """Random token ids; drawn from the global generator, so that a disturbed one shows."""

    def __init__(self, size=24):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        tokens = torch.randint(4, 20, (8,))
        return {"input_ids": tokens, "labels": tokens}


def recorder(kept):
    """Stands where TensorBoard would."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            kept.append((state.global_step, dict(logs)))

    return Recorder()


def trainer(folder, out, callbacks, **options):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    arguments = TrainingArguments(
        **{
            "output_dir": str(out),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "seed": 3,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **options,
        }
    )
    return Trainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        arguments,
        train_dataset=Lines(),
        eval_dataset=Lines(4),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


@pytest.fixture
def quiet(capsys):
    """Trainers print their logs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    capsys.readouterr()


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def figures(run):
    return [entry for entry in run.state.log_history if "teacher_forced_kl" in entry]


def test_training_is_bit_for_bit_what_it_was_without(folder, tmp_path, quiet):
    plain = trainer(folder, tmp_path / "a", [])
    plain.train()
    callback = TeacherForcedKLCallback(every_steps=2, **OPTIONS)
    watched = trainer(folder, tmp_path / "b", [callback])
    callback.report_to(watched)
    watched.train()
    assert losses(plain) == losses(watched) and len(losses(plain)) == STEPS // 2
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, watched.model.state_dict()[name]), name
    assert [step for step, _ in callback.history] == [0, 2, 4, 6]


def test_measuring_touches_no_generator_no_gradient_and_no_mode(folder, tmp_path, quiet):
    callback = TeacherForcedKLCallback(**OPTIONS)
    run = trainer(folder, tmp_path, [callback])
    model = run.model.train()
    model.model.layers[0].eval()
    model(input_ids=torch.tensor([[4, 5]]), labels=torch.tensor([[4, 5]])).loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    before = torch.get_rng_state(), random.getstate()
    run.callback_handler.on_train_begin(run.args, run.state, run.control)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert callback.kl.noise_floor is not None and len(callback.history) == 1
    assert model.training and not model.model.layers[0].training
    for name, weight in model.named_parameters():
        assert weight.requires_grad and torch.equal(weight.grad, gradients[name]), name


def test_figures_begin_at_zero_grow_and_reach_every_report_once(folder, tmp_path, quiet):
    reports = []
    callback = TeacherForcedKLCallback(every_steps=4, **OPTIONS)
    run = trainer(folder, tmp_path, [callback, recorder(reports)])
    callback.report_to(run)
    run.train()
    ours = [(step, logs) for step, logs in reports if "teacher_forced_kl" in logs]
    assert [step for step, _ in ours] == [0, 4, 6] == [entry["step"] for entry in figures(run)]
    first, _, last = (logs for _, logs in ours)
    assert first["teacher_forced_kl"] == 0.0 and first["teacher_forced_kl_top1_agreement"] == 1.0
    assert last["teacher_forced_kl"] > last["teacher_forced_kl_noise_floor"] >= 0.0
    assert last["teacher_forced_kl_standard_error"] > 0.0
    json.dumps(run.state.log_history, allow_nan=False)


def test_without_a_log_figures_stand_in_the_history_of_the_state(folder, tmp_path, quiet):
    callback = TeacherForcedKLCallback(every_steps=3, **OPTIONS)
    run = trainer(folder, tmp_path, [callback])
    run.train()
    assert [entry["step"] for entry in figures(run)] == [0, 3, 6]
    assert figures(run)[-1]["teacher_forced_kl"] == callback.history[-1][1].kl > 0.0


def test_each_evaluation_is_measured_where_steps_are_not_counted(folder, tmp_path, quiet):
    callback = TeacherForcedKLCallback(**OPTIONS)
    run = trainer(folder, tmp_path, [callback], eval_strategy="steps", eval_steps=4)
    callback.report_to(run)
    run.train()
    assert [step for step, _ in callback.history] == [0, 4, 6]


def test_the_best_checkpoint_is_what_the_end_is_measured_of(folder, tmp_path, quiet):
    callback = TeacherForcedKLCallback(every_steps=100, **OPTIONS)
    run = trainer(
        folder,
        tmp_path,
        [callback],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    run.train()
    assert callback.history[-1][1].kl == callback.kl.score(run.model).kl


def test_a_measurement_that_fails_does_not_end_the_training(folder, tmp_path, capsys):
    callback = TeacherForcedKLCallback(every_steps=2, **OPTIONS)
    run = trainer(folder, tmp_path, [callback], learning_rate=1e30, max_grad_norm=0.0)
    with pytest.warns(UserWarning, match=r"no teacher-forced KL at step \d: .*NaN"):
        run.train()
    assert run.state.global_step == STEPS and len(callback.history) == 1


def test_a_resumed_training_needs_its_reference(folder, tmp_path, quiet):
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(folder, tmp_path, [], **options).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(MeasurementError, match="resumes at step 3"):
        trainer(folder, tmp_path, [TeacherForcedKLCallback(**OPTIONS)], **options).train(
            resume_from_checkpoint=checkpoint
        )
    given = TeacherForcedKLCallback(TeacherForcedKL(folder, **OPTIONS))
    trainer(folder, tmp_path, [given], **options).train(resume_from_checkpoint=checkpoint)
    assert [step for step, _ in given.history] == [3, 6]
    assert given.history[0][1].kl > 0.0


def test_mixed_precision_is_measured_too(folder, tmp_path, quiet):
    callback = TeacherForcedKLCallback(every_steps=3, **OPTIONS)
    trainer(folder, tmp_path, [callback], bf16=True).train()
    assert callback.history[0][1].kl == 0.0 and callback.history[-1][1].kl > 0.0


def test_what_mixed_precision_does_to_logits_is_no_fault_of_the_head(folder):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kl = TeacherForcedKL(model, tiny_tokenizer(), **OPTIONS)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert prepared is model and hasattr(model, "_original_forward")
    coarse = model.forward
    # Deeper models are off by more than this tiny one is.
    model.forward = lambda **fed: _scaled(coarse(**fed), 1.05)
    assert kl.score(model).kl == 0.0


def _scaled(output, factor):
    output.logits = output.logits * factor
    return output


def test_other_processes_measure_nothing(folder, tmp_path, quiet):
    callback = TeacherForcedKLCallback(**OPTIONS)
    run = trainer(folder, tmp_path, [callback])
    run.state.is_world_process_zero = False
    run.callback_handler.on_train_begin(run.args, run.state, run.control)
    assert callback.kl is None and not callback.history


def test_wrong_arguments_are_refused(folder):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TeacherForcedKLCallback(every_steps=0)
    with pytest.raises(ValueError, match="kl_tokens cannot be changed"):
        TeacherForcedKLCallback(object(), kl_tokens=3)
