"""The KL as a training loss inside a transformers Trainer."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from heretic_kl.integrations import TeacherForcedKLMixin
from heretic_kl.kl import kl_divergence_loss
from heretic_kl.testing import tiny_gpt2, tiny_llama, tiny_tokenizer

# PEFT asks for the old name, and the new one is not there in all versions that are supported.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing`:FutureWarning")

TOKENIZER = tiny_tokenizer()
VOCABULARY = len(TOKENIZER)


class KLTrainer(TeacherForcedKLMixin, Trainer):
    """The class a user writes; remembers the gradients of every optimizer step."""

    gradients: list

    def _clip_grad_norm(self, model):
        self.gradients = [
            None if p.grad is None else p.grad.clone() for p in self.model.parameters()
        ]
        return super()._clip_grad_norm(model)


def items(count, seed, length=8, prompt=3):
    """Sequences of one length with so many tokens of prompt."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
        labels = [-100] * prompt + ids[prompt:]
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return found


MAIN, BENIGN = items(12, 1), items(8, 2)


def tiny(config=tiny_llama, seed=0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(**changes))


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def trainer(folder, model=None, kind=KLTrainer, arguments=None, **options):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **(arguments or {}),
    }
    if issubclass(kind, TeacherForcedKLMixin):
        options = {"benign_dataset": BENIGN, **options}
    options = {"train_dataset": MAIN, "data_collator": DataCollatorForSeq2Seq(TOKENIZER), **options}
    return kind(tiny() if model is None else model, TrainingArguments(**arguments), **options)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def logged(found, key):
    return [entry[key] for entry in found.state.log_history if key in entry]


# --- what is trained, what is not --------------------------------------------------------------


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


# --- accumulation, precision, resuming ---------------------------------------------------------


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


# --- schedules, logs, evaluation ---------------------------------------------------------------


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
