"""Reports on runs: measurements beside the paper's own results."""

from bn_keras.report.batch_size import build_batch_size, evaluate_batch_sizes
from bn_keras.report.claims import build_claims
from bn_keras.report.figure_1 import build_figure_1
from bn_keras.report.figure_2 import build_figure_2
from bn_keras.report.figure_3 import build_figure_3, describe_accuracy
from bn_keras.report.figure_4 import build_figure_4, evaluate_ensemble
from bn_keras.report.page import write_report
from bn_keras.report.sections import Section, escape, markdown_table
from bn_keras.runs.history import Results, Run, Spread

__all__ = [
    "Results",
    "Run",
    "Section",
    "Spread",
    "build_batch_size",
    "build_claims",
    "build_figure_1",
    "build_figure_2",
    "build_figure_3",
    "build_figure_4",
    "describe_accuracy",
    "escape",
    "evaluate_batch_sizes",
    "evaluate_ensemble",
    "markdown_table",
    "write_report",
]
