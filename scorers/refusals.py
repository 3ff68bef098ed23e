"""Share of refusal-eliciting prompts that are still refused."""

from heretic_kl.scoring import PromptKind, RefusalCount


class Refusals(RefusalCount):
    """Refusals among greedy responses, by a phrase rule; many degenerate ones count too."""

    kind: PromptKind = "harmful"
