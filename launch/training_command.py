"""The arguments of `bn-keras train` for a job that runs elsewhere, checked before it is queued."""

import math
import os
from collections.abc import Mapping
from typing import Any

from .command_error import CommandError


def training_arguments(
    config: str,
    overrides: Mapping[str, object],
    workdir: str,
    required: Mapping[str, object],
    where: str,
) -> tuple[str, ...]:
    """Returns the arguments of `bn-keras train`.

    Args:
      config: argument of --config.
      overrides: settings that differ from the config, by key.
      workdir: folder of the run.
      required: settings that the job needs, by key.
      where: the place of the job, for messages, such as "on a TPU".

    Raises:
      CommandError: an override contradicts a required setting.
    """
    settings = dict(required) | dict(overrides)
    for key, value in required.items():
        if settings[key] != value:
            raise CommandError(
                f"{key}={settings[key]!r} is invalid {where}: expected {value!r}, which is set for"
                " you"
            )
    values = (f"--config.{key}={value}" for key, value in settings.items())
    return (f"--config={config}", *values, f"--workdir={workdir}")


def locate_config(source: str) -> str:
    """Returns the argument of --config with an absolute path if it is a file or a run, not a name.

    Args:
      source: an argument that `load_config` accepts.
    """
    from bn_keras.training.config_files import find_run

    file, colon, argument = source.partition(":")
    if file.endswith(".py") and os.path.isfile(file):
        return os.path.abspath(file) + colon + argument
    is_local_run = find_run(source) is not None and os.path.exists(source)
    return os.path.abspath(source) if is_local_run else source


def check_batch_sizes(config: Any, replicas: int, owner: str) -> None:
    """Raises CommandError if the replicas of a job do not divide a batch.

    Args:
      config: config of the training, a ConfigDict.
      replicas: number of replicas of the job.
      owner: what has the replicas, for messages, such as "a v6e-8".
    """
    for section, micro_batches in (("train", config.train.micro_batches), ("evaluation", 1)):
        size, unit = config[section].global_batch_size, replicas * micro_batches
        if size % unit:
            times = f" times {micro_batches} micro-batches" if micro_batches > 1 else ""
            key = f"{section}.global_batch_size"
            raise CommandError(
                f"{key}={size} is invalid: expected a multiple of the {replicas} replicas of"
                f" {owner}{times}, such as --config.{key}={math.ceil(size / unit) * unit}"
            )
