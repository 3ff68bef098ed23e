"""Records as tables and figures: data first, drawing second. Measures and asks nothing."""

from heretic_kl.report.details import (
    DetailSection,
    ProfileBar,
    details_lines,
    profile_bars,
    trial_details,
)
from heretic_kl.report.front_table import (
    FrontRow,
    front_footnotes,
    front_lines,
    front_markdown,
    front_rows,
    front_table,
)
from heretic_kl.report.wording import (
    align,
    cell,
    compact,
    describe_edit,
    duration,
    label,
    scores_line,
    to_ascii,
)

__all__ = [
    "DetailSection",
    "FrontRow",
    "ProfileBar",
    "align",
    "cell",
    "compact",
    "describe_edit",
    "details_lines",
    "duration",
    "front_footnotes",
    "front_lines",
    "front_markdown",
    "front_rows",
    "front_table",
    "label",
    "profile_bars",
    "scores_line",
    "to_ascii",
    "trial_details",
]
