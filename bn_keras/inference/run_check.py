"""Checks the BatchNormalization layers of a run's network."""

import dataclasses
import os

import tensorflow as tf

from bn_keras.errors import StorageError, UsageError
from bn_keras.health import HealthReport, check_batch_norm
from bn_keras.inference.loading import load_trained
from bn_keras.training.build import build_data
from bn_keras.training.length import global_micro_batch_size


def check_workdir(workdir: str | os.PathLike, num_batches: int) -> HealthReport:
    """Checks the network of a run on its first training batches, on one device.

    Args:
      workdir: folder of the run.
      num_batches: number of training batches; see `check_batch_norm`. With 0, or if the run's data
        set is not available, only the weights are checked.

    Raises:
      UsageError: no run or no checkpoint in the folder.
      StorageError: a checkpoint cannot be read.
    """
    if num_batches < 0:
        raise UsageError(f"num_batches={num_batches} is invalid: expected a non-negative integer")
    network = load_trained(workdir)
    if num_batches == 0:
        return check_batch_norm(network.model)
    config = network.config
    try:
        data = build_data(config)
    except (UsageError, StorageError) as error:
        report = check_batch_norm(network.model)
        # Without a dataset, the first entry says that none was passed.
        return dataclasses.replace(
            report, skipped=(f"checks on data: {error}", *report.skipped[1:])
        )
    batches = data.train_batches(tf.distribute.get_strategy(), global_micro_batch_size(config))
    with data.reporting_errors():
        return check_batch_norm(network.model, batches, num_batches)
