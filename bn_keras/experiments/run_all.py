"""Trains the networks of several configs, one after another or in parallel."""

import os
import re
from collections.abc import Callable, Mapping

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from bn_keras.errors import TrainingDivergedError
from bn_keras.experiments.parallel import Task, divide_machine, run_tasks
from bn_keras.runs.history import Run
from bn_keras.runs.workdir import Workdir
from bn_keras.training.length import finished_because
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.plan import describe_progress


def train_all(
    configs: Mapping[str, ConfigDict],
    folder: str | os.PathLike,
    max_parallel: int = 0,
    setup_process: Callable[[], None] | None = None,
) -> dict[str, Run]:
    """Trains one network per config, each in its own workdir.

    Finished runs are kept, and stopped runs resume. Divergence is a result that the run records; it
    does not stop the other networks.

    Args:
      configs: configs by title; see `folder_name` for the workdirs.
      folder: parent folder of the workdirs.
      max_parallel: maximum number of networks that train at the same time, each in its own process
        with its own devices; 0: as many as the devices allow.
      setup_process: function called first in each such process, which can import it by name.

    Returns:
      The runs by title, in the order of the configs.

    Raises:
      UsageError: see `train_and_evaluate`; all workdirs are checked before any training.
      TrainingStoppedError: SIGTERM or SIGINT arrived.
    """
    workdirs = {title: epath.Path(folder) / folder_name(title) for title in configs}
    due = [title for title in configs if _is_due(Workdir(workdirs[title]), configs[title])]
    for title, workdir in workdirs.items():
        progress = describe_progress(Workdir(workdir), configs[title])
        logging.info("%s in %s: %s", title, workdir, progress)
    sections = [configs[title].distribution for title in due]
    distributions = [(section.strategy, section.replicas) for section in sections]
    shares = divide_machine(distributions, max_parallel)
    # TensorFlow fixes its devices when it starts, so one process cannot change the distribution.
    if len(shares) > 1 or len(set(distributions)) > 1:
        logging.info("training %d of %d runs at a time", len(shares), len(due))
        tasks = [
            Task(title, _train_in_process, (configs[title], workdirs[title], title, setup_process))
            for title in due
        ]
        run_tasks(tasks, shares)
    else:
        for title in due:
            _train(configs[title], workdirs[title], title)
    return {title: Run.read(title, workdirs[title]) for title in configs}


def folder_name(title: str) -> str:
    """Returns the name of a title's workdir, such as "bn_x5_seed_0" for "BN-x5 seed 0"."""
    return re.sub(r"[^a-z0-9.]+", "_", title.lower())


def _is_due(run: Workdir, config: ConfigDict) -> bool:
    run.check(config)
    if run.has_diverged() and run.num_retries() >= config.train.retries:
        return False
    return not finished_because(run, config)


def _train(config: ConfigDict, workdir: epath.Path, title: str) -> None:
    try:
        train_and_evaluate(config, workdir, label=title)
    except TrainingDivergedError as error:
        logging.warning("%s: %s", title, error)


def _train_in_process(
    config: ConfigDict, workdir: epath.Path, title: str, setup_process: Callable[[], None] | None
) -> None:
    if setup_process:
        setup_process()
    _train(config, workdir, title)
