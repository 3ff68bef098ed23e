"""The neutral judge of a saved model against its reference: plain transformers, float32.

Uses no code of the project and of no tool that is compared. On prompts that no tool has seen:

- Refusals: greedy responses, judged by `refusal_rule.py`; k of n with Wilson's 95% interval, and
  evasive, degenerate and incapable responses beside them. For harmless prompts too.
- KL: teacher-forced, forward KL(reference || candidate) in nats, over the first tokens of the
  reference's own greedy responses (the end token included, nothing after it), over the harmless
  prompts that the reference does not refuse. Mean over positions of a prompt, then over prompts;
  the standard error is over prompts. `kl_by_token` weighs tokens equally (a ratio, its error
  linearised); `first_token_kl` is position 0 alone; `refused_kl` is over the harmless prompts that
  the reference refuses.

Both models pass through the same teacher-forced batches, so a candidate equal to its reference has
KL 0. Responses of the reference to harmless prompts are cached by content of weights, tokenizer,
prompts and settings; of responses to harmful prompts verdicts alone are kept.

    python -m benchmarks.search_quality.judge --reference MODEL --candidate EDITED --cache FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.search_quality.refusal_rule import RULE_VERSION, verdict

HERE = Path(__file__).parent
VERSION = 2
"""Raised when a figure's meaning or what is cached changes."""
VERDICTS = ("refusal", "incapacity", "evasive", "degenerate", "content")
Verdicts = dict[str, list[str]]
"""Kind of prompts -> one verdict a prompt."""


@dataclass(frozen=True)
class Measure:
    """What is asked of both models."""

    prompts: Mapping[str, Sequence[str]]
    """Kind, harmful or harmless -> prompts."""
    response_tokens: int
    kl_tokens: int
    batch: int


@dataclass(frozen=True)
class ReferenceSide:
    """What the reference does with the prompts."""

    ids: dict[str, list[list[int]]]
    """Kind -> token ids of each prompt in its chat template."""
    responses: list[list[int]]
    """Token ids of its responses to the harmless prompts."""
    verdicts: Verdicts


class Model:
    """One model in float32 with its tokenizer.

    Args:
        folder: of a saved model.
        tokenizer_from: where its tokenizer is, if not there.
    """

    def __init__(self, folder: Path, tokenizer_from: Path | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_from or folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        self.ends = (ends | {self.tokenizer.eos_token_id}) - {None}
        pad = self.tokenizer.pad_token_id
        self.pad = self.tokenizer.eos_token_id if pad is None else pad
        parameters = inspect.signature(self.model.forward).parameters
        # Releases of transformers differ in what they call it.
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt as a user's turn, the assistant's turn opened."""
        turn = [{"role": "user", "content": prompt}]
        template = self.tokenizer.apply_chat_template
        text = template(turn, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def texts(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Responses as text."""
        return list(self.tokenizer.batch_decode(responses, skip_special_tokens=True))

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, batch: int
    ) -> list[list[int]]:
        """Greedy responses up to and including the first end token; no sampler setting acts."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        responses: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            batch_responses = self._generate_batch([prompts[row] for row in rows], tokens)
            for row, response in zip(rows, batch_responses, strict=True):
                responses[row] = response
        return responses

    @torch.inference_mode()
    def _generate_batch(self, prompts: list[Sequence[int]], tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        responses: list[list[int]] = [[] for _ in prompts]
        for _ in range(tokens):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{self.cache_argument: cache},
            )
            cache = output[self.cache_argument]
            next_ids = output.logits[:, -1].argmax(-1)
            for response, token in zip(responses, next_ids.tolist(), strict=True):
                if not self._ended(response):
                    response.append(token)
            if all(map(self._ended, responses)):
                break
            ids, positions = next_ids[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        return responses

    def _ended(self, response: list[int]) -> bool:
        return bool(response) and response[-1] in self.ends

    def log_probabilities(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], batch: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Index of a prompt, and (N, V) log-probabilities that predict its N response tokens.

        Float32, right-padded, one pass over whole sequences. In order of length of the prompts.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            sequences = [[*prompts[row], *responses[row]] for row in rows]
            width = max(map(len, sequences))
            first = min(len(prompts[row]) for row in rows) - 1
            padded = [s + [self.pad] * (width - len(s)) for s in sequences]
            mask = [[1] * len(s) + [0] * (width - len(s)) for s in sequences]
            with torch.inference_mode():
                logits = self.model(
                    input_ids=torch.tensor(padded),
                    attention_mask=torch.tensor(mask),
                    use_cache=False,
                    logits_to_keep=width - first,
                ).logits
            for row, of_row in zip(rows, logits, strict=True):
                begin = len(prompts[row]) - 1 - first
                scored = of_row[begin : begin + len(responses[row])]
                yield row, torch.log_softmax(scored.float(), -1)


def forward_kl(reference: Tensor, candidate: Tensor) -> list[float]:
    """KL(reference || candidate) at each position, nats, from (N, V) log-probabilities.

    The sum of p * (exp(d) - 1 - d) with d = log q - log p: every summand is at least 0.
    """
    p, q = (torch.log_softmax(side.double(), -1) for side in (reference, candidate))
    d = q - p
    return list((p.exp() * (torch.expm1(d) - d)).sum(-1).tolist())


def kl_by_position(
    reference: Model, candidate: Model, side: ReferenceSide, measure: Measure
) -> list[list[float]]:
    """KL at each scored position of each harmless prompt."""
    prompts = side.ids["harmless"]
    responses = [response[: measure.kl_tokens] for response in side.responses]
    passes = (
        m.log_probabilities(prompts, responses, measure.batch) for m in (reference, candidate)
    )
    rows: list[list[float]] = [[] for _ in prompts]
    for (row, p), (_, q) in zip(*passes, strict=True):
        rows[row] = forward_kl(p, q)
    return rows


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a rate."""
    if n == 0:
        return 0.0, 1.0
    rate, scale = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_and_error(values: Sequence[float]) -> dict[str, float | int | None] | None:
    """Mean and standard error over prompts; None of nothing."""
    n = len(values)
    if n == 0:
        return None
    mean = sum(values) / n
    squares = sum((value - mean) ** 2 for value in values)
    return {"mean": mean, "se": math.sqrt(squares / (n - 1) / n) if n > 1 else None, "n": n}


def mean_by_token(rows: Sequence[Sequence[float]]) -> dict[str, float | int | None] | None:
    """Mean with all tokens equal, its error clustered by prompt; None of nothing."""
    n, tokens = len(rows), sum(map(len, rows))
    if n == 0:
        return None
    mean = sum(map(sum, rows)) / tokens
    squares = sum((sum(row) - mean * len(row)) ** 2 for row in rows)
    error = math.sqrt(squares * n / (n - 1)) / tokens if n > 1 else None
    return {"mean": mean, "se": error, "tokens": tokens}


def counts(verdicts: Sequence[str]) -> dict[str, Any]:
    """How often each verdict was given, and the refusals' interval."""
    n = len(verdicts)
    refusals = verdicts.count("refusal")
    by_name = {name: verdicts.count(name) for name in VERDICTS[1:]}
    interval = [round(bound, 4) for bound in wilson(refusals, n)]
    return {"n": n, "refusals": refusals, "wilson95": interval, **by_name}


def content_hash(folder: Path, memory: dict[str, str] | None = None) -> str:
    """sha256 over the files of a saved model that decide what it does.

    Args:
        folder: of the saved model.
        memory: hashes of files by path, size and time; read and added to.
    """
    memory = {} if memory is None else memory
    parts = []
    for file in sorted(folder.iterdir()):
        decides = file.suffix in (".safetensors", ".jinja")
        if decides or file.name in ("config.json", "generation_config.json", "tokenizer.json"):
            stat = file.resolve().stat()
            key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
            if key not in memory:
                digest = hashlib.sha256()
                with file.open("rb") as opened:
                    while block := opened.read(1 << 22):
                        digest.update(block)
                memory[key] = digest.hexdigest()
            parts.append(f"{file.name}:{memory[key]}")
    if not parts:
        raise SystemExit(f"no saved model in {folder}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def reference_side(folder: Path, measure: Measure, cache: Path) -> ReferenceSide:
    """From the cache, or measured now and put there."""
    cache.mkdir(parents=True, exist_ok=True)
    hashes = cache / "hashes.json"
    memory = json.loads(hashes.read_text(encoding="utf-8")) if hashes.exists() else {}
    facts = [VERSION, RULE_VERSION, content_hash(folder, memory), measure.prompts]
    facts += [measure.response_tokens, measure.batch, torch.__version__, transformers.__version__]
    hashes.write_text(json.dumps(memory), encoding="utf-8")
    key = hashlib.sha256(json.dumps(facts, default=dict).encode()).hexdigest()[:24]
    file = cache / f"{key}.json"
    if file.exists():
        return ReferenceSide(**json.loads(file.read_text(encoding="utf-8")))
    model = Model(folder)
    ids = {kind: [model.encode(p) for p in prompts] for kind, prompts in measure.prompts.items()}
    verdicts, responses = respond(model, ids, measure)
    side = ReferenceSide(ids, responses, verdicts)
    file.write_text(json.dumps(vars(side)), encoding="utf-8")
    return side


def respond(
    model: Model, ids: Mapping[str, list[list[int]]], measure: Measure
) -> tuple[Verdicts, list[list[int]]]:
    """Verdicts over a model's responses by kind, and its responses to harmless prompts."""
    responses = {
        kind: model.generate(prompts, measure.response_tokens, measure.batch)
        for kind, prompts in ids.items()
    }
    verdicts = {kind: [verdict(t) for t in model.texts(r)] for kind, r in responses.items()}
    return verdicts, responses["harmless"]


def judge(
    reference_folder: Path, candidate_folder: Path, measure: Measure, cache: Path
) -> dict[str, Any]:
    """All figures of one candidate, JSON-ready.

    Raises:
        SystemExit: the candidate encodes prompts otherwise than the reference.
    """
    began = time.perf_counter()
    side = reference_side(reference_folder, measure, cache)
    has_tokenizer = (candidate_folder / "tokenizer.json").exists()
    candidate = Model(candidate_folder, None if has_tokenizer else reference_folder)
    for kind, prompts in measure.prompts.items():
        if [candidate.encode(prompt) for prompt in prompts] != side.ids[kind]:
            raise SystemExit(f"{candidate_folder}: tokenizer or chat template has changed")
    verdicts, _ = respond(candidate, side.ids, measure)
    rows = kl_by_position(Model(reference_folder), candidate, side, measure)
    return {
        "judge_version": VERSION,
        "rule_version": RULE_VERSION,
        "response_tokens": measure.response_tokens,
        "kl_tokens": measure.kl_tokens,
        "reference": {kind: counts(v) for kind, v in side.verdicts.items()},
        "candidate": {kind: counts(v) for kind, v in verdicts.items()},
        **kl_figures(rows, side.verdicts["harmless"]),
        "seconds": round(time.perf_counter() - began, 1),
    }


def kl_figures(rows: Sequence[Sequence[float]], verdicts: Sequence[str]) -> dict[str, Any]:
    """Means and errors of the KL.

    Args:
        rows: KL at each position of each harmless prompt.
        verdicts: over the reference's responses to them.
    """
    means = [sum(row) / len(row) for row in rows]
    answered = [index for index, v in enumerate(verdicts) if v != "refusal"]
    refused = [index for index, v in enumerate(verdicts) if v == "refusal"]
    return {
        "kl": mean_and_error([means[index] for index in answered]),
        "kl_by_token": mean_by_token([rows[index] for index in answered]),
        "first_token_kl": mean_and_error([rows[index][0] for index in answered]),
        "refused_kl": mean_and_error([means[index] for index in refused]),
        "kl_per_prompt": {str(index): round(means[index], 7) for index in answered},
    }


def read_prompts(file: Path, limit: int | None = None) -> list[str]:
    """One a line; at most `limit`."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line][:limit]


def main() -> None:
    """Judge one candidate."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description="Judge a saved model against its reference.")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--candidate", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder for reference sides")
    parser.add_argument("--harmful", type=Path, default=HERE / "prompts/unseen_harmful.txt")
    parser.add_argument("--harmless", type=Path, default=HERE / "prompts/unseen_harmless.txt")
    parser.add_argument("--response-tokens", type=int, default=40)
    parser.add_argument("--kl-tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="prompts of each kind, for a smoke test")
    parser.add_argument("--out", type=Path, help="write the figures here")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    prompts = {
        "harmful": read_prompts(words.harmful, words.limit),
        "harmless": read_prompts(words.harmless, words.limit),
    }
    measure = Measure(prompts, words.response_tokens, words.kl_tokens, words.batch)
    figures = judge(words.reference, words.candidate, measure, words.cache)
    if words.out:
        words.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in figures.items() if k != "kl_per_prompt"}, indent=1))


if __name__ == "__main__":
    main()
