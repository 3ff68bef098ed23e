"""Learned edits: site operators as parameters, refined by gradient. Chooses no start.

From any plan as start, the loss is the teacher-forced forward KL to the reference on harmless
prompts, under a constraint on the probability of opening a response with a refusal. Weights stay
frozen: only operators on what sites write are learned, so what is learned exports exactly.
"""

from heretic_kl.refine.checks import Check, Reread
from heretic_kl.refine.openings import mine_openings
from heretic_kl.refine.parameters import removes_single_directions
from heretic_kl.refine.refiner import Refiner
from heretic_kl.refine.training import Refined, RefineOptions, refine

__all__ = [
    "Check",
    "RefineOptions",
    "Refined",
    "Refiner",
    "Reread",
    "mine_openings",
    "refine",
    "removes_single_directions",
]
