"""Records as tables and figures: data first, drawing second. Measures and asks nothing."""

from heretic_kl.report.details import (
    DetailSection,
    details_lines,
    judging_line,
    profile_bars,
    trial_details,
)
from heretic_kl.report.drawing import check_drawing, png, svg
from heretic_kl.report.evaluation_table import (
    TrialComparison,
    compare_trials,
    comparison_footnotes,
    comparison_sections,
    evaluation_footnotes,
    evaluation_sections,
)
from heretic_kl.report.figures import size_figure
from heretic_kl.report.front_table import (
    FrontRow,
    front_footnotes,
    front_lines,
    front_rows,
    front_table,
)
from heretic_kl.report.inspection_table import inspection_sections
from heretic_kl.report.measurement_table import (
    MeasuredCandidate,
    MeasurementReport,
    measurement_footnotes,
    measurement_sections,
)
from heretic_kl.report.pages.evaluation import EvaluationReport, distinct
from heretic_kl.report.pages.measurement import measurement_page
from heretic_kl.report.pages.page import Page, render
from heretic_kl.report.pages.study import StudyReport, pictures
from heretic_kl.report.studies_table import studies_footnotes, studies_section, study_rows
from heretic_kl.report.wording import (
    align,
    cell,
    compact,
    describe_edit,
    duration,
    label,
    predicted_line,
    scores_line,
    split_lines,
    stopped_line,
    to_ascii,
)

__all__ = [
    "DetailSection",
    "EvaluationReport",
    "FrontRow",
    "MeasuredCandidate",
    "MeasurementReport",
    "Page",
    "StudyReport",
    "TrialComparison",
    "align",
    "cell",
    "check_drawing",
    "compact",
    "compare_trials",
    "comparison_footnotes",
    "comparison_sections",
    "describe_edit",
    "details_lines",
    "distinct",
    "duration",
    "evaluation_footnotes",
    "evaluation_sections",
    "front_footnotes",
    "front_lines",
    "front_rows",
    "front_table",
    "inspection_sections",
    "judging_line",
    "label",
    "measurement_footnotes",
    "measurement_page",
    "measurement_sections",
    "pictures",
    "png",
    "profile_bars",
    "render",
    "scores_line",
    "size_figure",
    "split_lines",
    "studies_footnotes",
    "studies_section",
    "study_rows",
    "svg",
    "predicted_line",
    "stopped_line",
    "to_ascii",
    "trial_details",
]
