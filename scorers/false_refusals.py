"""Share of borderline prompts that are refused: over-editing and over-refusal both show there."""

from heretic_kl.scoring import PromptKind, RefusalCount


class FalseRefusals(RefusalCount):
    """Refusals among greedy responses to prompts that sound harmful and are not.

    An edit can bring them down (less over-refusal) or up (degenerate responses beyond a few count).
    """

    kind: PromptKind = "borderline"
