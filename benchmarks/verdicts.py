"""Whether verdicts on responses of a run are those of plain generation, in float32 and bfloat16.

    python benchmarks/verdicts.py [--threads 2]

Edits of the demo model, 40 refusal-eliciting prompts, 40 tokens. Plain: all responses in one batch
with nothing shared, kept, packed or left out. A run: with all of that. As a control, plain
generation in batches of 13: what another batch size alone changes. Greedy decoding takes the other
of two tokens where their logits tie within rounding, and bfloat16 rounds to 1 part in 256.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from demo_model import as_in_a_run, demo_model
from machine import run_facts
from peers import PROMPTS, SEED, TOKENS, edits_to_generate, our_prompts

CONTROL_BATCH = 13


def main() -> None:
    """Generate, compare, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/verdicts.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = run_facts(SEED, arguments.threads, "float32 and bfloat16")
    result |= {dtype: compared(dtype) for dtype in ("float32", "bfloat16")}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for dtype in ("float32", "bfloat16"):
        print(dtype, json.dumps(result[dtype]))


def compared(dtype: str) -> dict[str, int]:
    """How many verdicts, and how many of them differ from plain generation's."""
    from heretic_kl.engine import Engine
    from heretic_kl.requests import ResponseRequest
    from heretic_kl.scoring import RefusalRule

    harmful, harmless = our_prompts()
    lm, rule = demo_model(dtype), RefusalRule()
    plans = edits_to_generate(lm, harmful, harmless)
    whole = ResponseRequest(harmful, TOKENS)

    def verdicts(engine: Engine, request: ResponseRequest) -> list[bool]:
        texts = [text for plan in plans for text in engine.measure(plan, [request])[0].texts]
        return [rule.is_refusal(text) for text in texts]

    plain = verdicts(
        Engine(lm.limited(prefix_problem="off", gap_problem="off"), batch_size=PROMPTS), whole
    )
    control = verdicts(
        Engine(lm.limited(prefix_problem="off", gap_problem="off"), batch_size=CONTROL_BATCH), whole
    )
    lm, cache_bytes = as_in_a_run(lm)
    run = Engine(lm, batch_size=PROMPTS, cache_bytes=cache_bytes)
    ours = verdicts(run, ResponseRequest(harmful, TOKENS, rule))
    return {
        "edits": len(plans),
        "verdicts": len(plain),
        "refusals": sum(plain),
        "of a run, unlike plain generation's": sum(
            a != b for a, b in zip(ours, plain, strict=True)
        ),
        f"of plain generation in batches of {CONTROL_BATCH}, unlike plain generation's": sum(
            a != b for a, b in zip(control, plain, strict=True)
        ),
    }


if __name__ == "__main__":
    main()
