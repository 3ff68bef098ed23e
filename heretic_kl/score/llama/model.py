"""A GGUF file in llama.cpp: token ids in, full-vocabulary logits out. Computes no statistics.

The C interface is used, not the binding's own classes: those copy logits token by token, or keep
them of a whole context.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import MeasurementError, ModelError

CACHE_TYPES: Final = ("f16", "f32", "q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0")
"""What keys and values can be stored as.

f16 is llama.cpp's default, with flash attention where it allows it. f32 is without: flash attention
rounds to float16 on a CPU whatever is stored.
"""

EXACT_CACHE_TYPES: Final = ("f16", "f32")
"""Those that do not quantize."""
BATCH: Final = 512
"""Tokens that llama.cpp is given at once, its own default."""
BLOCK_ELEMENTS: Final = 2**23
"""Logits held at once, here and again in llama.cpp: 32 MB each."""
MOST_ROWS: Final = 128
_ERROR_LEVEL: Final = 4
_errors: list[str] = []
"""What llama.cpp logged of its last failure; the first line says most."""


def llama_available() -> bool:
    """Whether the binding is installed; loads nothing."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaModel:
    """A model and its context, one sequence at a time.

    Args:
        path: a GGUF file; the first of a split one.
        context: most tokens of a sequence.
        cache_type: one of `CACHE_TYPES`, for keys and values alike.
        on_gpu: offload all layers, if the binding was built for a GPU.

    Raises:
        ModelError: the binding is not installed, or llama.cpp cannot load the file or hold the
            context.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        cache_type: str = "f16",
        on_gpu: bool = True,
    ) -> None:
        self.library = library = _library()
        self.name = path.name
        self._weights: LlamaModel | None = None
        _errors.clear()
        model_options = library.llama_model_default_params()
        model_options.n_gpu_layers = -1 if on_gpu else 0
        self._model = library.llama_model_load_from_file(str(path).encode(), model_options)
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {path.name!r}{_reason()}")
        self.vocabulary_pointer = library.llama_model_get_vocab(self._model)
        self.vocabulary: int = library.llama_vocab_n_tokens(self.vocabulary_pointer)
        kind = library.llama_ftype_name(library.llama_model_ftype(self._model))
        self.quantization: str = "unknown" if kind is None else kind.decode()
        """What most weights are stored as, in llama.cpp's words, for instance `Q4_K - Medium`."""
        self.block_rows = max(1, min(MOST_ROWS, BLOCK_ELEMENTS // self.vocabulary))
        self._options = _context_options(library, context, self.block_rows, cache_type)
        self._held = f"{context} tokens of {path.name!r} with {cache_type} keys and values"
        try:
            self._begin()
        except ModelError:
            library.llama_model_free(self._model)
            raise
        self.close = weakref.finalize(self, _free, library, self._model, self._context, self._batch)

    def _begin(self) -> None:
        """Make a context of these weights."""
        _errors.clear()
        self._context = self.library.llama_init_from_model(self._model, self._options)
        if not self._context:
            raise ModelError(f"llama.cpp cannot hold a context of {self._held}{_reason()}")
        self._batch = self.library.llama_batch_init(BATCH, 0, 1)
        self._memory = self.library.llama_get_memory(self._context)

    def beside(self) -> LlamaModel:
        """The same weights, in memory once, with keys and values of their own.

        Raises:
            ModelError: llama.cpp cannot hold a second context.
        """
        other = copy(self)
        other._weights = self  # which must not be freed earlier
        other._begin()
        library = self.library
        other.close = weakref.finalize(other, _free, library, None, other._context, other._batch)
        return other

    def blocks(self, sequence: ForcedSequence) -> Iterator[Tensor]:
        """Logits at the scored positions, (n, V) float32, at most `block_rows` rows at a time.

        Another sequence may begin only when this one is exhausted or dropped.

        Raises:
            MeasurementError: llama.cpp cannot run it.
        """
        fed, first = sequence.fed, sequence.scored.start
        self._forget()
        start, rows = 0, self.block_rows
        while start < len(fed):
            stop = min(start + BATCH, max(first, start) + rows, len(fed))
            self._decode(fed[start:stop], start, first)
            if stop > first:
                yield self._logits(stop - max(start, first))
            start = stop

    def respond(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The greedy response to a prompt, with the end token where it ends within `tokens`.

        It ends with any token that llama.cpp ends with: that of the text, of a turn, of a message.
        """
        self._forget()
        response: list[int] = []
        logits = torch.empty(0)
        for start in range(0, len(prompt), BATCH):
            batch = prompt[start : start + BATCH]
            self._decode(batch, start, len(prompt) - 1)
        logits = self._logits(1)
        while True:
            token = int(logits[0].argmax())
            response.append(token)
            ends = self.library.llama_vocab_is_eog(self.vocabulary_pointer, token)
            if len(response) == tokens or ends:
                return response
            place = len(prompt) + len(response) - 1
            self._decode([token], place, place)
            logits = self._logits(1)

    def _forget(self) -> None:
        self.library.llama_memory_clear(self._memory, True)

    def _decode(self, tokens: Sequence[int], start: int, first_output: int) -> None:
        """Run tokens at positions from `start`; logits are made from `first_output` on."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = start + index >= first_output
        _errors.clear()
        code = self.library.llama_decode(self._context, batch)
        if code != 0:
            raise MeasurementError(
                f"llama.cpp failed on {self.name!r} with code {code} at token {start}{_reason()}"
            )

    def _logits(self, rows: int) -> Tensor:
        import numpy

        pointer = self.library.llama_get_logits(self._context)
        array = numpy.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary))
        return torch.from_numpy(array.copy())


def _context_options(library: Any, context: int, rows: int, cache_type: str) -> Any:
    options = library.llama_context_default_params()
    options.n_ctx = context
    options.n_batch = options.n_ubatch = BATCH
    options.n_outputs_max = rows
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    kind = getattr(library, f"GGML_TYPE_{cache_type.upper()}")
    options.type_k = options.type_v = kind
    if cache_type == "f32":
        options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
    elif cache_type != "f16":  # values of fewer bits are read by flash attention only
        options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED
    options.no_perf = True
    return options


def _free(library: Any, model: Any, context: Any, batch: Any) -> None:
    library.llama_batch_free(batch)
    library.llama_free(context)
    if model is not None:
        library.llama_model_free(model)


@cache
def _library() -> Any:
    """The binding, its log kept from stderr."""
    if not llama_available():
        raise ModelError(
            "running a .gguf file in llama.cpp needs the package llama-cpp-python: install "
            "heretic-kl[gguf], or pass --backend transformers"
        )
    import llama_cpp

    def note(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        if level == _ERROR_LEVEL:
            _errors.append(" ".join(text.decode(errors="replace").split()))

    library: Any = llama_cpp
    library.heretic_kl_log = library.llama_log_callback(note)  # must outlive every call
    library.llama_log_set(library.heretic_kl_log, ctypes.c_void_p(0))
    library.llama_backend_init()
    return library


def _reason() -> str:
    return f": {_errors[0]}" if _errors else ""
