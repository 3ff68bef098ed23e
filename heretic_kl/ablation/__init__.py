"""What an edit is: directions, weight kernel, operator, plan. Torch only.

Dimensions: L layers, D residual width, F input width of a site, R rank.
"""

from heretic_kl.ablation.direction import (
    Directions,
    ResidualMean,
    difference_of_means,
    winsorize,
)
from heretic_kl.ablation.kernel import WeightKernel
from heretic_kl.ablation.operator import (
    NormMode,
    Operator,
    ablation_operator,
)
from heretic_kl.ablation.plan import (
    Component,
    EditParameters,
    LearningSettings,
    Plan,
    Refinement,
    SiteFacts,
    SiteKey,
    build_plan,
    lowest_edited_layer,
)
from heretic_kl.ablation.separation import Projection, Separation, measure_separation, project
from heretic_kl.ablation.storage import plan_from_tensors, tensors_from_plan

__all__ = [
    "Component",
    "Directions",
    "EditParameters",
    "LearningSettings",
    "NormMode",
    "Operator",
    "Plan",
    "Projection",
    "Refinement",
    "ResidualMean",
    "Separation",
    "SiteFacts",
    "SiteKey",
    "WeightKernel",
    "ablation_operator",
    "build_plan",
    "difference_of_means",
    "lowest_edited_layer",
    "measure_separation",
    "plan_from_tensors",
    "project",
    "tensors_from_plan",
    "winsorize",
]
