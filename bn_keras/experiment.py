"""Runs that belong together, one after another."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from bn_keras.errors import TrainingDivergedError
from bn_keras.plan import state
from bn_keras.report import Run
from bn_keras.train import train_and_evaluate
from bn_keras.workdir import Workdir


def run_all(configs: Mapping[str, ConfigDict], folder: str | os.PathLike) -> list[Run]:
    """Trains a network per config, each in a folder of its own.

    What is finished is not run again, and what was stopped goes on. A network that diverges is
    finished too: its run says so, and the next one is trained.

    Args:
      configs: by title; the folders are named after the titles, in lower case.
      folder: where the runs' folders lie.

    Returns:
      The runs, in the order of the configs.
    """
    runs = []
    for title, config in configs.items():
        workdir = Path(folder) / re.sub(r"[^a-z0-9.]+", "_", title.lower())
        run = Workdir(workdir)
        run.check(config)
        logging.info("%s in %s: %s", title, workdir, state(run, config.train.steps))
        if not run.has_diverged() or run.num_retries() < config.train.retries:
            try:
                train_and_evaluate(config, workdir, label=title)
            except TrainingDivergedError as error:
                logging.warning("%s: %s", title, error)
        runs.append(Run.read(title, workdir))
    return runs
