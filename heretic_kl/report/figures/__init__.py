"""Rows of plain values as figures: a title, a text, a data table, a Vega-Lite specification.

Measures nothing and draws nothing. Another chart: rows in `study_data` or `run_data`, a function in
a file here, a call in `pages/study`; `drawing` makes the pictures.
"""

from heretic_kl.report.figures.figure import Figure
from heretic_kl.report.figures.measured import comparison_figure, positions_figure, strength_figure
from heretic_kl.report.figures.progress import (
    history_figure,
    hypervolume_figure,
    importance_figure,
)
from heretic_kl.report.figures.residuals import norms_figure, projection_figure, separation_figure
from heretic_kl.report.figures.size import size_figure
from heretic_kl.report.figures.trade_off import (
    candidates_figure,
    front_figure,
    refinement_figure,
)

__all__ = [
    "Figure",
    "candidates_figure",
    "comparison_figure",
    "front_figure",
    "history_figure",
    "hypervolume_figure",
    "importance_figure",
    "norms_figure",
    "positions_figure",
    "projection_figure",
    "refinement_figure",
    "separation_figure",
    "size_figure",
    "strength_figure",
]
