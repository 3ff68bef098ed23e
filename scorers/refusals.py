"""Share of refusal-eliciting prompts that are still refused."""

from heretic_kl.scoring import PromptKind, RefusalCount


class Refusals(RefusalCount):
    """Refusals among greedy responses, by a phrase rule; a few degenerate ones are left out."""

    kind: PromptKind = "harmful"
