"""Teacher-forced KL from a reference model: built once, then any number of candidates.

The reference responds to every prompt; its responses are fed to both models, so that both always
see the same prefix. Runs no model itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from pydantic import Json
from typing_extensions import Unpack

from heretic_kl.engine import Runner, with_responses
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    Divergence,
    DivergenceReduction,
    Reference,
)
from heretic_kl.kl.storage import undamaged
from heretic_kl.kl_options import KLOptions, Response, checked_options, sampling_seed
from heretic_kl.model import CausalModel
from heretic_kl.prompts import Prompt, fingerprint
from heretic_kl.requests import Sampling
from heretic_kl.score.bands import measure_bands, measure_floor
from heretic_kl.score.comparison import MeasuresCandidates
from heretic_kl.score.detail.refusals import find_openers
from heretic_kl.score.llama.reference import LlamaReference
from heretic_kl.score.loader import Loading, ModelLoader
from heretic_kl.score.prompts import DEFAULT_PROMPTS, PromptsLike, chosen_prompts
from heretic_kl.score.reference_run import AnyRunner, ReferenceRun
from heretic_kl.score.stored import StoredFacts

NOISE_PROMPTS = 16
"""So many prompts are enough to see the size of a noise floor."""


class ResponseFacts(StoredFacts):
    """What a stored reference over responses says of itself."""

    prompts: str
    """Hash of what was asked."""
    responses: Response
    categories: Json[list[str]] = []
    """Of each prompt, or of none."""


class TeacherForcedKL(MeasuresCandidates):
    """KL(reference || candidate) over the reference's own responses, nats.

        kl = TeacherForcedKL("path/to/original", kl_tokens=8)
        measured = kl.score("path/to/fine-tune")

    Models are given as a path or hub id, as a folder with a PEFT adapter, or as `transformers`
    model objects, PEFT-wrapped or not. They must share one tokenizer.

    Args:
        reference: the original model. An object is only read; later changes to it do not reach
            what was measured of it here.
        tokenizer: of the reference; needed where the reference is an object.
        prompts: what is asked.
        kl_tokens: N, positions scored of each response; fewer where it ends earlier. 1 is
            first-token KL. The default is that of `docs/evidence.md` for measuring one model.
        divergence: `forward_kl` is KL(reference || candidate).
        temperature: of both distributions.
        position_decay: weight of each position relative to the one before; 1 weighs all alike.
        response: which response of the reference is fed to both: `greedy`, or `sampled(SEED)`,
            drawn at temperature 1.
        batch_size: most sequences at once; halved where memory runs out.
        template: `model` (plain text if it has none), `none`, or a Jinja file.
        chat_template_kwargs: variables of the chat template, as `enable_thinking`.
        response_prefix: text put at the start of every response.
        noise_floor: also measure what an unchanged model shows.
        bands: also measure the reference with its own weights rounded, see `Band`.
        refusal_openers: token ids with which refusals begin: splits the forward KL, see `KLSplit`.
        refusal_prompts: in their place, prompts that the reference refuses, to find them by.
        loading: base, dtype, device, backend and so on, see `Loading`.

    Raises:
        HereticKLError: model or prompts cannot be used.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        reference: Any,
        tokenizer: Any = None,
        *,
        prompts: PromptsLike = DEFAULT_PROMPTS,
        kl_tokens: int = 8,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        position_decay: float = 1.0,
        response: str = "greedy",
        batch_size: int = 16,
        template: str = "model",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        response_prefix: str = "",
        noise_floor: bool = True,
        bands: bool = False,
        refusal_openers: Sequence[int] = (),
        refusal_prompts: PromptsLike | None = None,
        **loading: Unpack[Loading],
    ) -> None:
        options = checked_options(
            kl_tokens=kl_tokens,
            divergence=divergence,
            temperature=temperature,
            position_decay=position_decay,
            response=response,
        )
        chosen = chosen_prompts(prompts)
        self.position_decay = position_decay
        self._groups = _categories(chosen)
        self._names = [prompt.user for prompt in chosen]
        self._reduction = DivergenceReduction(divergence, temperature)
        self.refusal_openers = tuple(refusal_openers)
        harmful = () if refusal_prompts is None else chosen_prompts(refusal_prompts)
        loader = ModelLoader(**loading)
        lm = loader.reference(
            reference,
            tokenizer,
            template=template,
            variables=chat_template_kwargs,
            response_prefix=response_prefix,
        )
        if template == "model" and lm.chat.template is None:
            loader.notify("the reference has no chat template: prompts are given as plain text")
        self._run = ReferenceRun.over(
            lm,
            partial(self._respond, lm, chosen, harmful, options, loader.notify),
            kl_tokens,
            {"model": loader.reference_name, "prompts": fingerprint(chosen)}
            | {"kl_tokens": kl_tokens, "responses": options.response},
            loader=loader,
            batch_size=batch_size,
            trees=True,
            then=partial(self._measure_more, noise_floor, bands),
        )

    # --- what was measured -------------------------------------------------------------------

    @property
    def divergence(self) -> Divergence:
        """Which divergence is measured."""
        return self._reduction.divergence

    @property
    def temperature(self) -> float:
        """Both distributions' temperature."""
        return self._reduction.temperature

    @property
    def prompts(self) -> int:
        """P."""
        return int(self.reference.mask.shape[0])

    @property
    def kl_tokens(self) -> int:
        """N."""
        return int(self.reference.mask.shape[1])

    @property
    def reference_dtype(self) -> str:
        """What the reference computed in, for instance `bfloat16`."""
        return self._run.dtype

    def responses(self) -> list[str]:
        """The responses that both models are fed, as text.

        Raises:
            MeasurementError: the reference was loaded from a file, without a tokenizer.
        """
        tokenizer = self._run.tokenizer
        if tokenizer is None:
            raise MeasurementError("a stored reference has token ids only: pass its tokenizer")
        return [str(tokenizer.decode(list(s.response))) for s in self._run.sequences]

    # --- storing -----------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer: Any = None,
        **loading: Unpack[Loading],
    ) -> TeacherForcedKL:
        """A saved reference, ready to measure candidates as the one that was saved.

        Args:
            path: what `save` wrote.
            tokenizer: of the reference, to read its responses with; not needed to measure.
            loading: as for the constructor.

        Raises:
            MeasurementError: no such file, damaged, no reference, of another metric version, of
                another tokenizer, or over text.
        """
        self = cls.__new__(cls)
        facts = self._restore(path, tokenizer, loading, ResponseFacts)
        with undamaged(path):
            if len(facts.categories) not in (0, self.prompts):
                raise ValueError(f"{len(facts.categories)} categories of {self.prompts} prompts")
        self._groups = facts.categories
        return self

    def _facts(self) -> dict[str, Any]:
        return {**super()._facts(), "categories": json.dumps(self._groups)}

    def _respond(
        self,
        lm: CausalModel | LlamaReference,
        prompts: Sequence[Prompt],
        harmful: Sequence[Prompt],
        options: KLOptions,
        notify: Callable[[str], None],
        runner: AnyRunner,
    ) -> Sequence[ForcedSequence]:
        """Prompts with the reference's responses; first find how it refuses harmful ones."""
        if harmful:
            self.refusal_openers = find_openers(runner, lm.chat, harmful, prompts, notify)
        encoded = [lm.chat.encode(prompt) for prompt in prompts]
        seed = sampling_seed(options.response)
        sampling = None if seed is None else Sampling(seed)
        assert options.kl_tokens is not None  # the constructor says how many
        return with_responses(cast(Runner, runner), encoded, options.kl_tokens, sampling)

    def _measure_more(
        self, noise_floor: bool, bands: bool, runner: AnyRunner, reference: Reference
    ) -> None:
        """Measure the reference's floor and bands while its model is there."""
        if noise_floor:
            self.noise_floor = measure_floor(runner, reference, NOISE_PROMPTS, self._reduction)
        if bands:
            decay = self.position_decay
            self.bands = measure_bands(runner, reference, self._reduction, position_decay=decay)


def _categories(prompts: Sequence[Prompt]) -> list[str]:
    """Each prompt's category; none at all unless all have one."""
    categories = [prompt.category for prompt in prompts if prompt.category is not None]
    return categories if len(categories) == len(prompts) else []
