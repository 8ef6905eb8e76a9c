"""Trains the paper's five networks in miniature and reports them as its Figures 2 and 3.

A run that is finished is not run again, and one that was stopped goes on.

Example:
  python -m launch.reproduce --scale=digits --workdir=runs/digits
"""

import importlib
import pathlib

from absl import flags, logging

from configs.networks import NETWORKS
from launch import cli

_SCALE = flags.DEFINE_enum("scale", "digits", ["digits", "cifar10"], "Data and size of it all.")
_STEPS = flags.DEFINE_integer("steps", 0, "Shorter runs of so many steps; 0: the configs'.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of prepared TFDS data sets.")
_WORKDIR = cli.define_workdir()


def main() -> None:
    """Trains, then writes and prints the report."""
    from bn_keras.errors import TrainingDivergedError
    from bn_keras.report import Run, write_report
    from bn_keras.train import train_and_evaluate

    folder = pathlib.Path(_WORKDIR.value)
    runs = []
    for variant, network in NETWORKS.items():
        config = importlib.import_module(f"configs.{_SCALE.value}_{variant}").get_config()
        config.data.data_dir = _DATA_DIR.value
        if _STEPS.value:
            config.train.steps = _STEPS.value
        try:
            train_and_evaluate(config, folder / variant, label=f"{network.title:13}")
        except TrainingDivergedError as error:
            logging.warning("%s: %s", network.title, error)
        runs.append(Run.read(network.title, folder / variant))

    command = f"python -m launch.reproduce --scale={_SCALE.value} --workdir={_WORKDIR.value}"
    if _STEPS.value:
        command += f" --steps={_STEPS.value}"
    print("\n" + write_report(runs, folder, command))
    print(f"The report is {folder / 'report.md'}, with its plot {folder / 'accuracy.png'}.")


if __name__ == "__main__":
    cli.run(main)
