"""Reference and candidates from what a user names or holds. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn
from typing_extensions import TypedDict

from heretic_kl.engine.runner import Progress
from heretic_kl.errors import MeasurementError, ModelError, ModelNotFoundError
from heretic_kl.judging import Pace, read_key
from heretic_kl.kl import vocabulary_hash
from heretic_kl.model import (
    Capabilities,
    CausalModel,
    ChatEncoder,
    DtypeName,
    ModelSource,
    adapter_base,
    adopt_model,
    check_to_measure,
    clear_device_memory,
    is_out_of_memory,
    load_to_measure,
    load_tokenizer,
)
from heretic_kl.model.loading.chat import chat_template
from heretic_kl.score.llama.model import llama_available
from heretic_kl.score.llama.reference import LlamaReference
from heretic_kl.score.served import PromptEndpoint
from heretic_kl.score.vllm.model import require_vllm

SERVER_TIMEOUT = 600.0
"""Seconds for one sequence."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


Backend = Literal["auto", "transformers", "llama.cpp", "vllm"]
"""What runs candidates.

`auto` is llama.cpp for .gguf files, if its binding is installed, and transformers for all else and
for a reference, which can then be compared with models of all kinds. `vllm` runs candidates that
are no .gguf files.
"""


class Loading(TypedDict, total=False):
    """How models that are given by name are loaded; arguments of every class that measures.

    Attributes:
        base: what adapters are put on, a path or hub id; None: what each names, or the reference
            where that is not to be found.
        dtype: see `heretic_kl.model.load_model`. So are the next three. Candidates are loaded in
            the reference's dtype if this is `auto`.
        device: where loaded models run; `cpu` keeps llama.cpp there too.
        device_map: how loaded models are spread over devices.
        trust_remote_code: run code from a model's repository.
        backend: what runs candidates.
        gguf_cache_type: as what llama.cpp stores candidates' keys and values, see
            `llama.CACHE_TYPES`.
        reference_cache_type: the same of a reference that runs in llama.cpp.
        key_variable: environment variable that holds the key of candidates' servers; None: no key
            is sent.
        top_logprobs: tokens that a server is asked for at each position; 0: all of them.
        notify: told, in words, what the user should know.
        progress: told of which part (responses, reference, candidate, and so on) how many
            sequences are done, of how many.
    """

    base: Any
    dtype: DtypeName
    device: str
    device_map: str | None
    trust_remote_code: bool
    backend: Backend
    gguf_cache_type: str
    reference_cache_type: str
    key_variable: str | None
    top_logprobs: int
    notify: Callable[[str], None]
    progress: Progress


@dataclass
class ModelLoader:
    """Loads models that are given by name; remembers which one is the reference.

    It keeps none of them: what its caller lets go of is out of memory before the next is loaded.
    The fields are those of `Loading`.
    """

    base: Any = None
    dtype: DtypeName = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    backend: Backend = "auto"
    gguf_cache_type: str = "f16"
    reference_cache_type: str = "f16"
    key_variable: str | None = None
    top_logprobs: int = 20
    notify: Callable[[str], None] = lambda message: None
    progress: Progress = lambda part, done, total: None
    _reference: ModelSource | None = field(default=None, init=False)
    _probed: WeakKeyDictionary[nn.Module, Capabilities] = field(
        default_factory=WeakKeyDictionary, init=False
    )
    """What objects allow that are measured again and again, in training for instance."""
    _loaded: dict[str, Capabilities] = field(default_factory=dict, init=False)
    """What loaded models allow, by what they are made of: weights have no say in it."""

    @property
    def reference_name(self) -> str | None:
        """Hub id, or the bare name of a folder or file, never a path; None: it was an object."""
        source = self._reference
        if source is None:
            return None
        local = source.folder is not None or source.gguf_file is not None
        return source.short_name if local else source.name

    def reference(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: str,
        variables: Mapping[str, Any] | None,
        response_prefix: str,
    ) -> CausalModel | LlamaReference:
        """The reference, prompted as told; a .gguf file in llama.cpp if that is the back end.

        Raises:
            ModelError: it cannot be loaded.
            ValueError: it is an object and has no tokenizer.
        """
        if isinstance(model, CausalModel):
            return model
        source = as_source(model)
        if source is not None:
            base = self.take_reference(source)
            self.check(source, base)
            tokenizer = tokenizer or self.tokenizer_of_reference(source, base)
            if self.backend == "llama.cpp" and source.gguf_file is not None:
                used = chat_template(tokenizer, template)
                chat = ChatEncoder(tokenizer, used, variables or {}, response_prefix)
                on_gpu, cache = self.device != "cpu", self.reference_cache_type
                unpacked = partial(self._unpacked, source, tokenizer)
                return LlamaReference(
                    source, chat, cache_type=cache, on_gpu=on_gpu, unpacked=unpacked
                )
            model = self._load(source, base, self.dtype)
        elif tokenizer is None:
            raise ValueError("a reference given as an object needs its tokenizer")
        lm = adopt_model(
            model,
            tokenizer,
            template=template,
            variables=variables,
            response_prefix=response_prefix,
        )
        if source is not None:
            self._loaded[_makeup(model)] = lm.capabilities
        else:  # it may be trained, and measured from what it was
            self._probed[model] = lm.capabilities
        return lm

    def take_reference(self, source: ModelSource) -> ModelSource | None:
        """Remember the reference; return what it is put on if it is an adapter."""
        self._reference = source
        return self._base(source, as_source(self.base))

    def tokenizer_of_reference(self, source: ModelSource, base: ModelSource | None) -> Any:
        """Of an adapter without one its base's.

        Raises:
            ModelError: there is none.
        """
        home = source if has_tokenizer(source) or base is None else base
        return load_tokenizer(home, self.trust_remote_code)

    def candidate(
        self,
        model: Any,
        tokenizer: Any,
        base: Any,
        *,
        fallback: Any,
        dtype: DtypeName | None = None,
    ) -> tuple[CausalModel, bool]:
        """A candidate, and whether it came with a tokenizer of its own.

        An adapter is put on `base`; None: the loader's, or what it names. `fallback` is the
        reference's tokenizer.
        """
        if isinstance(model, CausalModel):
            return model, True
        source = as_source(model)
        if source is not None:
            put_on = self.base_of(source, base)
            self.check(source, put_on)
            if tokenizer is None and has_tokenizer(source):
                tokenizer = load_tokenizer(source, self.trust_remote_code)
            if tokenizer is None and source.adapter is None:
                self.notify(f"{source.name!r} has no tokenizer: the reference's is used")
            model = self._load(source, put_on, dtype or self.dtype)
        usable_tokenizer = tokenizer or fallback or _Untokenized()
        is_module = isinstance(model, nn.Module)
        makeup = "" if source is None else _makeup(model)
        probed = self._probed.get(model) if is_module else None
        probed = probed or self._loaded.get(makeup)
        lm = adopt_model(model, usable_tokenizer, template="none", capabilities=probed)
        if is_module:
            self._probed[model] = lm.capabilities
        if source is not None:
            self._loaded[makeup] = lm.capabilities
        return lm, tokenizer is not None

    def served(self, name: str) -> PromptEndpoint:
        """A candidate behind a server, named as `URL#MODEL`.

        Raises:
            ConfigError: the name or the key cannot be one.
        """
        key = None if self.key_variable is None else read_key(self.key_variable)
        pace = Pace(timeout=SERVER_TIMEOUT)
        return PromptEndpoint.named(name, key=key, top=self.top_logprobs, pace=pace)

    def in_llama(self, source: ModelSource) -> bool:
        """Whether a candidate is run by llama.cpp.

        Raises:
            ModelError: that is asked for, and its binding is not installed.
        """
        if source.gguf_file is None or self.backend == "transformers":
            return False
        if self.backend in ("auto", "vllm") and not llama_available():
            self.notify(
                f"{source.name!r} is run by transformers, its weights unpacked: install "
                "heretic-kl[gguf] to measure it in llama.cpp itself"
            )
            return False
        return True

    def in_vllm(self, source: ModelSource) -> bool:
        """Whether a candidate is run by vLLM.

        Raises:
            ModelError: that is asked for, and it is not installed, or loads no revision.
        """
        if self.backend != "vllm" or source.gguf_file is not None:
            return False
        if source.revision is not None:
            raise ModelError(f"{source.name!r}: a revision is loaded by --backend transformers")
        require_vllm()
        return True

    def require_tokenizer(self, source: ModelSource, tokenizer_hash: str) -> None:
        """Compare the tokenizer that lies beside a model with the reference's.

        Raises:
            MeasurementError: it is another one.
        """
        if not has_tokenizer(source):
            return
        tokenizer: Any = load_tokenizer(source, self.trust_remote_code)
        theirs = vocabulary_hash(tokenizer.get_vocab())
        if theirs != tokenizer_hash:
            raise MeasurementError(
                f"{source.name!r} cannot be compared with the reference: another tokenizer "
                f"(reference {tokenizer_hash[:12]!r}, candidate {theirs[:12]!r}); only models "
                "with one tokenizer can be compared"
            )

    def base_of(self, source: ModelSource, base: Any = None) -> ModelSource | None:
        """What a candidate is put on if it is an adapter."""
        return self._base(source, as_source(self.base if base is None else base))

    def check(self, source: ModelSource, base: ModelSource | None) -> None:
        """Find what would keep a model from loading, as far as that shows without its weights.

        Raises:
            ModelError: it is not there, not readable, or an adapter without a base.
        """
        try:
            check_to_measure(source, base=base, trust_remote_code=self.trust_remote_code)
        except ModelNotFoundError as error:
            stated = None if source.adapter is None else adapter_base(source.adapter)
            if base is None or base.name != stated or self.base is not None:
                raise
            raise ModelNotFoundError(
                f"adapter {source.name!r} names {base.name!r} as its base, which is not to be "
                f"found: give one with --base ({error})"
            ) from error

    def _unpacked(self, source: ModelSource, tokenizer: Any) -> CausalModel:
        return adopt_model(self._load(source, None, self.dtype), tokenizer, template="none")

    def _load(self, source: ModelSource, base: ModelSource | None, dtype: DtypeName) -> Any:
        # Models refer to themselves in circles: without this an earlier one may still be here.
        clear_device_memory()
        try:
            return load_to_measure(
                source,
                base=base,
                dtype=dtype,
                device=self.device,
                device_map=self.device_map,
                trust_remote_code=self.trust_remote_code,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(
                f"out of memory while {source.name!r} was loaded: try a smaller --dtype, "
                "--device-map auto or --device cpu"
            ) from error

    def _base(self, source: ModelSource, wanted: ModelSource | None) -> ModelSource | None:
        """What an adapter is put on: what the user says, what it names, else the reference."""
        if source.adapter is None:
            return None
        if wanted is not None:
            return wanted
        name = adapter_base(source.adapter)
        stated = None if name is None else ModelSource(name)
        reference = self._reference
        if reference is None or reference is source or reference.adapter is not None:
            return stated
        if stated is None:
            self.notify(f"adapter {source.name!r} names no base: it is put on {reference.name!r}")
            return reference
        here = stated.folder is not None or stated.gguf_file is not None
        if here or not stated.looks_local:
            return stated
        self.notify(
            f"adapter {source.name!r} names {name!r}, which is not available: it is put on "
            f"{reference.name!r}"
        )
        return reference


class _Untokenized:
    """Stands where a candidate comes without a tokenizer and none is needed."""

    chat_template = None
    eos_token_id = None


def _makeup(model: Any) -> str:
    """What decides how a model may be run: its configuration and the kinds of its modules."""
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    modules = [f"{name} {type(module)}" for name, module in model.named_modules()]
    tensors = [f"{tensor.dtype} {tensor.device}" for tensor in model.parameters()]
    return json.dumps([config, modules, tensors], sort_keys=True, default=str)


def as_source(model: Any) -> ModelSource | None:
    """Where to load a model from; None: it is one already."""
    if isinstance(model, ModelSource):
        return model
    return ModelSource.named(str(model)) if isinstance(model, str | Path) else None


def has_tokenizer(source: ModelSource) -> bool:
    """Whether one lies beside it; adapters and checkpoints of a training often come without."""
    if source.folder is None:
        return True
    return any((source.folder / name).is_file() for name in TOKENIZER_FILES)
