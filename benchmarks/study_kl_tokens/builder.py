"""Makes edits of one model: directions, learned plans and a fine-tune, once. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.study_kl_tokens.edits import FORMS, SNAPSHOTS, TUNING_SNAPSHOTS, Edit
from benchmarks.study_kl_tokens.task import Sizes, human_texts, prompts
from benchmarks.study_kl_tokens.weights import Deltas, fine_tuned
from heretic_kl.ablation import Directions, Plan, build_plan, difference_of_means
from heretic_kl.ablation.storage import plan_from_tensors, tensors_from_plan
from heretic_kl.engine import Engine
from heretic_kl.files import new_file
from heretic_kl.prompts import Prompt
from heretic_kl.refine import RefineOptions, Refiner, Reread, refine
from heretic_kl.scoring import RefusalRule
from heretic_kl.search.space import SearchSpace

FEWEST = 8
"""Prompts of a side below which directions come from all prompts of a kind."""
RESPONSE_TOKENS = 24
MASS_LIMIT = 0.02


@dataclass
class Builder:
    """What edits are made from.

    Raises:
        MeasurementError: on use, where the model refuses too little to learn from.
    """

    engine: Engine
    sizes: Sizes
    work: Path
    """Folder of what was learned, so that a later process need not learn it again."""
    tell: Callable[[str], None]

    @cached_property
    def space(self) -> SearchSpace:
        """Of the model's depth."""
        return SearchSpace(len(self.engine.lm.architecture.layers))

    def plan(self, edit: Edit) -> Plan:
        """The operators of an edit that changes no weights.

        Raises:
            ValueError: the model does not allow its norm mode.
        """
        if edit.family == "learned":
            return self._learned(edit.facts["form"])[edit.facts["snapshot"]]
        parameters = self.space.edit(edit.facts)
        parameters = replace(parameters, norm=edit.facts.get("norm", "none"))
        directions = self.directions
        if "direction_seed" in edit.facts:
            directions = self._random_directions(edit.facts["direction_seed"])
        return build_plan(parameters, directions, self.engine.lm.architecture.facts())

    @cached_property
    def directions(self) -> Directions:
        """From training prompts that the model refuses and answers; of all where too few are."""
        self.tell("directions")
        sides = []
        for kind in ("harmful", "harmless"):
            loaded = self._prompts(kind, "train")
            matching = [p for p in loaded if self._refuses(p, loaded) == (kind == "harmful")]
            sides.append(matching if len(matching) >= FEWEST else list(loaded))
        count = min(map(len, sides))
        means = [self.engine.residual_mean(side[:count], 1.0) for side in sides]
        return difference_of_means(means[0], means[1])

    @cached_property
    def deltas(self) -> list[Deltas]:
        """What the fine-tune's snapshots add to weights."""
        encode = self.engine.lm.chat.encode_text
        sequences = [encode(text.text) for text in human_texts("tuning")]
        most = self.sizes.text_tokens + self.sizes.text_context

        def tune() -> list[dict[str, torch.Tensor]]:
            cut = [ids[:most] for ids in sequences]
            return fine_tuned(self.engine.lm, cut, self.sizes.tuning_steps, TUNING_SNAPSHOTS)

        return list(self._stored("fine-tune", TUNING_SNAPSHOTS, tune))

    def _learned(self, form: str) -> list[Plan]:
        def learn() -> list[dict[str, torch.Tensor]]:
            return [tensors_from_plan(plan) for plan in self._learn(form)]

        stored = self._stored(f"learned-{form}", SNAPSHOTS, learn)
        return [plan_from_tensors(tensors) for tensors in stored]

    def _learn(self, form: str) -> list[Plan]:
        """Snapshots along one refinement from the gentle start."""
        steps = self.sizes.learning_steps
        options = RefineOptions(
            steps=steps,
            form=form,  # type: ignore[arg-type]
            rank=1 if form == "direction" else 2,
            mass_limit=MASS_LIMIT,
            check_every=max(1, steps // SNAPSHOTS),
            seed=FORMS.index(form),
        )
        start = build_plan(
            self.space.edit(self.space.known_good()[0]),
            self.directions,
            self.engine.lm.architecture.facts(),
        )
        refiner = self._refiner
        snapshots: list[Plan] = []

        def reread(plan: Plan) -> Reread:
            snapshots.append(plan)
            return Reread()

        refined = refine(
            start,
            self.engine.lm.architecture,
            refiner.objective,
            refiner.train,
            refiner.validation,
            options,
            tell=lambda check: self.tell(f"{form}: step {check.step}, KL {check.kl:.3f}"),
            reread=reread,
        )
        learned = snapshots[1:-1]  # neither the start nor the last: the best stands for it
        learned += [refined.plan] * (SNAPSHOTS - len(learned))
        return learned[:SNAPSHOTS]

    @cached_property
    def _refiner(self) -> Refiner:
        kinds: tuple[Any, ...] = ("harmful", "harmless")
        return Refiner(
            self.engine,
            train={kind: self._prompts(kind, "train") for kind in kinds},
            validation={
                kind: prompts(kind, "validation", self.sizes.checked, skip=self.sizes.kl + 8)
                for kind in kinds
            },
            rule=RefusalRule(),
            kl_tokens=16,
            max_response_tokens=RESPONSE_TOKENS,
        )

    def _prompts(self, kind: str, use: str) -> tuple[Prompt, ...]:
        return prompts(kind, use, self.sizes.making)

    def _refuses(self, prompt: Prompt, among: tuple[Prompt, ...]) -> bool:
        responses = self.engine.responses(among, RESPONSE_TOKENS, RefusalRule())
        text = self.engine.lm.chat.decode(responses[among.index(prompt)].tokens)
        return RefusalRule().is_refusal(text)

    def _random_directions(self, seed: int) -> Directions:
        draw = torch.Generator().manual_seed(seed)
        vectors = torch.randn(self.directions.per_layer.shape, generator=draw)
        return Directions((vectors / vectors.norm(dim=-1, keepdim=True)).to(torch.float32))

    def _stored(
        self, stem: str, count: int, make: Callable[[], list[dict[str, torch.Tensor]]]
    ) -> list[dict[str, torch.Tensor]]:
        files = [self.work / f"{stem}-{index}.safetensors" for index in range(count)]
        if not all(file.exists() for file in files):
            self.tell(stem)
            for file, tensors in zip(files, make(), strict=True):
                with new_file(file) as partial:
                    save_file({n: t.contiguous() for n, t in tensors.items()}, partial)
        return [load_file(file) for file in files]
