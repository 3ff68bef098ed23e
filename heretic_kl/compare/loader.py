"""Reference and candidates from what a user names or holds. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heretic_kl.model import (
    CausalModel,
    DtypeName,
    ModelSource,
    adapter_base,
    adopt_model,
    load_to_measure,
    load_tokenizer,
)


@dataclass
class ModelLoader:
    """How models are loaded that are given by name; remembers which one is the reference."""

    dtype: DtypeName
    device: str
    device_map: str | None
    trust_remote_code: bool
    notify: Callable[[str], None]
    """Told, in words, which base an adapter was put on."""
    _reference: ModelSource | None = field(default=None, init=False)

    def reference(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: str,
        enable_thinking: bool | None,
        response_prefix: str,
    ) -> CausalModel:
        """The reference, prompted as told.

        Raises:
            ModelError: it cannot be loaded.
            ValueError: it is an object and has no tokenizer.
        """
        if isinstance(model, CausalModel):
            return model
        source = as_source(model)
        if source is not None:
            self._reference = source
            base = self._base(source, None)
            tokenizer = tokenizer or load_tokenizer(
                source if has_tokenizer(source) or base is None else base, self.trust_remote_code
            )
            model = self._load(source, base)
        elif tokenizer is None:
            raise ValueError("a reference given as an object needs its tokenizer")
        return adopt_model(
            model,
            tokenizer,
            template=template,
            enable_thinking=enable_thinking,
            response_prefix=response_prefix,
        )

    def candidate(
        self, model: Any, tokenizer: Any, base: Any, *, fallback: Any
    ) -> tuple[CausalModel, bool]:
        """A candidate, and whether it came with a tokenizer of its own.

        Args:
            model: what the user named or holds.
            tokenizer: of it, or None.
            base: what to put it on if it is an adapter; None: what it names.
            fallback: the reference's tokenizer, or None.
        """
        if isinstance(model, CausalModel):
            return model, True
        source = as_source(model)
        if source is not None:
            if tokenizer is None and has_tokenizer(source):
                tokenizer = load_tokenizer(source, self.trust_remote_code)
            model = self._load(source, self._base(source, as_source(base)))
        known = tokenizer or fallback or _Untokenized()
        return adopt_model(model, known, template="none"), tokenizer is not None

    def _load(self, source: ModelSource, base: ModelSource | None) -> Any:
        return load_to_measure(
            source,
            base=base,
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
        )

    def _base(self, source: ModelSource, given: ModelSource | None) -> ModelSource | None:
        """What an adapter is put on: what the user says, what it names, else the reference."""
        if source.adapter is None or given is not None:
            return given
        name = adapter_base(source.adapter)
        stated = None if name is None else ModelSource(name)
        reference = self._reference
        if reference is None or reference is source or reference.adapter is not None:
            return stated
        if stated is None:
            self.notify(f"adapter {source.name!r} names no base: put on {reference.name!r}")
            return reference
        here = stated.folder is not None or stated.gguf_file is not None
        if here or not stated.looks_local:
            return stated
        self.notify(
            f"adapter {source.name!r} names {name!r}, which is not here: put on {reference.name!r}"
        )
        return reference


class _Untokenized:
    """Stands where a candidate comes without a tokenizer and none is needed."""

    chat_template = None
    eos_token_id = None


def as_source(model: Any) -> ModelSource | None:
    """Where to load a model from; None: it is one already."""
    if isinstance(model, ModelSource):
        return model
    return ModelSource(str(model)) if isinstance(model, str | Path) else None


def has_tokenizer(source: ModelSource) -> bool:
    """Whether one lies beside it; adapters often come without."""
    return source.adapter is None or (source.adapter / "tokenizer_config.json").is_file()
