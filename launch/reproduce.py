"""Runs the paper's experiments and writes their report.

The experiments are figure1, figure2, figure3, figure4, batch_size (accuracy against the number of
examples that BN normalizes together) and claims; the default is figure2 figure3. Finished runs are
kept, and stopped runs resume. At the scales cifar10 and imagenet, all networks are trained with the
first seed before any with the second, so that a report can compare them early.

Example:
  bn-keras reproduce figure3 claims --scale=digits --workdir=runs/digits
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags, logging
from ml_collections import ConfigDict

from . import cli
from .command_error import CommandError, did_you_mean

if TYPE_CHECKING:
    from bn_keras.experiments.paper import Trial
    from bn_keras.report import Run, Section

# The choices are experiments.paper.SCALES, not imported here so that --help is fast.
_SCALE = flags.DEFINE_enum(
    "scale",
    "digits",
    ["digits", "cifar10", "imagenet"],
    "digits: minutes on two cores; cifar10: hours to days; imagenet: the paper's own size.",
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 1, "Runs per network, for the figures that compare networks.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
    "steps", 0, "Maximum number of steps of each run; 0: no limit.", lower_bound=0
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Folder of prepared TFDS data sets; without it, TFDS' default."
)
_DRY_RUN = flags.DEFINE_boolean(
    "dry_run", False, "Only list the runs, with their progress and estimated time on one core."
)
_REPORT_ONLY = flags.DEFINE_boolean(
    "report_only", False, "Train nothing; report the runs that have ended so far."
)
_PARALLEL = cli.define_parallel()
_WORKDIR = cli.define_workdir("Folder of the report and of all runs.")

_DEFAULT_EXPERIMENTS = ["figure2", "figure3"]
_TITLE = "Reproducing Batch Normalization (Ioffe & Szegedy, 2015)"


def main(given: list[str]) -> None:
    """Trains unfinished runs, then writes and prints the report."""
    from bn_keras.experiments.paper import get_trials
    from bn_keras.experiments.run_all import read_ended, train_all
    from bn_keras.report import write_report
    from bn_keras.training.plan import describe_input

    if _DRY_RUN.value and _REPORT_ONLY.value:
        raise CommandError("--dry_run and --report_only are mutually exclusive")
    workdir = _WORKDIR.value
    experiments = _choose_experiments(given)
    trials = get_trials(experiments, _SCALE.value, _SEEDS.value)
    configs = {str(trial): _apply_flags(config) for trial, config in trials.items()}
    if _REPORT_ONLY.value:
        runs = read_ended(configs, workdir)
        if not runs:
            raise CommandError(f"no run in {workdir} has ended: train first, without --report_only")
        logging.info("reporting %d of %d runs", len(runs), len(configs))
    else:
        # All configs of one data set use the same devices, so each data set is described once.
        for config in {config.data.name: config for config in configs.values()}.values():
            cli.log_lines(describe_input(config))
        _describe_runs(configs)
        if _DRY_RUN.value:
            return
        runs = train_all(configs, workdir, _PARALLEL.value, cli.begin_child_process)

    results = _group(trials, runs)
    sections = _build_sections(experiments, results)
    num_missing = len(configs) - len(runs)
    write_report(_TITLE, sections, results, workdir, _format_command(given), num_missing)
    for section in sections:
        if section.summary:
            print(f"\n{section.title}: {section.summary}")
    print(f"\nReport: {workdir}/report.html (self-contained); {workdir}/report.md and its plots")
    cli.log_lines({"curves": shlex.join(["tensorboard", f"--logdir={workdir}"])})


def _choose_experiments(given: list[str]) -> list[str]:
    from bn_keras.experiments.paper import EXPERIMENTS

    for name in given:
        if name not in EXPERIMENTS:
            guess, expected = did_you_mean(name, EXPERIMENTS), ", ".join(EXPERIMENTS)
            raise CommandError(f"unknown experiment {name!r}{guess}: expected one of {expected}")
    return [name for name in EXPERIMENTS if name in (given or _DEFAULT_EXPERIMENTS)]


def _apply_flags(config: ConfigDict) -> ConfigDict:
    from bn_keras.runs.settings import replaced

    steps = min(_STEPS.value or config.train.steps, config.train.steps)
    return replaced(config, {"data.data_dir": _DATA_DIR.value, "train.steps": steps})


def _describe_runs(configs: Mapping[str, ConfigDict]) -> None:
    """Logs what is left to train; with --dry_run, also prints the runs in the order of training."""
    from bn_keras.experiments.paper import estimate_core_hours
    from bn_keras.experiments.run_all import list_remaining
    from bn_keras.text import counted, format_duration, table

    rows, total, unknown = [], 0.0, False
    runs = list_remaining(configs, _WORKDIR.value)
    for run in runs:
        config = configs[run.title]
        hours = estimate_core_hours(config)
        left = None if hours is None else 3600 * hours * run.steps / config.train.steps
        total += left or 0.0
        unknown |= left is None and run.steps > 0
        cost = "unknown" if left is None else format_duration(left)
        rows.append([run.title, run.progress, f"{run.steps:,}", cost, format_duration(total)])
    if _DRY_RUN.value:
        header = ["run", "progress", "steps left", "time on one core", "running total"]
        print("\n".join(table([header, *rows], left=2)))
    steps = sum(run.steps for run in runs)
    text = f"{counted(len(runs), 'run')} in {_WORKDIR.value}, {steps:,} steps left"
    if not unknown:
        text += f", about {format_duration(total)} on one core (of an AMD EPYC virtual machine)"
    cli.log_lines({"runs": text})


def _group(trials: Mapping[Trial, ConfigDict], runs: Mapping[str, Run]) -> dict[str, list[Run]]:
    """Returns the runs of each network, in the order of their seeds."""
    results: dict[str, list[Run]] = {}
    for trial in trials:
        if str(trial) in runs:
            run = dataclasses.replace(runs[str(trial)], title=trial.title)
            results.setdefault(trial.title, []).append(run)
    return results


def _build_sections(experiments: list[str], results: Mapping[str, Sequence[Run]]) -> list[Section]:
    from bn_keras import report
    from bn_keras.errors import UsageError

    folder = _WORKDIR.value
    build = {
        "figure1": report.build_figure_1,
        "figure2": report.build_figure_2,
        "figure3": report.build_figure_3,
        "figure4": lambda _: report.build_figure_4(
            report.evaluate_ensemble(list(_find_workdirs("figure4").values()), folder)
        ),
        "batch_size": lambda results: report.build_batch_size(
            results, report.evaluate_batch_sizes(_find_workdirs("batch_size"), folder)
        ),
        "claims": report.build_claims,
    }
    sections = []
    for name in experiments:
        try:
            sections.append(build[name](results))
        except UsageError as error:
            if not _REPORT_ONLY.value:
                raise
            logging.warning("left out: %s: %s", name, error)
    return sections


def _find_workdirs(experiment: str) -> dict[str, str]:
    """Returns the workdirs of an experiment's runs by title."""
    from bn_keras.experiments.paper import get_trials
    from bn_keras.experiments.run_all import workdir_of

    trials = get_trials([experiment], _SCALE.value, _SEEDS.value)
    return {trial.title: str(workdir_of(_WORKDIR.value, str(trial))) for trial in trials}


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
