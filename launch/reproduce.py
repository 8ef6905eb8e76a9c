"""Trains the paper's five networks in miniature and reports them as its Figures 2 and 3.

A run that is finished is not run again, and one that was stopped goes on.

Example:
  python -m launch.reproduce --scale=digits --workdir=runs/digits
"""

import importlib
import pathlib
import shlex

from absl import flags

from configs.networks import NETWORKS
from launch import cli

_SCALE = flags.DEFINE_enum("scale", "digits", ["digits", "cifar10"], "Data and size of it all.")
_STEPS = flags.DEFINE_integer("steps", 0, "Runs of so many steps; 0: as the configs have it.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of prepared TFDS data sets.")
_WORKDIR = cli.define_workdir("Folder of the report, with a folder for each run.")


def main() -> None:
    """Trains, then writes and prints the report."""
    from bn_keras.experiment import run_all
    from bn_keras.plan import describe
    from bn_keras.report import write_report

    configs = {}
    for variant, network in NETWORKS.items():
        config = importlib.import_module(f"configs.{_SCALE.value}_{variant}").get_config()
        config.data.data_dir = _DATA_DIR.value
        config.train.steps = _STEPS.value or config.train.steps
        configs[network.title] = config
    # Of one data set and on one kind of devices, so that one speaks for all.
    some = next(iter(configs.values()))
    count = f"{len(configs)}, of {some.train.steps:,} steps each, in {_WORKDIR.value}"
    cli.tell(describe(some) | {"runs": count})
    runs = run_all(configs, _WORKDIR.value)

    command = ["python", "-m", "launch.reproduce"]
    for flag in (_SCALE, _WORKDIR, _STEPS, _DATA_DIR):
        if flag.present or flag is _SCALE:
            command.append(f"--{flag.name}={flag.value}")
    folder = pathlib.Path(_WORKDIR.value)
    print("\n" + write_report(runs, folder, shlex.join(command)))
    print(f"The report is {folder / 'report.md'}, with its plot {folder / 'accuracy.png'}.")
    cli.tell({"look": f"tensorboard --logdir={_WORKDIR.value}"})


if __name__ == "__main__":
    cli.run(main)
