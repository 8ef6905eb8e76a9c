"""Reports on runs, made of what these wrote and of the paper's own numbers, which are named so."""

from bn_keras.report.activations import figure_1
from bn_keras.report.comparison import figure_3, figure_3_row
from bn_keras.report.curves import figure_2
from bn_keras.report.ensemble import evaluate_figure_4, figure_4
from bn_keras.report.page import Section, escape, format_seconds, table, write_report
from bn_keras.report.sentences import claims
from bn_keras.runs.history import Results, Run, Spread

__all__ = [
    "Results",
    "Run",
    "Section",
    "Spread",
    "claims",
    "escape",
    "evaluate_figure_4",
    "figure_1",
    "figure_2",
    "figure_3",
    "figure_3_row",
    "figure_4",
    "format_seconds",
    "table",
    "write_report",
]
