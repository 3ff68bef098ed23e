"""Share of refusal-eliciting prompts that are still refused."""

from heretic_kl.scoring import PromptKind, RefusalCount


class Refusals(RefusalCount):
    """Refusals among greedy answers, by a keyword rule; an empty answer is a refusal."""

    kind: PromptKind = "harmful"
