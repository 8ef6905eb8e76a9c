"""What a training is going to do, told before it does it."""

import os
import pathlib

import tensorflow as tf
from etils import epath
from ml_collections import ConfigDict

from bn_keras.data import sources
from bn_keras.errors import UsageError
from bn_keras.runs.atomic_files import is_local
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.workdir import Workdir


def plan(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, str]:
    """Tells what `train_and_evaluate` would do with the same arguments; changes nothing.

    Args:
      config: as bn_keras/training/config.py.
      workdir: of the run.

    Returns:
      A line each on "data", "devices" and "workdir".

    Raises:
      UsageError: the workdir is of another run, or can't be written; there is no such data set.
    """
    run = Workdir(workdir)
    run.check(config)
    _check_writable(run.path)
    return describe(config) | {"workdir": f"{run.path}: {state(run, config.train.steps)}"}


def describe(config: ConfigDict) -> dict[str, str]:
    """Gives a line each on the "data" and the "devices" of a config.

    Raises:
      UsageError: there is no such data set.
    """
    name, data_dir = config.data.name, config.data.data_dir
    return {
        "data": f"{name}: {sources.locate(name, data_dir)}",
        "devices": f"{config.distribution.strategy}: {_devices(**config.distribution)}",
    }


def state(run: Workdir, steps: int) -> str:
    """Says where a run stands, and what becomes of it when it is trained to so many steps."""
    if run.is_finished():
        return f"finished at step {run.last_step():,}, nothing is left to do"
    step = Checkpoints(run.checkpoints, {}).latest_step
    return f"goes on from step {step:,} to {steps:,}" if step else f"new, to step {steps:,}"


def _devices(strategy: str, replicas: int) -> str:
    if strategy == "multi_worker":
        return "those of each process in TF_CONFIG"
    if strategy == "tpu":
        return "all cores of this machine's TPU"
    accelerators = tf.config.list_physical_devices("GPU")
    count = 1 if strategy == "one_device" else replicas or len(accelerators) or 1
    return f"{count} {'GPU' if accelerators else 'CPU replica'}(s)"


def _check_writable(path: epath.Path) -> None:
    if not is_local(path):
        return
    folder = pathlib.Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"workdir {path} can't be written: {folder} is not yours to write to")
