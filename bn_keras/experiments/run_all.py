"""Runs that belong together, one after another or side by side."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from bn_keras.errors import TrainingDivergedError
from bn_keras.experiments.parallel import Task, run_side_by_side, shares
from bn_keras.report import Run
from bn_keras.runs.workdir import Workdir
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.plan import state


def run_all(
    configs: Mapping[str, ConfigDict],
    folder: str | os.PathLike,
    parallel: int = 0,
    begin: Callable[[], None] | None = None,
) -> dict[str, Run]:
    """Trains a network per config, each in a folder of its own.

    What is finished is not run again, and what was stopped goes on. A network that diverges is
    finished too: its run says so, and the next one is trained.

    Args:
      configs: by title; the folders are named after the titles, in lower case.
      folder: where the runs' folders lie.
      parallel: how many are trained side by side at most, each in a process and on devices of its
        own; 0 is as many as the devices allow.
      begin: what such a process begins with, importable by its name.

    Returns:
      The runs by title, in the order of the configs.

    Raises:
      UsageError: as from `train_and_evaluate`, and of the folders before anything is trained.
      TrainingStoppedError: a signal came.
    """
    workdirs = {title: Path(folder) / folder_name(title) for title in configs}
    due = [title for title in configs if _is_due(configs[title], Workdir(workdirs[title]))]
    for title, workdir in workdirs.items():
        found = state(Workdir(workdir), configs[title].train.steps)
        logging.info("%s in %s: %s", title, workdir, found)
    parts = shares([configs[title] for title in due], parallel)
    if len(parts) > 1:
        logging.info("%d of %d go side by side", len(parts), len(due))
        tasks = [
            Task(title, _begin_and_train, (configs[title], workdirs[title], title, begin))
            for title in due
        ]
        run_side_by_side(tasks, parts)
    else:
        for title in due:
            _train(configs[title], workdirs[title], title)
    return {title: Run.read(title, workdirs[title]) for title in configs}


def folder_name(title: str) -> str:
    """Gives the name of the folder in which a title's run lies."""
    return re.sub(r"[^a-z0-9.]+", "_", title.lower())


def _is_due(config: ConfigDict, run: Workdir) -> bool:
    run.check(config)
    if run.has_diverged() and run.num_retries() >= config.train.retries:
        return False
    return not run.is_finished()


def _train(config: ConfigDict, workdir: Path, title: str) -> None:
    try:
        train_and_evaluate(config, workdir, label=title)
    except TrainingDivergedError as error:
        logging.warning("%s: %s", title, error)


def _begin_and_train(
    config: ConfigDict, workdir: Path, title: str, begin: Callable[[], None] | None
) -> None:
    if begin:
        begin()
    _train(config, workdir, title)
