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
prompts and settings; of responses to harmful prompts verdicts alone are kept. Figures of a
candidate are cached by its content too: no edit is judged twice.

With `--floor DTYPE` in place of a candidate: the KL of the unchanged reference in another dtype,
which is what rounding alone costs.

    python -m benchmarks.search_quality.judge --reference MODEL --candidate EDITED --cache FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
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

from benchmarks.search_quality.figures import Verdicts, counts, kl_figures
from benchmarks.search_quality.refusal_rule import RULE_VERSION, verdict

HERE = Path(__file__).parent
VERSION = 2
"""Raised when a figure's meaning or what is cached changes."""
FIGURES = 1
"""Raised when figures are added: those cached before are judged again."""


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
    """One model, in float32 if nothing else is said, with its tokenizer.

    Args:
        folder: of a saved model.
        tokenizer_from: where its tokenizer is, if not there.
        dtype: that it runs in, if not float32.
    """

    def __init__(
        self, folder: Path, tokenizer_from: Path | None = None, dtype: str = "float32"
    ) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_from or folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = loaded.eval()
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


def cache_file(measure: Measure, cache: Path, folders: Sequence[Path], *asked: str | int) -> Path:
    """Where figures are kept: by the content of models and prompts, and what else decides them."""
    cache.mkdir(parents=True, exist_ok=True)
    hashes = cache / "hashes.json"
    memory = json.loads(hashes.read_text(encoding="utf-8")) if hashes.exists() else {}
    contents = [content_hash(folder, memory) for folder in folders]
    facts = [VERSION, RULE_VERSION, *contents, measure.prompts, measure.response_tokens]
    facts += [measure.batch, torch.__version__, transformers.__version__, *asked]
    part = cache / f"hashes.json.{os.getpid()}"  # several judges may share a cache
    part.write_text(json.dumps(memory), encoding="utf-8")
    os.replace(part, hashes)
    key = hashlib.sha256(json.dumps(facts, default=dict).encode()).hexdigest()[:24]
    return cache / f"{key}.json"


def reference_side(folder: Path, measure: Measure, cache: Path) -> ReferenceSide:
    """From the cache, or measured now and put there."""
    file = cache_file(measure, cache, [folder])
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
    """All figures of one candidate, JSON-ready; from the cache where it was judged before.

    Raises:
        SystemExit: the candidate encodes prompts otherwise than the reference.
    """
    began = time.perf_counter()
    folders = [reference_folder, candidate_folder]
    file = cache_file(measure, cache, folders, measure.kl_tokens, FIGURES)
    if file.exists():
        figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return figures
    side = reference_side(reference_folder, measure, cache)
    has_tokenizer = (candidate_folder / "tokenizer.json").exists()
    candidate = Model(candidate_folder, None if has_tokenizer else reference_folder)
    for kind, prompts in measure.prompts.items():
        if [candidate.encode(prompt) for prompt in prompts] != side.ids[kind]:
            raise SystemExit(f"{candidate_folder}: tokenizer or chat template has changed")
    verdicts, _ = respond(candidate, side.ids, measure)
    rows = kl_by_position(Model(reference_folder), candidate, side, measure)
    figures = {
        "judge_version": VERSION,
        "rule_version": RULE_VERSION,
        "response_tokens": measure.response_tokens,
        "kl_tokens": measure.kl_tokens,
        "reference": {kind: counts(v) for kind, v in side.verdicts.items()},
        "candidate": {kind: counts(v) for kind, v in verdicts.items()},
        **kl_figures(rows, side.verdicts["harmless"]),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    file.write_text(json.dumps(figures), encoding="utf-8")
    return figures


def rounding_floor(folder: Path, measure: Measure, cache: Path, dtype: str) -> dict[str, Any]:
    """KL of the reference in another dtype to itself in float32, over the prompts it answers."""
    side = reference_side(folder, measure, cache)
    rows = kl_by_position(Model(folder), Model(folder, dtype=dtype), side, measure)
    figures = kl_figures(rows, side.verdicts["harmless"])
    return {"kl": figures["kl"], "dtype": dtype}


def read_prompts(file: Path, limit: int | None = None) -> list[str]:
    """One a line; at most `limit`."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line][:limit]


def main() -> None:
    """Judge one candidate."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description="Judge a saved model against its reference.")
    parser.add_argument("--reference", type=Path, required=True)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--candidate", type=Path)
    asked.add_argument("--floor", metavar="DTYPE", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--cache", type=Path, required=True, help="folder for what was judged")
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
    if words.floor:
        figures = rounding_floor(words.reference, measure, words.cache, words.floor)
    else:
        figures = judge(words.reference, words.candidate, measure, words.cache)
    if words.out:
        words.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in figures.items() if k != "kl_per_prompt"}, indent=1))


if __name__ == "__main__":
    main()
