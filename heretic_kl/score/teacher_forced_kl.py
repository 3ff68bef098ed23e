"""Teacher-forced KL from a reference model: built once, then any number of candidates.

The reference responds to every prompt; its responses are fed to both models, so that both always
see the same prefix. Only the reference's token ids, final hidden states and head are kept: the
model itself may be edited in place, trained or dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from heretic_kl.engine import (
    MemoryLimits,
    NoiseFloor,
    Runner,
    forced_sequences,
    measure_noise_floor,
    model_identity,
    respond_and_force,
)
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    Divergence,
    Head,
    Reference,
    ReferenceIdentity,
    geometric_weights,
    summarize,
)
from heretic_kl.kl.head import MAX_LOGIT_ELEMENTS
from heretic_kl.kl.terms import row_blocks
from heretic_kl.kl_options import checked_options, sampling_seed
from heretic_kl.model import DtypeName, evaluating, likely_layers
from heretic_kl.prompts import fingerprint
from heretic_kl.requests import Sampling
from heretic_kl.score.loader import ModelLoader
from heretic_kl.score.measurement import Measurement
from heretic_kl.score.prompts import DEFAULT_PROMPTS, PromptsLike, chosen_prompts

NOISE_PROMPTS = 16
"""So many prompts are enough to see the size of a noise floor."""


STORED_FACTS = frozenset(
    {"dtype", "divergence", "temperature", "position_decay", "batch_size", "share_prefix"}
)


class TeacherForcedKL:
    """KL(reference || candidate) over the reference's own responses, nats.

        kl = TeacherForcedKL("path/to/original", kl_tokens=8)
        print(kl.score("path/to/fine-tune"))

    Models are given as a path or hub id, as a folder with a PEFT adapter, or as `transformers`
    model objects, PEFT-wrapped or not. They must share one tokenizer.

    Args:
        reference: the original model. An object is only read; later changes to it do not reach
            what was measured of it here.
        tokenizer: of the reference; needed where the reference is an object.
        prompts: what is asked.
        kl_tokens: N, positions scored of each response; fewer where it ends earlier. 1 is
            first-token KL.
        divergence: `forward_kl` is KL(reference || candidate).
        temperature: of both distributions.
        position_decay: weight of each position relative to the one before; 1 weighs all alike.
        response: which response of the reference is fed to both: `greedy`, or `sampled(SEED)`,
            drawn at temperature 1.
        batch_size: most sequences at once; halved where memory runs out.
        template: `model` (plain text if it has none), `none`, or a Jinja file.
        enable_thinking: for chat templates that know the switch.
        response_prefix: text put at the start of every response.
        noise_floor: also measure what an unchanged model shows.
        base: what adapters that are given by name are put on; None: what each names, or the
            reference where that is not to be found.
        dtype: for models that are loaded; see `heretic_kl.model.load_model`. So are the next three.
            Candidates are loaded in the reference's dtype if this is `auto`.
        device: where loaded models run.
        device_map: how loaded models are spread over devices.
        trust_remote_code: run code from a model's repository.
        notify: told, in words, what the user should know.

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
        enable_thinking: bool | None = None,
        response_prefix: str = "",
        noise_floor: bool = True,
        base: Any = None,
        dtype: DtypeName = "auto",
        device: str = "auto",
        device_map: str | None = None,
        trust_remote_code: bool = False,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        options = checked_options(
            kl_tokens=kl_tokens,
            divergence=divergence,
            temperature=temperature,
            position_decay=position_decay,
            response=response,
        )
        chosen = chosen_prompts(prompts)
        self.divergence = divergence
        self.temperature = temperature
        self.position_decay = position_decay
        self._notify = notify
        self._loader = ModelLoader(dtype, device, device_map, trust_remote_code, notify, base)
        lm = self._loader.reference(
            reference,
            tokenizer,
            template=template,
            enable_thinking=enable_thinking,
            response_prefix=response_prefix,
        )
        if template == "model" and lm.chat.template is None:
            notify("the reference has no chat template: prompts are given as plain text")
        encoded = [lm.chat.encode(prompt) for prompt in chosen]
        seed = sampling_seed(options.response)
        sampling = None if seed is None else Sampling(seed)
        identity = model_identity(
            lm,
            {
                "model": self._loader.reference_name,
                "prompts": fingerprint(chosen),
                "kl_tokens": kl_tokens,
                "responses": options.response,
                "dtype": lm.dtype_name,
            },
        )
        with evaluating(lm.model):
            problem = lm.capabilities.prefix_problem
            if problem is not None:
                notify(f"the common beginning of prompts is not shared: {problem}")
            limits = MemoryLimits(batch_size, notify=notify)
            runner = Runner(lm, limits, trees=False)
            self._reference = respond_and_force(runner, encoded, kl_tokens, identity, sampling)
            self._keep(runner)
            self.noise_floor = self._measure_floor(runner) if noise_floor else None
        self._head: Head | None = lm.head.kept()
        self._tokenizer = lm.chat.tokenizer

    # --- what was measured -------------------------------------------------------------------

    @property
    def reference(self) -> Reference:
        """The responses, the scored positions and what the reference computed there."""
        return self._reference

    @property
    def prompts(self) -> int:
        """P."""
        return int(self._reference.mask.shape[0])

    @property
    def kl_tokens(self) -> int:
        """N."""
        return int(self._reference.mask.shape[1])

    @property
    def reference_dtype(self) -> str:
        """What the reference computed in, for instance `bfloat16`."""
        return str(self._reference.identity.settings["dtype"])

    def responses(self) -> list[str]:
        """The responses that both models are fed, as text.

        Raises:
            MeasurementError: the reference was loaded from a file, without a tokenizer.
        """
        if self._tokenizer is None:
            raise MeasurementError("a stored reference has token ids only: pass its tokenizer")
        decode = self._tokenizer.decode
        return [str(decode(list(s.response))) for s in self._sequences]

    # --- measuring ---------------------------------------------------------------------------

    def score(
        self,
        candidate: Any,
        tokenizer: Any = None,
        *,
        base: Any = None,
        dtype: DtypeName | None = None,
    ) -> Measurement:
        """Measure a candidate.

        Args:
            candidate: a model as for the constructor; its edits, adapters and quantization are
                in force as they are. A training model is put in evaluation mode meanwhile.
            tokenizer: of the candidate, to be checked against the reference's. One that lies
                beside a loaded candidate is checked anyway.
            base: the model that a candidate adapter is put on, as a path or hub id; None: as the
                constructor was told.
            dtype: what a candidate given by name is loaded in; None: as the constructor was told,
                or in the reference's if that was `auto`.

        Raises:
            MeasurementError: another tokenizer, vocabulary or (for a stored reference) head; NaN
                logits; memory ran out.
            ModelError: it cannot be loaded.
        """
        lm, own_tokenizer = self._loader.candidate(
            candidate,
            tokenizer,
            base,
            fallback=self._tokenizer,
            dtype=dtype or self._dtype_for_candidates(),
        )
        if own_tokenizer:
            self._require(tokenizer_hash=lm.tokenizer_hash())
        with evaluating(lm.model):
            limits = MemoryLimits(self._batch_size, notify=self._notify)
            if not self._share_prefix:  # as the reference ran
                lm = lm.limited(prefix_problem="the reference does not share it")
            hidden = Runner(lm, limits, trees=False).hidden_states(self._sequences)
        if limits.batch_size != self._batch_size:
            raise MeasurementError(
                f"out of memory: the reference ran in batches of {self._batch_size}, the candidate "
                f"only fits in {limits.batch_size}; measure both with batch size "
                f"{limits.batch_size}"
            )
        head, candidate_head = self._heads(lm.head)
        table = self._reference.measure(
            hidden,
            head=head,
            candidate_head=candidate_head,
            divergence=self.divergence,
            temperature=self.temperature,
        )
        weights = geometric_weights(self.kl_tokens, self.position_decay)
        floor = None if self.noise_floor is None else self.noise_floor.value
        summary = summarize(table, position_weights=weights, noise_floor=floor)
        return Measurement(
            summary,
            table,
            self.noise_floor,
            self.position_decay,
            reference_dtype=self.reference_dtype,
            candidate_dtype=lm.dtype_name,
        )

    # --- storing -----------------------------------------------------------------------------

    def save(self, path: str | Path, *, store: Literal["hidden", "logits"] = "hidden") -> None:
        """Keep the reference as a safetensors file, to measure candidates without the model.

        Args:
            path: where to.
            store: hidden states are small and lossless, and good for candidates with the same
                head; logits (float16) are good for any, and cost P * N * V * 2 bytes.

        Raises:
            MeasurementError: logits are wanted of a reference that was itself loaded without its
                head.
        """
        stored = self._reference
        if store == "logits" and stored.logits is None:
            stored = self._as_logits()
        settings = {
            **stored.identity.settings,
            "divergence": self.divergence,
            "temperature": self.temperature,
            "position_decay": self.position_decay,
            "batch_size": self._batch_size,
            "share_prefix": self._share_prefix,
        }
        if self.noise_floor is not None:
            settings["batching_floor"] = self.noise_floor.batching
            settings["rounding_floor"] = self.noise_floor.rounding
        replace(stored, identity=replace(stored.identity, settings=settings)).save(path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer: Any = None,
        *,
        base: Any = None,
        dtype: DtypeName = "auto",
        device: str = "auto",
        device_map: str | None = None,
        trust_remote_code: bool = False,
        notify: Callable[[str], None] = lambda message: None,
    ) -> TeacherForcedKL:
        """A saved reference, ready to measure candidates as the one that was saved.

        Args:
            path: what `save` wrote.
            tokenizer: of the reference, to read its responses with; not needed to measure.
            base: as for the constructor. So are the rest.
            dtype: for candidates.
            device: where they run.
            device_map: how they are spread over devices.
            trust_remote_code: run code from their repositories.
            notify: told, in words, what the user should know.

        Raises:
            MeasurementError: no such file, no reference, or of another metric version.
        """
        self = cls.__new__(cls)
        self._reference = stored = Reference.load(path)
        facts: dict[str, Any] = dict(stored.identity.settings)
        if stored.prompts is None or not STORED_FACTS <= facts.keys():
            raise MeasurementError(f"{path} is a reference that TeacherForcedKL did not save")
        self.divergence = facts["divergence"]
        self.temperature = float(facts["temperature"])
        self.position_decay = float(facts["position_decay"])
        self._batch_size = int(facts["batch_size"])
        self._share_prefix = bool(facts["share_prefix"])
        floor = facts.get("batching_floor")
        self.noise_floor = None if floor is None else NoiseFloor(floor, facts["rounding_floor"])
        self._head = None
        self._tokenizer = tokenizer
        self._notify = notify
        self._loader = ModelLoader(dtype, device, device_map, trust_remote_code, notify, base)
        return self

    # --- parts -------------------------------------------------------------------------------

    def _dtype_for_candidates(self) -> DtypeName | None:
        """The reference's where no other is asked for: a KL should not measure two dtypes."""
        by_name: dict[str, DtypeName] = {name: name for name in get_args(DtypeName)}
        return by_name.get(self.reference_dtype) if self._loader.dtype == "auto" else None

    def _keep(self, runner: Runner) -> None:
        self._batch_size = runner.limits.batch_size
        self._share_prefix = runner.lm.capabilities.prefix_problem is None

    @cached_property
    def _sequences(self) -> Any:
        return forced_sequences(self._reference)

    def _measure_floor(self, runner: Runner) -> NoiseFloor:
        return measure_noise_floor(
            runner,
            self._reference.first_prompts(NOISE_PROMPTS),
            likely_layers(runner.lm.model),
            divergence=self.divergence,
            temperature=self.temperature,
        )

    def _heads(self, candidate_head: Head) -> tuple[Head, Head]:
        """Reference's and candidate's head, on the candidate's device, of one vocabulary."""
        identity = self._reference.identity
        if self._reference.logits is not None:
            self._require(vocabulary_size=candidate_head.vocabulary)
            return candidate_head, candidate_head
        if self._head is None:
            self._require(
                vocabulary_size=candidate_head.vocabulary,
                head_fingerprint=candidate_head.fingerprint(),
            )
            return candidate_head, candidate_head
        if candidate_head.vocabulary != identity.vocabulary_size:
            return self._cut_to_tokenizer(
                self._head.to(candidate_head.weight.device), candidate_head
            )
        if self._head.same_as(candidate_head):
            return candidate_head, candidate_head
        return self._head.to(candidate_head.weight.device), candidate_head

    def _cut_to_tokenizer(self, head: Head, candidate_head: Head) -> tuple[Head, Head]:
        """Heads padded to different sizes, without their padding."""
        size = 0 if self._tokenizer is None else len(self._tokenizer)
        used = int(self._reference.tokens.max())
        if not used < size <= min(head.vocabulary, candidate_head.vocabulary):
            raise MeasurementError(
                f"the models have different vocabularies: {head.vocabulary} tokens in the "
                f"reference, {candidate_head.vocabulary} in the candidate"
            )
        self._notify(
            f"the heads have {head.vocabulary} and {candidate_head.vocabulary} columns; the "
            f"tokenizer's {size} tokens are compared"
        )
        return replace(head, vocabulary_size=size), replace(candidate_head, vocabulary_size=size)

    def _require(self, **facts: Any) -> None:
        identity = self._reference.identity
        expected = ReferenceIdentity(
            **{
                "tokenizer_hash": identity.tokenizer_hash,
                "vocabulary_size": identity.vocabulary_size,
                "settings": identity.settings,
                **facts,
            }
        )
        identity.require_match(
            expected,
            problem="the candidate cannot be compared with the reference",
            sides=("reference", "candidate"),
            remedy="only models with one tokenizer can be compared"
            if "head_fingerprint" not in facts
            else "store the reference's logits instead of its hidden states",
        )

    def _as_logits(self) -> Reference:
        stored, head = self._reference, self._head
        if head is None or stored.hidden is None:
            raise MeasurementError("logits can only be stored where the reference's head is known")
        hidden = stored.hidden
        blocks = row_blocks(hidden.shape[0], head.vocabulary, MAX_LOGIT_ELEMENTS)
        return Reference.from_logits(
            stored.tokens,
            stored.mask,
            (head.logits(hidden[block]) for block in blocks),
            replace(stored.identity, head_fingerprint=None),
            prompts=stored.prompts,
        )
