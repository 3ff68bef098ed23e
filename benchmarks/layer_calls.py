"""Counts which decoder layers run, over how many positions. Needs torch only.

    PATH/python -I benchmarks/layer_calls.py COUNTS.json COMMAND [ARGUMENTS]

runs an installed command in the environment of that interpreter and writes what ran before each
line with `Trial` that it printed. `-I`, so that scripts beside this one hide none of its modules.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook

CLASS = "DecoderLayer"
"""How the class names of counted modules end."""


class LayerCalls:
    """Calls of every decoder layer of this process, while it is in a `with` block."""

    def __enter__(self) -> LayerCalls:
        self._calls: Counter[int] = Counter()
        self._positions: Counter[int] = Counter()
        self._handle = register_module_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_error: object) -> None:
        self._handle.remove()

    def taken(self) -> dict[str, Any]:
        """What ran since the last time; empty if nothing did."""
        calls, positions = dict(self._calls), dict(self._positions)
        self._calls.clear()
        self._positions.clear()
        if not calls:
            return {}
        passes = max(calls.values())
        return {
            "lowest_layer": min(calls),
            "passes": passes,
            "layers_per_pass": sum(calls.values()) / passes,
            "token_positions": max(positions.values()),
            "layers_times_positions": sum(positions.values()),
        }

    def _count(self, module: Any, arguments: tuple[Any, ...]) -> None:
        if not type(module).__name__.endswith(CLASS) or not arguments:
            return
        index = module.self_attn.layer_idx
        self._calls[index] += 1
        self._positions[index] += arguments[0].shape[0] * arguments[0].shape[1]


def main() -> None:
    """Run the command, count, write."""
    out, name, *arguments = sys.argv[1:]
    (command,) = [e for e in entry_points(group="console_scripts") if e.name == name]
    sys.argv = [name, *arguments]
    found: list[dict[str, Any]] = []
    write = sys.stdout.write
    with LayerCalls() as calls:

        def watched(text: str) -> int:
            if "Trial " in text:
                found.append(calls.taken())
            return write(text)

        sys.stdout.write = watched  # type: ignore[method-assign]
        try:
            command.load()()
        finally:
            Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
