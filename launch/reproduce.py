"""Runs the paper's experiments and writes their report.

The experiments are figure1, figure2, figure3, figure4 and claims; the default is figure2 figure3.
Finished runs are kept, and stopped runs resume.

Example:
  bn-keras reproduce figure3 claims --scale=digits --workdir=runs/digits
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from . import cli
from .command_error import CommandError, did_you_mean

if TYPE_CHECKING:
    from bn_keras.report import Run, Section

# The choices are experiments.paper.SCALES, not imported here so that --help is fast.
_SCALE = flags.DEFINE_enum(
    "scale",
    "digits",
    ["digits", "cifar10", "imagenet"],
    "Minutes, an hour on two cores, or the paper's own size.",
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 1, "Runs per network, for the figures that compare networks.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
    "steps", 0, "Maximum number of steps of each run; 0: no limit.", lower_bound=0
)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of prepared TFDS data sets.")
_PARALLEL = cli.define_parallel()
_WORKDIR = cli.define_workdir("Folder of the report and of all runs.")

_DEFAULT_EXPERIMENTS = ["figure2", "figure3"]
_TITLE = "Reproducing Batch Normalization (Ioffe & Szegedy, 2015)"


def main(given: list[str]) -> None:
    """Trains unfinished runs, then writes and prints the report."""
    from bn_keras.experiments.paper import get_trials
    from bn_keras.experiments.run_all import train_all
    from bn_keras.report import write_report
    from bn_keras.training.plan import describe_input

    workdir = _WORKDIR.value
    experiments = _choose_experiments(given)
    trials = get_trials(experiments, _SCALE.value, _SEEDS.value)
    configs = {str(trial): _apply_flags(config) for trial, config in trials.items()}
    # All configs of one data set use the same devices, so each data set is described once.
    for config in {config.data.name: config for config in configs.values()}.values():
        cli.log_lines(describe_input(config))
    steps = sum(config.train.steps for config in configs.values())
    cli.log_lines({"runs": f"{len(trials)} in {workdir}, {steps:,} steps in total"})
    runs = train_all(configs, workdir, _PARALLEL.value, cli.begin_child_process)

    results: dict[str, list[Run]] = {}
    for trial in trials:
        run = dataclasses.replace(runs[str(trial)], title=trial.title)
        results.setdefault(trial.title, []).append(run)
    sections = _build_sections(experiments, results)
    write_report(_TITLE, sections, results, workdir, _format_command(given))
    for section in sections:
        text = re.sub(r"^!\[.*\n?", "", section.body, flags=re.MULTILINE)
        print(f"\n{section.title}\n\n{text.strip()}")
    print(f"\nReport: {workdir}/report.html (self-contained); {workdir}/report.md and its plots")
    cli.log_lines({"curves": f"tensorboard --logdir={workdir}"})


def _choose_experiments(given: list[str]) -> list[str]:
    from bn_keras.experiments.paper import EXPERIMENTS

    for name in given:
        if name not in EXPERIMENTS:
            guess, expected = did_you_mean(name, EXPERIMENTS), ", ".join(EXPERIMENTS)
            raise CommandError(f"unknown experiment {name!r}{guess}: expected one of {expected}")
    return [name for name in EXPERIMENTS if name in (given or _DEFAULT_EXPERIMENTS)]


def _apply_flags(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.data.data_dir = _DATA_DIR.value
    config.train.steps = min(_STEPS.value or config.train.steps, config.train.steps)
    return config


def _build_sections(experiments: list[str], results: Mapping[str, Sequence[Run]]) -> list[Section]:
    from bn_keras import report

    build = {
        "figure1": report.build_figure_1,
        "figure2": report.build_figure_2,
        "figure3": report.build_figure_3,
        "figure4": lambda _: report.build_figure_4(
            report.evaluate_ensemble(_find_members(), _WORKDIR.value)
        ),
        "claims": report.build_claims,
    }
    return [build[name](results) for name in experiments]


def _find_members() -> list[str]:
    """Returns the workdirs of the ensemble's members."""
    from bn_keras.experiments.paper import get_trials
    from bn_keras.experiments.run_all import folder_name

    members = get_trials(["figure4"], _SCALE.value, _SEEDS.value)
    return [f"{_WORKDIR.value}/{folder_name(str(trial))}" for trial in members]


def _format_command(given: list[str]) -> str:
    """Returns the command line that reproduces the report."""
    command = [*cli.command_line("reproduce"), *given]
    for flag in (_SCALE, _SEEDS, _STEPS, _DATA_DIR, _WORKDIR):
        if flag.present or flag is _SCALE:
            command.append(f"--{flag.name}={flag.value}")
    return shlex.join(command)


COMMAND = cli.Command(__name__, main, positional="EXPERIMENT", optional=True)

if __name__ == "__main__":
    COMMAND.run()
