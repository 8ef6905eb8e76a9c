"""The paper's Figures 2 and 3 from what runs wrote; the paper's own numbers are named as such."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import keras
import matplotlib
import tensorflow as tf

import bn_keras
from bn_keras.report.runs import Run
from bn_keras.schedule import PAPER_BATCH_SIZE

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers can tell apart, and dashes for print.
_STYLES = (
    dict(color="#000000", linestyle="-"),
    dict(color="#E69F00", linestyle="--"),
    dict(color="#0072B2", linestyle="-"),
    dict(color="#009E73", linestyle="-."),
    dict(color="#CC79A7", linestyle=":"),
)


# Single-crop accuracy that the paper's Inception got to, and the others are measured by (Figure 3).
INCEPTION_ON_IMAGENET = 0.722


def write_report(runs: Sequence[Run], folder: str | os.PathLike, command: str) -> str:
    """Writes report.md and accuracy.png about runs that differ only as the paper's networks do.

    Args:
      runs: the first is Inception, by whose best accuracy the others are measured.
      folder: where the two files go.
      command: that made the runs, for the reader who wants to repeat them.

    Returns:
      What a terminal shows of it: the table and what it says about the paper's order.
    """
    folder = Path(folder)
    plot_curves(runs, folder / "accuracy.png")
    summary = figure_3(runs) + "\n\n" + "\n".join(paper_order(runs)) + "\n"
    text = f"""# The networks of the paper in miniature

{_setting(runs)}

{summary}
![Validation accuracy and training loss against steps](accuracy.png)

A diamond marks where a network reaches Inception's best validation accuracy.

Made by `{command}` with bn_keras {bn_keras.__version__}, TensorFlow {tf.__version__}, Keras
{keras.__version__} and Python {platform.python_version()} on {platform.machine()} with
{os.cpu_count()} cores. Each run's config.json and metrics.jsonl lie beside this file; the numbers
above are computed from them.
"""
    (folder / "report.md").write_text(text)
    return summary


def figure_3(runs: Sequence[Run]) -> str:
    """Gives the table of Figure 3 in Markdown, with columns for the training loss and the time."""
    inception = runs[0]
    rows = [
        (
            "network",
            f"steps to {inception.best_accuracy:.1%}",
            "best accuracy",
            f"steps to training loss {inception.lowest_loss:.2g}",
            "lowest training loss",
            "learning rate",
            "training time",
        )
    ]
    for run in runs:
        rate = run.curve("train/learning_rate")[1]
        diverged = f" (diverged at step {run.diverged_at})" if run.diverged_at else ""
        rows.append(
            (
                run.title,
                _steps(run.steps_to_accuracy(inception.best_accuracy)),
                f"{run.best_accuracy:.1%}{diverged}",
                _steps(run.steps_to_loss(inception.lowest_loss)),
                f"{run.lowest_loss:.2g}",
                f"{rate[0]:.4g}" if rate else "-",
                f"{run.seconds:.0f} s",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def figure_3_row(run: Run) -> str:
    """Gives a run's row of Figure 3 in words.

    Its best accuracy, and the steps to config.train.until_accuracy or, on ImageNet, to the 72.2%
    by which the paper measures; steps also as those of the paper's batch size.
    """
    batch = run.config.train.global_batch_size
    best, target = run.best_accuracy, run.config.train.until_accuracy
    if not target and run.config.data.name == "imagenet2012":
        target = INCEPTION_ON_IMAGENET
    parts = [f"best accuracy {best:.2%} {_after(run.steps_to_accuracy(best), batch)}"]
    if target:
        parts.append(f"{target:.1%} {_after(run.steps_to_accuracy(target), batch)}")
    return ", ".join(parts)


def paper_order(runs: Sequence[Run]) -> list[str]:
    """Compares the order of the networks here with that of the paper's Figure 3.

    Args:
      runs: of all five networks, in the paper's order.

    Returns:
      A line for each statement that Figure 3 makes, whether or not it holds here.
    """
    inception, baseline, x5, x30, sigmoid = runs
    goal = inception.best_accuracy

    def sooner(a: Run, b: Run) -> bool:
        steps = [run.steps_to_accuracy(goal) or float("inf") for run in (a, b)]
        return steps[0] < steps[1]

    statements = [
        (
            "BN-Baseline reaches Inception's best accuracy in fewer steps",
            sooner(baseline, inception),
        ),
        ("BN-x5 reaches it in fewer steps than BN-Baseline", sooner(x5, baseline)),
        ("BN-x30 reaches it in fewer steps than BN-Baseline", sooner(x30, baseline)),
        ("BN-x30 reaches it later than BN-x5", sooner(x5, x30)),
        (
            "BN-x30 alone has the best accuracy",
            all(x30.best_accuracy > r.best_accuracy for r in runs if r is not x30),
        ),
        ("BN-x5-Sigmoid never reaches it", sigmoid.steps_to_accuracy(goal) is None),
        (
            "BN-x5-Sigmoid gets beyond nine tenths of it",
            sigmoid.best_accuracy > 0.9 * goal,
        ),
    ]
    return [
        f"- {'As in the paper' if holds else 'Not so here, otherwise than in the paper'}:"
        f" {statement}."
        for statement, holds in statements
    ]


def plot_curves(runs: Sequence[Run], path: str | os.PathLike) -> None:
    """Draws validation accuracy, as Figure 2, and training loss against steps."""
    goal = runs[0].best_accuracy
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for run, style in zip(runs, _STYLES, strict=False):
        left.plot(*run.curve("validation/accuracy"), label=run.title, linewidth=1.6, **style)
        right.plot(*run.curve("train/loss"), linewidth=1.6, **style)
        reached = run.steps_to_accuracy(goal)
        if reached is not None:
            left.plot(reached, goal, "D", color=style["color"], markersize=8, markeredgecolor="w")
    left.axhline(goal, color="0.6", linewidth=0.8, zorder=0)
    left.set(xlabel="training steps", ylabel="validation accuracy", ylim=(0, 1.02))
    right.set(xlabel="training steps", ylabel="training loss", yscale="log")
    left.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _setting(runs: Sequence[Run]) -> str:
    config = runs[0].config
    memory = 1 / (1 - config.batch_norm.momentum)
    return (
        f"Data: {config.data.name}. Network: Figure 5 at width {config.model.width:g} with the"
        f" {config.model.stem!r} stem, {config.model.initializer} weights, seed {config.seed}."
        f" Training: {config.train.steps} steps of {config.train.global_batch_size} examples on"
        f" {max(1, config.distribution.replicas)} replica(s), from a base rate of"
        f" {config.schedule.base_rate:g}, of which the other networks' rates are the paper's"
        f" multiples; configs/{config.data.name}_inception.py says where that and the"
        " initialization come from."
        " The BN networks are evaluated with moving averages of momentum"
        f" {config.batch_norm.momentum:g}, which remember about {memory:.0f} steps, so that it is"
        " the network that is measured and not the lag of a long average."
    )


def _after(steps: int | None, batch: int) -> str:
    if steps is None:
        return "never"
    paper_steps = f" ({steps * batch / PAPER_BATCH_SIZE:,.0f} of {PAPER_BATCH_SIZE})"
    return f"after {steps:,} steps{paper_steps if batch != PAPER_BATCH_SIZE else ''}"


def _steps(steps: int | None) -> str:
    return "never" if steps is None else f"{steps:,}"
