"""Edits that are not ablations: weights are written to in place, and back. Measures nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.study_kl_tokens.edits import THIRDS, Edit
from heretic_kl.model import LanguageModel, with_packed_weights

Deltas = Mapping[str, Tensor]
"""Name of a parameter -> what a fine-tune adds to it."""
Change = Callable[[str, nn.Linear], Tensor | None]
"""(name of a linear layer, the layer) -> its new weight; None: it stays."""
LEARNING_RATE = 2e-4


def linear_layers(lm: LanguageModel) -> Iterator[tuple[int, str, nn.Linear]]:
    """Layer, name and module of every linear layer inside the model's layers."""
    for index, layer in enumerate(lm.architecture.layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                yield index, f"{index}.{name}", module


@contextmanager
def changed(lm: LanguageModel, change: Change) -> Iterator[None]:
    """The model with changed weights until the block is left; then bit for bit as it was."""
    before: list[tuple[nn.Linear, Tensor]] = []
    try:
        with torch.no_grad():
            for _, name, module in linear_layers(lm):
                weight = change(name, module)
                if weight is not None:
                    before.append((module, module.weight.clone()))
                    module.weight.copy_(weight)
        _pack(lm)
        yield
    finally:
        with torch.no_grad():
            for module, weight in before:
                module.weight.copy_(weight)
        _pack(lm)


def weight_change(lm: LanguageModel, edit: Edit, deltas: Sequence[Deltas]) -> Change:
    """What an edit does to each weight.

    Args:
        lm: the model.
        edit: noise, rounding or fine-tune.
        deltas: of the fine-tune's snapshots.
    """
    facts, count = edit.facts, len(lm.architecture.layers)
    layer_of = {name: index for index, name, _ in linear_layers(lm)}

    def change(name: str, module: nn.Linear) -> Tensor | None:
        weight = module.weight.float()
        if edit.family == "fine-tune":
            delta = deltas[facts["snapshot"]].get(name)
            return None if delta is None else weight + facts["scale"] * delta
        if not _in_part(facts["part"], name, layer_of[name], count):
            return None
        if edit.family == "rounding":
            return rounded(weight, facts["bits"])
        draw = torch.Generator().manual_seed(facts["seed"] * 10_007 + hash_of(name))
        noise = torch.randn(weight.shape, generator=draw)
        return weight + facts["size"] * weight.square().mean().sqrt() * noise.to(weight.device)

    return change


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Each row rounded to 2 ** bits - 1 levels about 0."""
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / most
    return (weight / scale).round() * scale


def fine_tuned(
    lm: LanguageModel, sequences: Sequence[Sequence[int]], steps: int, snapshots: int
) -> list[dict[str, Tensor]]:
    """What some steps of next-token training add to the MLPs' output weights, bfloat16.

    Args:
        lm: the model; a float32 copy is trained.
        sequences: token ids of the texts, one a step, in turns.
        steps: in all.
        snapshots: how many are returned, evenly spaced, the last one at the end.
    """
    model = copy.deepcopy(lm.model).float()
    names = {id(module): name for _, name, module in linear_layers(lm)}
    sites = {key.path for key in lm.architecture.facts() if key.component == "mlp"}
    originals, modules = dict(lm.model.named_modules()), dict(model.named_modules())
    trained = {
        names[id(originals[path])]: modules[path].weight
        for path in modules
        if id(originals[path]) in names and path in sites
    }
    starts = {name: weight.detach().clone() for name, weight in trained.items()}
    for weight in trained.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=0.0)
    made = []
    for step in range(1, steps + 1):
        ids = torch.tensor([sequences[(step - 1) % len(sequences)]], device=lm.device)
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step * snapshots % steps == 0:
            made.append({n: (w.detach() - starts[n]).bfloat16() for n, w in trained.items()})
    return made


def hash_of(name: str) -> int:
    """The same in every process."""
    return sum((index + 1) * ord(letter) for index, letter in enumerate(name))


def _in_part(part: str | None, name: str, layer: int, layers: int) -> bool:
    if part is None:
        return True
    if part in THIRDS:
        return layer * len(THIRDS) // layers == THIRDS.index(part)
    attention = "attn" in name or "attention" in name
    return attention == (part == "attention")


def _pack(lm: LanguageModel) -> None:
    """Changed layers read packed weights again, where the model's layers did."""
    if any("forward" in vars(module) for _, _, module in linear_layers(lm)):
        with_packed_weights(lm)
