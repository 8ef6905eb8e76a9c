"""Trains the networks of several configs, one after another or in parallel."""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from bn_keras.errors import TrainingDivergedError
from bn_keras.experiments.parallel import Task, divide_machine, run_tasks
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.history import Run
from bn_keras.runs.settings import flatten, replaced
from bn_keras.runs.workdir import Workdir
from bn_keras.training.config import check_config
from bn_keras.training.graphs import Graphs
from bn_keras.training.length import finish_reason
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.plan import describe_progress, prepare_input

# Replaces all seeds, to compare configs regardless of them.
_SEED = {"seed": 0}


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
      UsageError: see `train_and_evaluate`; all configs and workdirs are checked before any
        training.
      TrainingStoppedError: SIGTERM or SIGINT arrived.
    """
    for config in configs.values():
        check_config(config)
    workdirs = {title: workdir_of(folder, title) for title in configs}
    due = [title for title in configs if _is_due(Workdir(workdirs[title]), configs[title])]
    for title, workdir in workdirs.items():
        progress = describe_progress(Workdir(workdir), configs[title])
        logging.info("%s in %s: %s", title, workdir, progress)
    sections = [configs[title].distribution for title in due]
    distributions = [(section.strategy, section.replicas) for section in sections]
    shares = divide_machine(distributions, max_parallel)
    due_runs = [_DueRun(title, configs[title], workdirs[title]) for title in due]
    # TensorFlow fixes its devices when it starts, so one process cannot change the distribution.
    if len(shares) > 1 or len(set(distributions)) > 1:
        logging.info("training %d of %d runs at a time", len(shares), len(due))
        # Once, instead of once in each process.
        for config in {configs[title].data.name: configs[title] for title in due}.values():
            prepare_input(config)
        tasks = [
            Task(group[0].title, _train_in_process, (group, setup_process))
            for group in _group(due_runs, len(shares))
        ]
        run_tasks(tasks, shares)
    else:
        _train(due_runs)
    return {title: Run.read(title, workdirs[title]) for title in configs}


class RemainingRun(NamedTuple):
    """Remaining steps of a run.

    Attributes:
      title: title of the run.
      steps: steps that are left.
      progress: description of what is done and what is left.
    """

    title: str
    steps: int
    progress: str


def list_remaining(
    configs: Mapping[str, ConfigDict], folder: str | os.PathLike
) -> list[RemainingRun]:
    """Returns what `train_all` would do with the same arguments; raises the same UsageErrors."""
    remaining = []
    for title, config in configs.items():
        check_config(config)
        run = Workdir(workdir_of(folder, title))
        steps = 0
        if _is_due(run, config):
            steps = config.train.steps - Checkpoints(run.checkpoints, {}).latest_step
        remaining.append(RemainingRun(title, steps, describe_progress(run, config)))
    return remaining


def read_ended(configs: Mapping[str, ConfigDict], folder: str | os.PathLike) -> dict[str, Run]:
    """Returns the runs of `train_all` that have finished or diverged, by title.

    Nothing is written, so that another process may train the other runs meanwhile. Older versions
    of bn_keras may have trained them: only the settings that they knew are compared.

    Raises:
      UsageError: a workdir holds a run of another config.
    """
    runs = {}
    for title, config in configs.items():
        run = Workdir(workdir_of(folder, title))
        if run.exists() and not _is_due(run, _restricted(config, run.read_config())):
            runs[title] = Run.read(title, run.path)
    return runs


def _restricted(config: ConfigDict, saved: ConfigDict) -> ConfigDict:
    """Returns a config without the settings that a saved one lacks."""
    known = flatten(saved)
    return ConfigDict(
        {
            name: {key: v for key, v in value.items() if f"{name}.{key}" in known}
            if isinstance(value, ConfigDict)
            else value
            for name, value in config.items()
        }
    )


def workdir_of(folder: str | os.PathLike, title: str) -> epath.Path:
    """Returns the workdir of a title's run in the folder of all runs."""
    return Workdir(folder).path / folder_name(title)


def folder_name(title: str) -> str:
    """Returns the name of a title's workdir, such as "bn_x5_seed_0" for "BN-x5 seed 0"."""
    return re.sub(r"[^a-z0-9.]+", "_", title.lower())


def _is_due(run: Workdir, config: ConfigDict) -> bool:
    run.check(config)
    metrics = run.read_metrics()
    if metrics.has_diverged and metrics.num_retries >= config.train.retries:
        return False
    return not finish_reason(run, config)


class _DueRun(NamedTuple):
    """A run that is due."""

    title: str
    config: ConfigDict
    workdir: epath.Path


def _group(due_runs: Sequence[_DueRun], num_shares: int) -> list[list[_DueRun]]:
    """Divides runs into the tasks of processes, in their order.

    Consecutive runs that differ in the seed alone are one task, in which they share their
    graphs. Where that would leave a process without work in the last round, tasks are divided.
    """
    consecutive = itertools.groupby(due_runs, lambda t: replaced(t.config, _SEED))
    groups = [list(group) for _, group in consecutive]
    last = len(groups) % num_shares
    if not last:
        return groups
    parts = num_shares // last
    divided = [group[i::parts] for group in groups[-last:] for i in range(parts) if group[i:]]
    return groups[:-last] + divided


def _train(due_runs: Iterable[_DueRun]) -> None:
    graphs = Graphs()
    for title, config, workdir in due_runs:
        try:
            train_and_evaluate(config, workdir, label=title, graphs=graphs)
        except TrainingDivergedError as error:
            logging.warning("%s: %s", title, error)


def _train_in_process(
    due_runs: Iterable[_DueRun], setup_process: Callable[[], None] | None
) -> None:
    if setup_process:
        setup_process()
    _train(due_runs)
