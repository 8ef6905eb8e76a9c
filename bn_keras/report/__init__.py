"""Reports on runs, made of what these wrote and of the paper's own numbers, which are named so."""

from bn_keras.report.figures import (
    figure_3,
    figure_3_row,
    paper_order,
    plot_curves,
    write_report,
)
from bn_keras.report.runs import Results, Run, Spread

__all__ = [
    "Results",
    "Run",
    "Spread",
    "figure_3",
    "figure_3_row",
    "paper_order",
    "plot_curves",
    "write_report",
]
