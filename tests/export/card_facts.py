"""What a card and a reproduction file of a small model state."""

from heretic_kl.ablation import EditParameters, WeightKernel
from heretic_kl.export import ExportFacts, PromptFacts, ScoreFacts, installed_versions, machine
from heretic_kl.scoring import Score, build_scorer

REFUSALS = [
    Score(0.9, "90/100 (90%, 83% to 94%)", interval=(0.83, 0.94)),
    Score(0.05, "5/100 (5%, 2% to 11%)", interval=(0.02, 0.11)),
    Score(0.06, "6/100 (6%, 3% to 12%)", interval=(0.03, 0.12)),
]
KL = Score(
    0.0321,
    "0.0321 ± 0.0040 nats",
    standard_error=0.004,
    interval=(0.0241, 0.0409),
    details={"worst": float("inf")},
)


def facts(**changes) -> ExportFacts:
    kernel = WeightKernel(1.25, 14.5, 0.3, 9.0)
    values = {
        "name": "tiny-edited",
        "form": "merged",
        "base_name": "someone/tiny",
        "base_is_hub_id": True,
        "base_revision": "abc123",
        "saved_dtype": "bfloat16",
        "trial_number": 17,
        "trials": 30,
        "pick_rule": "knee",
        "parameters": {"attention_peak": 1.25, "mlp_on": False},
        "edit": EditParameters(12.5, {"attention": kernel}, "row"),
        "layers": 30,
        "scores": {
            "refusals": ScoreFacts(
                *REFUSALS,
                kind="harmful",
                unit="share",
                role="minimize",
                meaning=build_scorer("refusals", "refusals", {}).meaning(),
            ),
            "teacher_forced_kl": ScoreFacts(None, KL, KL, unit="nats", role="minimize"),
        },
        "validation_scores": {"refusals": REFUSALS[1]},
        "kl_tokens": 3,
        "metric_version": 2,
        "noise_floor": 1.2e-9,
        "rounding_floor": 3e-5,
        "merge_kl": 2e-5,
        "prompts": (
            PromptFacts("harmful", "test", "/home/me/sets/bad.txt, train[:100]", 100, "a" * 64),
            PromptFacts("harmless", "test", "builtin, harmless", 90, "b" * 64),
        ),
        "settings": {
            "model": "/home/me/models/tiny",
            "storage": "postgresql://me:hunter2@db/studies",
            "api_token": "abc",
            "response_prefix": "/no_think",
            "kl_tokens": 3,
        },
        "command": (
            "heretic-kl --model tiny --kl-tokens 3 --prompts.harmful.train.suffix ' /no_think'"
        ),
        "seed": 4,
        "versions": installed_versions(),
        "platform": machine(),
        "license": {"license": "apache-2.0"},
    }
    return ExportFacts(**{**values, **changes})
