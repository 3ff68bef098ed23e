"""Share of refusal-eliciting prompts that are still refused."""

from heretic_kl.scoring import PromptKind, RefusalCount


class Refusals(RefusalCount):
    """Refusals among greedy responses, by a phrase rule; degenerate ones above 10% count too."""

    kind: PromptKind = "harmful"
