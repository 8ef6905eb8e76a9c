"""Accuracy against the statistical batch size, the number of examples normalized together."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

from etils import epath
from matplotlib.figure import Figure

from bn_keras.errors import UsageError
from bn_keras.experiments.batch_size_runs import SIZES
from bn_keras.experiments.titles import WITHOUT_BN, X5, with_statistical_batch
from bn_keras.inference.evaluation import evaluate_networks
from bn_keras.report.plots import (
    FIGURE_WIDTH,
    STYLES,
    format_percent,
    replace_frame_by_grid,
    scale_logarithmically,
)
from bn_keras.report.saved_evaluation import evaluate_once
from bn_keras.report.sections import Section, describe_divergence, markdown_table
from bn_keras.runs.history import Results, Run
from bn_keras.runs.metrics_log import ACCURACY
from bn_keras.runs.settings import replaced
from bn_keras.runs.workdir import Workdir

# The networks are BN-x5. The second colour is the most distinct one.
_MOVING, _POPULATION = STYLES[X5].color, STYLES[WITHOUT_BN].color


class PopulationRow(TypedDict):
    """Accuracy of a finished run's network with population statistics (Algorithm 2)."""

    title: str
    accuracy: float


def evaluate_batch_sizes(
    workdirs: Mapping[str, str | os.PathLike], folder: str | os.PathLike
) -> list[PopulationRow]:
    """Evaluates the finished networks with population statistics.

    The result is saved in batch_size.json, and read from there until a run changes.

    Args:
      workdirs: folders of the runs by title; unfinished runs are left out.
      folder: folder of batch_size.json.

    Raises:
      StorageError: batch_size.json cannot be written.
      UsageError: see `evaluate_networks`.
    """
    finished = {
        title: path for title, path in workdirs.items() if Workdir(path).read_metrics().is_finished
    }
    if not finished:
        return []

    def evaluate() -> list[PopulationRow]:
        rows: list[PopulationRow] = []
        for title, path in finished.items():
            config = replaced(Workdir(path).read_config(), {"population.when": "end"})
            [found] = evaluate_networks([path], config)
            rows.append({"title": title, "accuracy": found["accuracy"]})
        return rows

    made_of = {title: Workdir(path).read_metrics()[-1] for title, path in finished.items()}
    return evaluate_once(epath.Path(folder) / "batch_size.json", made_of, evaluate)


class _Point(NamedTuple):
    """Accuracies after the last step of the run with a statistical batch size."""

    run: Run
    moving: float
    population: float | None


def build_batch_size(results: Results, rows: Sequence[PopulationRow]) -> Section:
    """Draws accuracy against the statistical batch size, with both kinds of statistics.

    Args:
      results: runs of experiments/batch_size_runs.py; other titles are ignored.
      rows: the result of `evaluate_batch_sizes`.

    Raises:
      UsageError: no run has finished.
    """
    population = {row["title"]: row["accuracy"] for row in rows}
    runs = {
        size: results[title][0]
        for size in SIZES
        if results.get(title := with_statistical_batch(size))
    }
    points = {
        size: _Point(run, list(run.curve(ACCURACY).values())[-1], population.get(run.title))
        for size, run in runs.items()
        if run.is_finished
    }
    if not points:
        raise UsageError("no run of the statistical batch sizes has finished: train them first")
    body = [
        _describe_setup(next(iter(points.values())).run),
        "![Validation accuracy against the number of examples that BN normalizes together, with"
        " moving and with population statistics](batch_size.svg)",
        "Bars are one standard error of the accuracy, due to the number of validation images. Each"
        " point is a single run, so the variation between seeds is unknown.",
        _tabulate(points),
        *describe_divergence({run.title: [run] for run in runs.values()}),
    ]
    return Section(
        "Accuracy against the statistical batch size",
        "\n\n".join(body),
        {"batch_size.svg": _draw(points)},
        _summarize(points),
    )


def _describe_setup(run: Run) -> str:
    train, schedule = run.config.train, run.config.schedule
    rate = schedule.base_rate * train.global_batch_size / schedule.reference_batch_size
    return (
        f"BN-x5 is trained in all runs with the same {train.steps:,} batches of"
        f" {train.global_batch_size} images and the initial learning rate {rate:g}. Only the number"
        " of examples that BN normalizes together differs (ghost batches). The finished network is"
        " evaluated with the moving averages of the training, and with population statistics"
        f" (Algorithm 2) from {run.config.population.num_batches} training batches."
    )


def _tabulate(points: Mapping[int, _Point]) -> str:
    header = ("examples normalized together", "moving statistics", "population statistics")
    rows = [
        (
            f"{size}",
            f"{point.moving:.1%}",
            "-" if point.population is None else f"{point.population:.1%}",
            f"{point.run.lowest_loss:#.3g}",
        )
        for size, point in points.items()
    ]
    return markdown_table((*header, "lowest training loss"), rows)


def _draw(points: Mapping[int, _Point]) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    for label, color, marker, accuracies in (
        ("moving statistics", _MOVING, "o", {s: p.moving for s, p in points.items()}),
        ("population statistics", _POPULATION, "s", {s: p.population for s, p in points.items()}),
    ):
        known = {size: value for size, value in accuracies.items() if value is not None}
        errors = [points[size].run.standard_error(value) for size, value in known.items()]
        axes.errorbar(
            list(known),
            list(known.values()),
            errors,
            color=color,
            marker=marker,
            capsize=3,
            label=label,
        )
    axes.set(xlabel="examples normalized together", ylabel="validation accuracy")
    scale_logarithmically(axes, list(points))
    format_percent(axes.yaxis)
    replace_frame_by_grid(axes)
    axes.legend(loc="best")
    return figure


def _summarize(points: Mapping[int, _Point]) -> str:
    """Summarizes the sizes whose accuracies hardly differ, and the accuracy of the smallest."""
    plateau, smallest = _plateau(points), min(points)
    accuracies = [points[size].moving for size in plateau]
    reached = f"{accuracies[0]:.1%}"
    if len(accuracies) > 1:
        reached = f"{min(accuracies):.1%} to {max(accuracies):.1%}"
    more = " or more" if len(plateau) > 1 else ""
    text = f"With statistics of {plateau[0]}{more} examples, BN-x5 reaches {reached}"
    if smallest not in plateau:
        text += f"; with {smallest}, {points[smallest].moving:.1%}"
        population = points[smallest].population
        if population is not None:
            text += f", and {population:.1%} with population statistics"
    return f"{text}."


def _plateau(points: Mapping[int, _Point]) -> list[int]:
    """Returns the sizes from which on all accuracies are within two standard errors of the best.

    If the largest size is worse, only the best one is returned.
    """
    best = max(points, key=lambda size: points[size].moving)
    accuracy = points[best].moving
    margin = 2 * math.sqrt(2) * points[best].run.standard_error(accuracy)
    is_good = {size: points[size].moving >= accuracy - margin for size in points}
    descending = sorted(points, reverse=True)
    return sorted(itertools.takewhile(is_good.get, descending)) or [best]
