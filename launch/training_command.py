"""The arguments of `bn-keras train` for a job that runs elsewhere, checked before it is queued."""

import math
from collections.abc import Mapping

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


def check_batch_size(key: str, size: int, micro_batches: int, replicas: int, of: str) -> None:
    """Raises CommandError if the replicas of a job do not divide a batch.

    Args:
      key: config key of the batch size.
      size: global batch size.
      micro_batches: micro-batches per global batch.
      replicas: number of replicas of the job.
      of: what has the replicas, for messages, such as "a v6e-8".
    """
    unit = replicas * micro_batches
    if size % unit:
        times = f" times {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise CommandError(
            f"{key}={size} is invalid: expected a multiple of the {replicas} replicas of {of}"
            f"{times}, such as --config.{key}={math.ceil(size / unit) * unit}"
        )
