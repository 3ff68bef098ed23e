"""Tiny trainers with the mixin, and their data."""

import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from heretic_kl.integrations import TeacherForcedKLMixin
from heretic_kl.testing import tiny_llama, tiny_tokenizer

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
