"""`heretic-kl score`: any models against one reference, from flags to tables, JSON and files.

Everything that can be found wrong in seconds is found before the first model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from heretic_kl.cli.command import Command
from heretic_kl.cli.output import STDOUT, observing, writes_json
from heretic_kl.cli.score.files import check_targets, write_files, writing
from heretic_kl.cli.score.output import Outcome, json_text, report
from heretic_kl.cli.score.settings import ScoreSettings, read_score_settings
from heretic_kl.errors import ConfigError, HereticKLError, MeasurementError
from heretic_kl.files import expanded
from heretic_kl.prompts import Prompt, load_prompts
from heretic_kl.ranks import is_first, launched

if TYPE_CHECKING:
    from heretic_kl.cli.score.progress import MeasuringStages
    from heretic_kl.events import Observer
    from heretic_kl.score import (
        Backend,
        ChainMeasurement,
        Loading,
        Measurement,
        TeacherForcedKL,
        TextKL,
    )


def run(words: Sequence[str]) -> int:
    """Measure as the command line says; return the exit code.

    Raises:
        HereticKLError: a wrong flag, model, source or target; one line each.
    """
    settings = read_score_settings(words)
    if settings.write_llama_base is not None and launched() > 1:
        raise ConfigError("--write-llama-base does not run under torchrun: leave one of them out")
    check_targets(settings)
    prompts = None if settings.stored or settings.over_text else load_prompts(settings.dataset)
    if settings.refusal_dataset is not None:
        load_prompts(settings.refusal_dataset)

    from heretic_kl.events import Result
    from heretic_kl.ui.print_tables import print_measurement, print_raw
    from heretic_kl.ui.terminal import make_console

    results = make_console()
    with observing(quiet=settings.quiet) as observer:
        outcome = _measure(settings, prompts, observer)
        observer.settle()
        try:
            if writes_json():
                document = json.loads(json_text(settings, prompts, outcome))
                observer(Result("score", document))
            elif settings.json_file == STDOUT:
                print_raw(results, json_text(settings, prompts, outcome))
            else:
                print_measurement(results, report(settings, prompts, outcome))
        finally:  # a reader of stdout that goes away costs no file
            if is_first():
                write_files(settings, prompts, outcome)
    if outcome.failure is not None:
        raise outcome.failure
    return 0


# --- before anything runs -------------------------------------------------------------------


def _check_models(settings: ScoreSettings, prompts: Sequence[Prompt] | None) -> None:
    from heretic_kl.kl import Head, Reference
    from heretic_kl.model import ModelSource
    from heretic_kl.model.loading.chat import chat_template
    from heretic_kl.score import check_logits_fit, check_models

    if settings.reference_cache_type != "f16" and _backend(settings) != "llama.cpp":
        raise ConfigError(
            "--reference-cache-type has no effect on a reference in transformers: add --backend "
            "llama.cpp"
        )
    in_llama = _backend(settings) == "llama.cpp" and _is_gguf(settings.name)
    if settings.save_reference is not None and in_llama and settings.store != "logits":
        raise ConfigError(
            "--save-reference: a reference in llama.cpp has no hidden states to store: add --store "
            "logits, or --backend transformers"
        )
    if settings.base is not None:
        names = (*settings.candidate, *(() if settings.stored else (settings.name,)))
        if not settings.served and not any(ModelSource(name).adapter for name in names):
            raise ConfigError("--base has no effect: none of the models is an adapter's folder")
    if settings.chat_template != "model":
        chat_template(None, settings.chat_template)
    reference: Reference | str | None = settings.name
    head = True
    if settings.stored:
        path = expanded(settings.name)
        reference, head = Reference.load(path), Head.load(path) is not None
    elif settings.base_logits:
        reference = None
    check_models(reference, settings.candidate, head=head, **_loading(settings))
    if settings.save_reference is not None and settings.store == "logits":
        positions = partial(_most_positions, settings, prompts)
        check_logits_fit(settings.name, positions, **_loading(settings))


def _most_positions(
    settings: ScoreSettings, prompts: Sequence[Prompt] | None, tokenizer: Any
) -> int:
    """How many positions are scored at most, over text exactly so many."""
    from heretic_kl.score import load_documents
    from heretic_kl.score.text.windows import cut_documents

    if prompts is not None:
        return len(prompts) * settings.kl_tokens
    documents = load_documents(settings.text, settings.text_column)
    lengths = {"context": settings.context, "stride": settings.stride}
    windows = cut_documents(documents, tokenizer, **lengths)
    return sum(len(window.sequence.response) for window in windows)


def _loading(settings: ScoreSettings) -> Loading:
    return {
        "base": settings.base,
        "dtype": settings.dtype,
        "device": settings.device,
        "device_map": settings.device_map,
        "trust_remote_code": settings.trust_remote_code,
        "backend": _backend(settings),
        "gguf_cache_type": settings.gguf_cache_type,
        "reference_cache_type": settings.reference_cache_type,
        "key_variable": settings.key_variable,
        "top_logprobs": settings.top_logprobs,
    }


def _backend(settings: ScoreSettings) -> Backend:
    """llama.cpp for all models where they are all .gguf files; a reference that is, is in step."""
    from heretic_kl.score.llama import llama_available

    names = (settings.name, *settings.candidate)
    in_llama = all(map(_is_gguf, names))
    if settings.backend == "auto" and in_llama and llama_available():
        return "llama.cpp"
    return settings.backend


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


# --- measuring ------------------------------------------------------------------------------


def _measure(
    settings: ScoreSettings, prompts: Sequence[Prompt] | None, observer: Observer
) -> Outcome:
    import torch

    from heretic_kl.cli.score.progress import MeasuringStages
    from heretic_kl.events import Notice
    from heretic_kl.score import TextKL

    if settings.threads:
        torch.set_num_threads(settings.threads)
    stages = MeasuringStages(observer, "windows" if settings.over_text else "prompts")
    with stages.stage("Checking the models"):
        _check_models(settings, prompts)
    name = settings.name
    with stages.stage(f"Measuring the reference {name}"), _within_memory(name):
        kl = _reference(settings, prompts, observer, stages)
    if settings.save_reference is not None and is_first():
        # At once: a candidate that fails later must not cost what was computed here.
        with writing("--save-reference", settings.save_reference):
            kl.save(settings.save_reference, store=settings.store)
        size = settings.save_reference.stat().st_size / 1e6
        observer(Notice(f"stored the reference in {settings.save_reference}: {size:.3g} MB"))
    if settings.write_llama_base is not None and isinstance(kl, TextKL):
        with writing("--write-llama-base", settings.write_llama_base):
            kl.write_llama_base(settings.write_llama_base)
    measurements: list[Measurement] = []
    failure: HereticKLError | None = None
    count = len(settings.candidate)
    for number, name in enumerate(settings.candidate, 1):
        title = f"Measuring {name}" + f", candidate {number} of {count}" * (count > 1)
        try:
            with stages.stage(title, later=count - number), _within_memory(name):
                measurements.append(kl.score(name, dtype=settings.candidate_dtype))
        except HereticKLError as error:
            if not measurements:
                raise
            failure = error
            break
    chain = None
    if settings.chain and failure is None:
        with stages.stage("Measuring the chain from its later models"):
            chain = _chain(settings, kl, measurements)
    return Outcome(kl, measurements, failure, chain)


def _chain(
    settings: ScoreSettings,
    kl: TeacherForcedKL | TextKL,
    measurements: Sequence[Measurement],
) -> ChainMeasurement:
    from heretic_kl.score import measure_chain

    with _within_memory("--chain"):
        return measure_chain(kl, settings.candidate, measurements, dtype=settings.candidate_dtype)


def _reference(
    settings: ScoreSettings,
    prompts: Sequence[Prompt] | None,
    observer: Observer,
    stages: MeasuringStages,
) -> TeacherForcedKL | TextKL:
    from heretic_kl.events import Notice
    from heretic_kl.model import ModelSource, load_tokenizer
    from heretic_kl.score import TeacherForcedKL, TextKL
    from heretic_kl.score.loader import has_tokenizer

    loading = _loading(settings)
    loading["notify"] = lambda message: observer(Notice(message))
    loading["progress"] = stages
    if settings.base_logits:
        sources = [ModelSource.named(name) for name in settings.candidate]
        source = next(filter(has_tokenizer, sources), sources[0])
        tokenizer = load_tokenizer(source, settings.trust_remote_code)
        return TextKL.from_llama_base(
            settings.name, tokenizer, batch_size=settings.batch_size, **loading
        )
    if settings.stored:
        return _stored_reference(settings, loading)
    if settings.text:
        return TextKL(
            settings.name,
            settings.text,
            context=settings.context,
            stride=settings.stride,
            column=settings.text_column,
            llama_windows=settings.write_llama_base is not None,
            divergence=settings.divergence,
            temperature=settings.temperature,
            batch_size=settings.batch_size,
            noise_floor=settings.noise_floor,
            bands=settings.bands,
            **loading,
        )
    assert prompts is not None
    return TeacherForcedKL(
        settings.name,
        prompts=prompts,
        kl_tokens=settings.kl_tokens,
        divergence=settings.divergence,
        temperature=settings.temperature,
        position_decay=settings.position_decay,
        response=settings.response,
        batch_size=settings.batch_size,
        template=settings.chat_template,
        chat_template_kwargs=settings.template_variables,
        response_prefix=settings.response_prefix,
        noise_floor=settings.noise_floor,
        bands=settings.bands,
        refusal_prompts=settings.refusal_dataset,
        **loading,
    )


def _stored_reference(settings: ScoreSettings, loading: Loading) -> TeacherForcedKL | TextKL:
    from heretic_kl.kl import Reference
    from heretic_kl.score import TeacherForcedKL, TextKL, tokenizer_of

    path = expanded(settings.name)
    expected = Reference.load(path).identity.tokenizer_hash
    tokenizer = None
    for name in settings.candidate:  # the first that has one
        tokenizer = tokenizer or tokenizer_of(name, expected, settings.trust_remote_code)
    if not settings.text:
        return TeacherForcedKL.load(path, tokenizer, **loading)
    return TextKL.load(
        *(path, settings.text, tokenizer),
        context=settings.context,
        stride=settings.stride,
        column=settings.text_column,
        **loading,
    )


@contextmanager
def _within_memory(name: str) -> Iterator[None]:
    """Memory that runs out where no smaller batch would help is an error of one line."""
    from heretic_kl.model import is_out_of_memory

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MeasurementError(
            f"out of memory while {name!r} was measured: try a smaller --dtype, a smaller "
            "--batch-size or --device cpu"
        ) from error


COMMAND = Command(
    "score --reference MODEL --candidate MODEL [--FLAG VALUE ...]",
    "Measures the teacher-forced KL divergence of candidates from a reference: any models with "
    "one tokenizer, for instance a fine-tune, a quantization, a merge or a PEFT adapter and "
    "what it was made from. The reference responds to each prompt, and both models are fed its "
    "response. Models are hub ids, folders (safetensors), .gguf files and folders with a PEFT "
    "adapter.",
    run,
    ScoreSettings,
)
