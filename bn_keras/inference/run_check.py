"""The check-up of the network of a run."""

import dataclasses
import os

import tensorflow as tf

from bn_keras.data import pipeline
from bn_keras.errors import UsageError
from bn_keras.health import HealthReport, check
from bn_keras.inference.evaluation import open_mini_batches
from bn_keras.inference.loading import load_trained


def check_workdir(workdir: str | os.PathLike, num_batches: int) -> HealthReport:
    """Examines the network of a run on the first batches of its training, on one device.

    Args:
      workdir: of the run.
      num_batches: as `check`; 0 looks at the weights alone, as is done where the run's data set
        is not at hand.

    Raises:
      UsageError: no run or no checkpoint in the folder.
    """
    if num_batches < 0:
        raise UsageError(f"num_batches is {num_batches}: it has to be 0 or more")
    network = load_trained(workdir)
    if num_batches == 0:
        return check(network.model)
    config = network.config
    try:
        data = pipeline.open_data(config.data, seed=config.seed)
    except UsageError as error:
        report = check(network.model)
        return dataclasses.replace(report, skipped=(f"what takes data: {error}",))
    batches = open_mini_batches(config, data, tf.distribute.get_strategy())
    return check(network.model, batches, num_batches)
