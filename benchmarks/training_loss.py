"""Does the KL as a training loss keep benign behaviour, and what does it cost the main task?

    python benchmarks/training_loss.py [--steps 16] [--seeds 2] [--threads 2] [--base FOLDER]

The demo model (SmolLM2-135M taught to refuse) is fine-tuned with LoRA to answer what it refuses:
the first tokens of the untaught base model's own responses to the built-in refusal-eliciting train
prompts. `TeacherForcedKLMixin` adds `beta_kl` times the KL to the model with its adapter disabled,
on that model's own greedy responses to the built-in harmless train prompts. Prompts that the base
(main task) or the demo model (benign) refuses are left out: there, a refusal is no lesson.

Held out: main loss and refusals on the validation prompts, the KL objective on harmless validation
prompts, teacher-forced KL on harmless test prompts. No response is kept, only figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import library_versions, machine_facts
from torch import Tensor, nn
from training_loss_table import summarize, table

BETAS = (0.0, 0.1, 0.3, 0.5)
TEMPERATURE = 2.0
RESPONSE_TOKENS = 24
KL_TOKENS = 8
TRAIN_PROMPTS, HELD_OUT_PROMPTS = 64, 32
BATCH = 4
LEARNING_RATE = 1e-3
RANK = 8
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Lesson = dict[str, list[int]]


def log(message: str) -> None:
    """Progress, for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


# --- lessons ----------------------------------------------------------------------------------


def load(folder: Path) -> Any:
    """The model in float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def built_in(name: str, split: str, limit: int) -> list[str]:
    """Texts of a built-in prompt set."""
    from heretic_kl.prompts import DatasetSpec, load_prompts

    return [prompt.user for prompt in load_prompts(DatasetSpec(f"builtin:{name}", split))][:limit]


@torch.inference_mode()
def responses(model: Any, tokenizer: Any, texts: list[str]) -> tuple[list[list[int]], list[Lesson]]:
    """Prompt ids and greedy responses (with the end token, if it came) as lessons."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=RESPONSE_TOKENS, do_sample=False)
    found, lessons = [], []
    for prompt, row in zip(prompts, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        end = tokenizer.eos_token_id
        response = row[: row.index(end) + 1] if end in row else row
        found.append(response)
        ids = prompt + response
        lessons.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [-100] * len(prompt) + response,
            }
        )
    return found, lessons


def refused(tokenizer: Any, found: list[list[int]]) -> list[bool]:
    """The verdict of the package's keyword rule on each response."""
    from heretic_kl.scoring import RefusalRule

    rule = RefusalRule()
    return [rule.is_refusal(text) for text in tokenizer.batch_decode(found, True)]


def not_refused(model: Any, tokenizer: Any, texts: list[str]) -> tuple[list[str], list[Lesson]]:
    """The prompts that the model answers, and its responses."""
    found, lessons = responses(model, tokenizer, texts)
    keep = [not verdict for verdict in refused(tokenizer, found)]
    kept = [text for text, good in zip(texts, keep, strict=True) if good]
    return kept, [lesson for lesson, good in zip(lessons, keep, strict=True) if good]


# --- measuring --------------------------------------------------------------------------------


def batched(lessons: list[Lesson], collator: Any) -> list[dict[str, Tensor]]:
    """Fixed batches, for evaluation."""
    return [dict(collator(lessons[i : i + 16])) for i in range(0, len(lessons), 16)]


def fed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model sees."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def main_losses(model: Any, batches: list[dict[str, Tensor]]) -> list[float]:
    """Nats per response token, of each pair."""
    losses: list[float] = []
    for batch in batches:
        logits, labels = model(**fed(batch)).logits[:, :-1], batch["labels"][:, 1:]
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        losses += (each.sum(1) / (labels != -100).sum(1)).tolist()
    return losses


def benign_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The added term before beta: T^2 KL at the temperature of training."""
    from heretic_kl.kl import kl_divergence_loss

    with torch.no_grad(), model.disable_adapter():
        teacher = model(**fed(batch)).logits
    student = model(**fed(batch)).logits
    kept = batch["labels"] != -100
    return kl_divergence_loss(student, teacher, batch["attention_mask"], kept, TEMPERATURE)


@torch.no_grad()
def benign_objective(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """The same over all batches, each weighted by its kept tokens."""
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    values = [benign_loss(model, batch).item() for batch in batches]
    return sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)


def gradient_norms(model: Any, main: dict[str, Tensor], benign: dict[str, Tensor]) -> Any:
    """Norms of both terms' gradients with respect to the adapter, each on one held-out batch."""
    weights = [p for p in model.parameters() if p.requires_grad]

    def norm(loss: Tensor) -> float:
        return math.sqrt(sum(float((g**2).sum()) for g in torch.autograd.grad(loss, weights)))

    return {
        "main": norm(model(**fed(main), labels=main["labels"]).loss),
        "kl": norm(benign_loss(model, benign)),
    }


# --- runs -------------------------------------------------------------------------------------


class Bench:
    """The models' responses and what is measured against, made once."""

    def __init__(self, base: Path, limit: int, demo: Path | None = None) -> None:
        from transformers import AutoTokenizer, DataCollatorForSeq2Seq

        from heretic_kl import TeacherForcedKL
        from heretic_kl.demo import ensure_demo_model

        self.demo = load(demo or ensure_demo_model(notify=log))
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.collator = DataCollatorForSeq2Seq(self.tokenizer)
        teller = load(base)
        train, held_out = min(limit, TRAIN_PROMPTS), min(limit, HELD_OUT_PROMPTS)
        self.asked = built_in("harmful", "validation", held_out)
        asked = {
            "train": built_in("harmless", "train", train),
            "search": built_in("harmless", "validation", held_out),
            "report": built_in("harmless", "test", limit),
        }
        _, self.pairs = not_refused(teller, self.tokenizer, built_in("harmful", "train", train))
        _, held = not_refused(teller, self.tokenizer, self.asked)
        _, self.benign = not_refused(self.demo, self.tokenizer, asked["train"])
        _, same = not_refused(self.demo, self.tokenizer, asked["search"])
        kept, _ = not_refused(self.demo, self.tokenizer, asked["report"])
        self.held_main, self.held_benign = (
            batched(held, self.collator),
            batched(same, self.collator),
        )
        self.kl = TeacherForcedKL(
            self.demo,
            self.tokenizer,
            prompts=kept,
            kl_tokens=KL_TOKENS,
            noise_floor=False,
        )
        self.sizes = {
            "main_pairs": len(self.pairs),
            "held_out_main_pairs": len(held),
            "benign_responses": len(self.benign),
            "held_out_benign_responses": len(same),
            "test_prompts": len(kept),
            "refusal_prompts": len(self.asked),
        }
        log(f"lessons: {self.sizes}")

    def measure(self, model: Any) -> dict[str, Any]:
        """What is held out, of a model in evaluation mode."""
        losses = main_losses(model, self.held_main)
        measured = self.kl.score(model)
        verdicts = refused(self.tokenizer, responses(model, self.tokenizer, self.asked)[0])
        return {
            "main_loss": statistics.fmean(losses),
            "main_losses": losses,
            "teacher_forced_kl": measured.kl,
            "teacher_forced_kl_standard_error": measured.summary.standard_error,
            "refusals": sum(verdicts),
        }

    def run(
        self, beta: float, seed: int, steps: int, temperature: float = TEMPERATURE
    ) -> dict[str, Any]:
        """Train once, measure; the benign objective always at `TEMPERATURE`."""
        from peft import LoraConfig, get_peft_model
        from transformers import Trainer, TrainingArguments

        from heretic_kl.integrations.trainer import TeacherForcedKLMixin

        class KLTrainer(TeacherForcedKLMixin, Trainer):
            """The class a user writes."""

        torch.manual_seed(seed)
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=list(MODULES), task_type="CAUSAL_LM"
        )
        model = get_peft_model(copy.deepcopy(self.demo), config).eval()
        start = gradient_norms(model, self.held_main[0], self.held_benign[0])
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=LEARNING_RATE,
                warmup_steps=2,
                logging_steps=4,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            )
            trainer = KLTrainer(
                model,
                arguments,
                train_dataset=self.pairs,
                data_collator=self.collator,
                benign_dataset=self.benign,
                beta_kl=beta,
                kl_temperature=temperature,
            )
            trainer.train()
        model.eval()
        end = gradient_norms(model, self.held_main[0], self.held_benign[0])
        found = {
            "beta_kl": beta,
            "seed": seed,
            **self.measure(model),
            "benign_objective": benign_objective(model, self.held_benign),
            "gradient_norms": {"start": start, "end": end},
            "log": [
                {key: entry[key] for key in ("step", "loss", "loss_kl", "beta_kl") if key in entry}
                for entry in trainer.state.log_history
                if "loss" in entry
            ],
        }
        log(json.dumps({k: v for k, v in found.items() if k not in ("main_losses", "log")}))
        return found


def settings(steps: int) -> dict[str, Any]:
    """What decides the figures beside data and seeds."""
    return {
        "model": "demo model, 135M, float32",
        "steps": steps,
        "batch": BATCH,
        "benign_batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "lora_rank": RANK,
        "lora_alpha": 2 * RANK,
        "lora_modules": MODULES,
        "kl_temperature": TEMPERATURE,
        "response_tokens": RESPONSE_TOKENS,
        "kl_tokens": KL_TOKENS,
    }


def main() -> None:
    """Train all, summarize, print, write."""
    from heretic_kl.demo import ensure_base_model

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", type=Path, help="the base model, if it is built already")
    parser.add_argument(
        "--limit", type=int, default=64, help="so many prompts of each set; to try it out"
    )
    default = Path(__file__).parent / "results/training_loss.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    bench = Bench(arguments.base or ensure_base_model(notify=log), arguments.limit)
    before = bench.measure(bench.demo)
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        runs += [bench.run(beta, seed, arguments.steps) for beta in BETAS]
        # After each seed, so that hours of a slow machine are not lost.
        write(arguments, bench, before, runs, time.perf_counter() - start)


def write(
    arguments: argparse.Namespace,
    bench: Bench,
    before: dict[str, Any],
    runs: list[dict[str, Any]],
    seconds: float,
) -> None:
    """Print the table and keep everything."""
    summary = [summarize(runs, before, beta) for beta in BETAS]
    result = {
        "command": f"python benchmarks/training_loss.py --steps {arguments.steps} "
        f"--seeds {arguments.seeds} --threads {arguments.threads}",
        "date": date.today().isoformat(),
        "seeds": sorted({run["seed"] for run in runs}),
        "machine": machine_facts(arguments.threads),
        "versions": library_versions("peft", "accelerate"),
        "seconds": seconds,
        "settings": settings(arguments.steps),
        "sizes": bench.sizes,
        "before": before,
        "summary": summary,
        "table": table(summary, before, len(bench.asked)),
        "runs": runs,
    }
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print("\n".join(table(summary, before, len(bench.asked))), flush=True)


if __name__ == "__main__":
    main()
