"""Makes the paper's experiments and their report: figure1 to figure4, claims.

Those that are named, or figure2 and figure3. What is finished is not run again,
and what was stopped goes on.

Example:
  python -m launch.reproduce figure3 claims --scale=digits --workdir=runs/digits
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict

from . import cli
from .command_error import CommandError

_SCALE = flags.DEFINE_enum(
    "scale",
    "digits",
    ["digits", "cifar10", "imagenet"],
    "Size of it all: minutes, an hour on two cores, or the paper's.",
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 1, "How many runs of each network that is compared.", lower_bound=1
)
_STEPS = flags.DEFINE_integer("steps", 0, "Runs of so many steps; 0: as the configs have it.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of prepared TFDS data sets.")
_PARALLEL = cli.define_parallel()
_WORKDIR = cli.define_workdir("Folder of the report, with a folder for each run.")

_DEFAULT = ["figure2", "figure3"]
_TITLE = "The paper's experiments, made again"


def main(given: list[str]) -> None:
    """Trains what is not finished, then writes and prints the report."""
    from bn_keras.experiments.paper import get_runs
    from bn_keras.experiments.run_all import run_all
    from bn_keras.report import write_report
    from bn_keras.training.plan import describe

    names = _choose(given)
    trials = get_runs(names, _SCALE.value, _SEEDS.value)
    configs = {str(trial): _with_flags(config) for trial, config in trials.items()}
    # The configs of one data set are for one kind of devices, so that one speaks for all.
    for config in {config.data.name: config for config in configs.values()}.values():
        cli.log_lines(describe(config))
    steps = sum(config.train.steps for config in configs.values())
    cli.log_lines({"runs": f"{len(trials)}, of {steps:,} steps in all, in {_WORKDIR.value}"})
    runs = run_all(configs, _WORKDIR.value, _PARALLEL.value, cli.begin_process)

    results = {}
    for trial in trials:
        run = dataclasses.replace(runs[str(trial)], title=trial.title)
        results.setdefault(trial.title, []).append(run)
    sections = _make_sections(names, results)
    write_report(_TITLE, sections, results, _WORKDIR.value, _command(given))
    for section in sections:
        text = re.sub(r"^!\[.*\n?", "", section.body, flags=re.MULTILINE)
        print(f"\n{section.title}\n\n{text.strip()}")
    print(f"\nThe report is {_WORKDIR.value}/report.html, and report.md with its plots beside it.")
    cli.log_lines({"look": f"tensorboard --logdir={_WORKDIR.value}"})


def _choose(given: list[str]) -> list[str]:
    from bn_keras.experiments.paper import EXPERIMENTS

    for name in given:
        if name not in EXPERIMENTS:
            accepted = ", ".join(EXPERIMENTS)
            raise CommandError(f"unknown experiment {name!r}: accepted are {accepted}")
    return [name for name in EXPERIMENTS if name in (given or _DEFAULT)]


def _with_flags(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.data.data_dir = _DATA_DIR.value
    config.train.steps = min(_STEPS.value or config.train.steps, config.train.steps)
    return config


def _make_sections(names: list[str], results: Mapping[str, Sequence]) -> list:
    from bn_keras import report

    make = {
        "figure1": report.figure_1,
        "figure2": report.figure_2,
        "figure3": report.figure_3,
        "figure4": lambda _: report.figure_4(
            report.evaluate_figure_4(_find_members(), _WORKDIR.value)
        ),
        "claims": report.claims,
    }
    return [make[name](results) for name in names]


def _find_members() -> list[str]:
    from bn_keras.experiments.paper import get_runs
    from bn_keras.experiments.run_all import folder_name

    members = get_runs(["figure4"], _SCALE.value, _SEEDS.value)
    return [f"{_WORKDIR.value}/{folder_name(str(trial))}" for trial in members]


def _command(given: list[str]) -> str:
    command = [*cli.command_line("reproduce"), *given]
    for flag in (_SCALE, _SEEDS, _STEPS, _DATA_DIR, _WORKDIR):
        if flag.present or flag is _SCALE:
            command.append(f"--{flag.name}={flag.value}")
    return shlex.join(command)


COMMAND = cli.Command(__name__, main, positional="EXPERIMENT", optional=True)

if __name__ == "__main__":
    COMMAND.run()
