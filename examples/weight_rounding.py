"""Which layers need few bits? Optuna tunes weight rounding against teacher-forced KL.

Nothing is ablated here: an edit is a number of bits for the attention and for the MLP weights of
each group of layers, and teacher-forced KL is what it costs. The search sees one set of prompts,
the front is measured on another.

    python examples/weight_rounding.py --trials 40
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic_kl import DatasetSpec, TeacherForcedKL
from heretic_kl.demo import ensure_demo_model
from heretic_kl.integrations import KLObjective, MeasurementError
from heretic_kl.model import likely_layers

GROUPS = 3
BITS = (3, 8)
UNIFORM = (8, 6, 4)
"""What most people would try first, and what a search has to beat."""


class RoundedWeights:
    """A model whose weights a trial rounds in place, and that is bit for bit itself afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts: dict[str, list[nn.Parameter]] = {}
        layers = likely_layers(model) or []
        for index, layer in enumerate(layers):
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    kind = "attention" if "attn" in name or "attention" in name else "mlp"
                    part = f"{kind} {index * GROUPS // len(layers)}"
                    self.parts.setdefault(part, []).append(module.weight)

    @contextmanager
    def __call__(self, trial: optuna.Trial) -> Iterator[nn.Module]:
        """Round what the trial says, as far as the trial says, until the block is left."""
        bits = {part: trial.suggest_int(part, *BITS) for part in self.parts}
        kept = [(w, w.detach().clone()) for part in self.parts.values() for w in part]
        try:
            for part, weights in self.parts.items():
                for weight in weights:
                    weight.data.copy_(rounded(weight.data, bits[part]))
            yield self.model
        finally:
            for weight, original in kept:
                weight.data.copy_(original)

    def mean_bits(self, trial: optuna.Trial | optuna.trial.FrozenTrial) -> float:
        """Bits per rounded weight; the one scale of each row is not counted."""
        sizes = {part: sum(w.numel() for w in weights) for part, weights in self.parts.items()}
        return sum(trial.params[part] * n for part, n in sizes.items()) / sum(sizes.values())


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric rounding of each row to 2 ** bits - 1 levels."""
    most = 2 ** (bits - 1) - 1
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / most
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


def front_rows(study, edit: RoundedWeights, kl: TeacherForcedKL) -> list[dict]:
    """The front's distinct edits on the test prompts, fewest bits first."""
    objective = KLObjective(kl, edit)
    by_edit = {tuple(trial.params.items()): trial for trial in study.best_trials}
    rows, previous = [], None
    for trial in sorted(by_edit.values(), key=lambda trial: trial.values[1]):
        objective(trial)
        measured = objective.measurements[trial.number]
        apart = None if previous is None else measured.compare(previous).distinguishable
        rows.append(
            {
                "trial": trial.number,
                "bits": trial.values[1],
                "validation_kl": trial.values[0],
                "test": measured.to_dict(),
                "differs_from_row_above": apart,
                "parameters": trial.params,
            }
        )
        previous = measured
    return rows


def print_front(rows: list[dict]) -> None:
    """One line an edit, with its error."""
    print("\ntrial  bits  KL (validation)  KL (test)           bits of each part")
    for row in rows:
        test = row["test"]
        error = test["standard_error"] or 0.0
        bits = ", ".join(f"{part} {n}" for part, n in row["parameters"].items())
        print(
            f"{row['trial']:5d}  {row['bits']:4.2f}  {row['validation_kl']:15.4f}  "
            f"{test['mean']:.4f} ± {error:.4f}     {bits}"
        )
        if row["differs_from_row_above"] is False:
            print("       ^ indistinguishable from the line above on these prompts")


def main(argv: list[str] | None = None) -> None:
    """Search, measure the front on other prompts, print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; default: the demo model")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--kl-tokens", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32, help="in each of the two sets")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    name = arguments.model or str(ensure_demo_model(notify=print))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    validation, test = (
        TeacherForcedKL(
            model,
            tokenizer,
            prompts=DatasetSpec("builtin:harmless", use, limit=arguments.prompts),
            kl_tokens=arguments.kl_tokens,
        )
        for use in ("validation", "test")
    )

    edit = RoundedWeights(model)
    objective = KLObjective(validation, edit, also=lambda trial, _: (edit.mean_bits(trial),))
    study = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=arguments.seed, n_startup_trials=10),
    )
    for bits in UNIFORM:
        study.enqueue_trial(dict.fromkeys(edit.parts, bits))
    study.optimize(objective, n_trials=arguments.trials, catch=(MeasurementError,))

    rows = front_rows(study, edit, test)
    print_front(rows)
    print(f"noise floor: {test.noise_floor.text if test.noise_floor else 'not measured'}")
    if arguments.json:
        results = {"model": name, "seed": arguments.seed, "front": rows}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
