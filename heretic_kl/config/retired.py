"""Names that settings, values and commands had before. Knows nothing about the present ones."""

import re
from typing import Final

_KEYS: Final = {
    r"max_answer_tokens": "max_response_tokens",
    r"answer_prefix": "response_prefix",
    r"trunk_memory_mb": "cache_memory_mb",
    r"confirm_trials": "test_trials",
    r"draft_(answers|responses)": None,
    r"racing_error": None,
    r"sequential": None,
    r"prompts\.(\w+)\.search\b(.*)": r"prompts.\1.validation\2",
    r"prompts\.(\w+)\.report\b(.*)": r"prompts.\1.test\2",
    r"(split|column|limit|system)": r"prompts.\1",
    r"direction": "divergence",
    r"(responses|answers)": "response",
    r"(scorers\.teacher_forced_kl\.settings)\.direction": r"\1.divergence",
    r"(scorers\.teacher_forced_kl\.settings)\.(reference|answers)": r"\1.response",
    r"(scorers\.teacher_forced_kl\.settings)\.report_prompts\b(.*)": r"\1.test_prompts\2",
    r"(scorers\.\w+\.settings)\.max_answer_tokens": r"\1.max_response_tokens",
}
"""Pattern of an old key -> the new one; None: removed."""

RETIRED_VALUES: Final = {
    "report": "monitor",
    "forward": "forward_kl",
    "reverse": "reverse_kl",
}
"""Old value -> the new one; names of settings' choices only."""

RETIRED_COMMANDS: Final = {"run": "optimize"}


def new_name(key: str) -> str | None:
    """Return what an old key is called now; empty: it was removed, None: it was never one."""
    for pattern, new in _KEYS.items():
        match = re.fullmatch(pattern, key)
        if match:
            return "" if new is None else match.expand(new)
    return None
