"""A model in vLLM, in this process. Knows no reference and no statistics.

vLLM computes a prompt's logits where log-probabilities of the prompt are asked for. They are taken
from what its model returns there (`compute_logits`, which every model in vLLM has), so they are of
the whole vocabulary, and no list of so many numbers is made for every position. Positions and
tokens are checked against the log-probabilities that vLLM itself returns for the same request.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import MeasurementError, ModelError
from heretic_kl.kl.head import MAX_LOGIT_ELEMENTS
from heretic_kl.kl.terms import row_blocks
from heretic_kl.model import DtypeName, free_memory

SAME: Final = 2e-3
"""Nats between a log-probability that vLLM returns and ours of the same logits; bfloat16 heads."""
TOKENS_AT_ONCE: Final = 8192
"""Smallest number of tokens that vLLM may run at once: a sequence is not cut into parts."""
FREE_MEMORY: Final = 0.9
"""Share of the free memory that vLLM may take; by itself it asks for a share of all memory."""
SURROUNDINGS: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model must be in this process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",  # nothing is sent anywhere
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # --threads decides
}


def require_vllm() -> None:
    """Say how to get vLLM where it is not installed.

    Raises:
        ModelError: so.
    """
    if find_spec("vllm") is None:
        raise ModelError(
            "running a model in vLLM needs the package vllm: install heretic-kl[vllm], or pass "
            "--backend transformers"
        )


class VLLMModel:
    """A model loaded by vLLM on one device.

    Args:
        name: a folder or hub id; what an adapter is put on if there is one.
        context: most tokens of a sequence.
        dtype: of weights and activations, as the model says where `auto`.
        adapter: a LoRA folder.
        trust_remote_code: run code from the model's repository.

    Raises:
        ModelError: vLLM is not installed, or cannot load the model.
    """

    def __init__(
        self,
        name: str,
        *,
        context: int,
        dtype: DtypeName = "auto",
        adapter: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        require_vllm()
        self.name, self._logits, self._scored = name, list[tuple[int, Tensor]](), 0
        self._engine: Any = None
        self._adapter = None
        options: dict[str, Any] = {}
        if adapter is not None:
            options = {"enable_lora": True, "max_lora_rank": _rank(adapter)}
        with _surroundings():
            from vllm import LLM
            from vllm.lora.request import LoRARequest

            try:
                self._engine = LLM(
                    name,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    max_model_len=context + 1,  # vLLM generates one token
                    max_num_batched_tokens=max(context + 1, TOKENS_AT_ONCE),
                    max_num_seqs=1,
                    gpu_memory_utilization=FREE_MEMORY * _free_share(),
                    enforce_eager=True,
                    enable_prefix_caching=False,
                    skip_tokenizer_init=True,
                    use_tqdm_on_load=False,
                    **options,
                )
                self._engine.apply_model(self._record)
            except Exception as error:
                self.close()
                raise ModelError(f"vLLM cannot load {name!r}: {_in_one_line(error)}") from error
        if adapter is not None:
            self._adapter = LoRARequest("candidate", 1, str(adapter))
        self.vocabulary = int(self._engine.model_config.get_vocab_size())

    @property
    def kind(self) -> str:
        """What it computes in, for people."""
        config = self._engine.model_config
        return f"{config.quantization or str(config.dtype).removeprefix('torch.')}, vLLM"

    def logits(self, sequence: ForcedSequence, *, adapted: bool = True) -> Tensor:
        """Logits at the scored positions, (n, V) float32 on the CPU; `adapted`: by the adapter.

        All n at once, and on its device those of all tokens: vLLM has them in no smaller parts.

        Raises:
            MeasurementError: vLLM fails, or computes logits of other tokens.
        """
        from vllm import SamplingParams

        # The last token of the response is predicted, too: it is fed, and its own logits dropped.
        tokens = [*sequence.prompt, *sequence.response]
        asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        self._logits.clear()
        self._scored = len(sequence.response)
        try:
            [output] = self._engine.generate(
                [{"prompt_token_ids": tokens}],
                asked,
                use_tqdm=False,
                lora_request=self._adapter if adapted else None,
            )
        except Exception as error:
            message = f"vLLM failed on {self.name!r}: {_in_one_line(error)}"
            raise MeasurementError(message) from error
        returned = output.prompt_logprobs or [None]
        logits = self._of_prompt(len(tokens))
        targets = torch.tensor(sequence.response).unsqueeze(-1)
        blocks = row_blocks(len(logits), logits.shape[1], MAX_LOGIT_ELEMENTS)
        ours = torch.cat([logits[b].log_softmax(-1).gather(-1, targets[b]) for b in blocks])
        theirs = torch.tensor([_of_token(*pair) for pair in zip(returned, tokens, strict=False)])
        theirs = theirs[-self._scored :]
        same = torch.allclose(ours.squeeze(-1), theirs, atol=SAME, rtol=SAME, equal_nan=True)
        if len(returned) != len(tokens) or not same:
            raise MeasurementError(
                f"vLLM's log-probabilities of {self.name!r} are not those of its logits: this "
                "version of vLLM cannot be used, pass --backend transformers"
            )
        return logits

    def close(self) -> None:
        """Free its memory."""
        with _surroundings():
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            self._logits.clear()
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.llm_engine.engine_core.shutdown()
                del engine
                cleanup_dist_env_and_memory()
                gc.collect()

    def _record(self, model: Any) -> None:
        """Have vLLM's model leave a copy of the logits that it computes, as far as they count."""
        compute = model.compute_logits

        def recorded(*args: Any, **kwargs: Any) -> Any:
            logits = compute(*args, **kwargs)
            if logits is not None:
                last = logits[-max(1, self._scored) :].detach().float().cpu()
                self._logits.append((len(logits), last))
            return logits

        model.compute_logits = recorded

    def _of_prompt(self, tokens: int) -> Tensor:
        """(n, V): the logits that predict the response, of those that predict the whole prompt.

        vLLM computes the logits of the token that it samples first, then those of the prompt.
        """
        (first, _), *rest = self._logits or [(0, torch.empty(0, 0))]
        rows = sum(count for count, _ in rest)
        if first != 1 or rows != tokens - 1:
            raise MeasurementError(
                f"vLLM computed logits of {rows} tokens of {self.name!r} where {tokens - 1} were "
                "expected: this version of vLLM cannot be used, pass --backend transformers"
            )
        logits = rest[0][1] if len(rest) == 1 else torch.cat([last for _, last in rest])
        return logits[-self._scored :]


def _of_token(entry: Mapping[int, Any] | None, token: int) -> float:
    """What vLLM returns for a token of the prompt; NaN: nothing."""
    return float(entry[token].logprob) if entry and token in entry else float("nan")


def _rank(adapter: Path) -> int:
    """The smallest rank that vLLM can be set to and that holds the adapter's."""
    from heretic_kl.model import adapter_rank

    rank = adapter_rank(adapter)
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if rank <= size), rank)


def _free_share() -> float:
    """Free memory as a share of all memory, of the GPU if there is one."""
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        return free / whole
    free_now = free_memory(torch.device("cpu"))
    if free_now is None:
        return 1.0
    return free_now / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _in_one_line(error: BaseException) -> str:
    """The last line of what went wrong, which names the reason."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[-1].split())


@contextmanager
def _surroundings() -> Iterator[None]:
    """VLLM's settings in the environment, where the user has set none, and as they were after."""
    added = {name: value for name, value in SURROUNDINGS.items() if name not in os.environ}
    multiprocessing = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    os.environ.update({**added, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of vLLM's own parts among themselves
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        if multiprocessing is not None:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = multiprocessing
