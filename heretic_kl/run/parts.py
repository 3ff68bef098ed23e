"""What a run is made of once it is open: frozen parts that every later step reads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from heretic_kl.ablation import Directions, EditParameters, Plan, SiteFacts, SiteKey, build_plan
from heretic_kl.config import Settings
from heretic_kl.engine import Calibration, Engine, measure_noise_floor
from heretic_kl.errors import ModelError
from heretic_kl.model import LanguageModel
from heretic_kl.prompts.sets import PromptSets
from heretic_kl.refine import Refiner, mine_openings
from heretic_kl.run.engines import EngineOptions
from heretic_kl.run.setup.calibrate import NOISE_PROMPTS
from heretic_kl.run.teller import Teller
from heretic_kl.run.trials.response_log import ResponseLog
from heretic_kl.scoring import Score, ScorerContext, Suite
from heretic_kl.search import PlanStore, ResponseFile, SearchStudy


@dataclass(frozen=True)
class RunParts:
    """Everything that searching, testing and saving need."""

    settings: Settings
    tell: Teller
    prompts: PromptSets
    engine: Engine
    """Of the unedited model."""
    engine_options: EngineOptions
    calibration: Calibration
    directions: Directions
    suite: Suite
    """Prepared for the validation prompts."""
    baseline: Mapping[str, Score]
    """The unedited model on the validation prompts."""
    study: SearchStudy
    identity: Mapping[str, Any]
    """Fingerprints of all that trials depend on: what ties them to their study."""
    plans: PlanStore
    """Learned operators of the study's refined trials."""

    @property
    def lm(self) -> LanguageModel:
        """The unedited model."""
        return self.engine.lm

    @cached_property
    def begun(self) -> float:
        """When the time that `minutes` limits began, by `time.perf_counter`: when first asked."""
        return time.perf_counter()

    @cached_property
    def test_suite(self) -> Suite:
        """The same scorers prepared for the test prompts, when they are first needed."""
        suite = Suite(self.suite.specs)
        prepare(suite, self.settings, self.engine, self.calibration, self.prompts, "test")
        return suite

    @cached_property
    def response_log(self) -> ResponseLog:
        """Through whose engine trials are measured."""
        return ResponseLog(
            self.settings.keep_responses,
            self.engine,
            self.prompts,
            ResponseFile(self.settings.study_dir, self.study.name),
            self.tell.notice,
        )

    @cached_property
    def refiner(self) -> Refiner:
        """Learns edits, and predicts refusals by the openings of the reference's own.

        Raises:
            MeasurementError: the reference refuses or answers too little to learn from.
        """
        table = self.settings.refinement
        return Refiner(
            self.engine,
            train=self.prompts.of("train"),
            validation=self.prompts.of("validation"),
            rule=self.suite.refusal_rule,
            kl_tokens=table.kl_tokens,
            max_response_tokens=self.settings.max_response_tokens,
            temperature=table.kl_temperature,
            checkpointing=table.gradient_checkpointing,
        )

    def plan(self, edit: EditParameters) -> Plan:
        """The operators of an edit, learned ones included.

        Raises:
            ModelError: the model does not allow this edit.
            StudyError: what was learned is missing or was changed.
        """
        if edit.refinement is not None:
            return self.plans.load(edit.refinement.sha256)
        try:
            return build_plan(edit, self.directions, self._facts)
        except ValueError as error:
            raise ModelError(str(error)) from error

    @cached_property
    def _facts(self) -> Mapping[SiteKey, SiteFacts]:
        return self.lm.architecture.facts()


def refusal_openers(
    settings: Settings, engine: Engine, prompts: PromptSets, suite: Suite
) -> tuple[int, ...]:
    """First tokens of the reference's refusals of training prompts, told from its other responses.

    Its responses are those that directions come from. Empty where nothing needs them.
    """
    if not suite.counts_refusals or not settings.directions.by_response:
        return ()
    rule = suite.refusal_rule
    pools: tuple[list[list[int]], list[list[int]]] = ([], [])
    for kind in ("harmful", "harmless"):
        chosen = prompts[kind, "train"]
        for response in engine.responses(chosen, settings.max_response_tokens, rule):
            pools[rule.is_refusal(engine.lm.chat.decode(response.tokens))].append(response.tokens)
    others, refusals = pools
    if not any(refusals):
        return ()
    openings = mine_openings(refusals, others).openings
    return tuple(sorted({opening[0] for opening in openings}))


def prepare(
    suite: Suite,
    settings: Settings,
    engine: Engine,
    calibration: Calibration,
    prompts: PromptSets,
    use: Literal["validation", "test"],
) -> None:
    """Prepare scorers for one use of the prompts.

    Where the KL on test prompts has another N than in trials, its noise floor is measured anew.
    """
    tokens, floor = settings.kl_tokens, calibration.noise_floor.value
    longer = settings.other_test_tokens if use == "test" else None
    if longer is not None:
        some = prompts["harmless", "validation"][:NOISE_PROMPTS]
        reference = engine.reference_under(None, some, longer)
        tokens, floor = longer, measure_noise_floor(engine.runner, reference, None).value
    context = ScorerContext(
        prompts_by_kind=prompts.of(use),
        ask_reference=lambda request: engine.measure(None, [request])[0],
        kl_tokens=tokens,
        max_response_tokens=settings.max_response_tokens,
        noise_floor=floor,
        refusal_rule=suite.refusal_rule,
        refusal_openers=refusal_openers(settings, engine, prompts, suite),
        use=use,
    )
    suite.prepare(context, states_tokens=longer is not None)
