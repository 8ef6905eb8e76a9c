"""Agreement between the workers of a run: on the config, the data, the state, on a signal."""

import json
import zlib
from typing import Any

import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras.data.pipeline import Data
from bn_keras.data.splits import FINGERPRINTS
from bn_keras.distribute import gather_from_workers
from bn_keras.errors import UsageError
from bn_keras.runs.workdir import Workdir
from bn_keras.training.stop_signals import StopRequest


def check_same_command(
    strategy: tf.distribute.Strategy, config: ConfigDict, profile_steps: int
) -> None:
    """Raises UsageError if the workers have different configs or steps to profile."""
    settings = config.to_dict() | {"profile_steps": profile_steps}
    # The location of the data may differ between machines.
    del settings["data"]["data_dir"]
    if len(set(gather_from_workers(strategy, _digest(settings)))) > 1:
        raise UsageError(
            "the workers have different configs or --profile_steps: start all of them with the same"
            " command"
        )


def check_same_data(strategy: tf.distribute.Strategy, data: Data) -> None:
    """Raises UsageError if the workers read different classes or examples.

    Hashes that a worker does not know, such as the sizes of files in a bucket, are not compared.
    """
    values = {
        "input shapes": data.input_shape,
        "classes": data.class_names,
        "numbers of training images": data.num_train_examples,
        "numbers of validation images": data.num_validation_examples,
        **{what: data.fingerprint.get(key) for key, what in FINGERPRINTS.items()},
    }
    for what, value in values.items():
        found = gather_from_workers(strategy, _digest(value) if value else 0)
        if len(set(found) - {0}) > 1:
            raise UsageError(
                f"the workers read different {what}: copy the same data to each machine, or set"
                " data.data_dir to storage that all of them share"
            )


def check_same_state(
    strategy: tf.distribute.Strategy,
    run: Workdir,
    step: int,
    retries: int,
    best_accuracy: float,
) -> None:
    """Waits until every worker has read the workdir, before the chief writes into it.

    Raises:
      UsageError: the workers have not read the same values.
    """
    state = {
        "checkpoints of steps": step,
        "numbers of retries": retries,
        "best accuracies": best_accuracy,
    }
    for what, number in state.items():
        found = gather_from_workers(strategy, number)
        if len(set(found)) > 1:
            raise UsageError(
                f"the workers read the {what} {', '.join(f'{n:.10g}' for n in found)} in workdir"
                f" {run.path}: use a workdir on storage that all of them share"
            )


def signal_of_any_worker(strategy: tf.distribute.Strategy, stop_request: StopRequest) -> int:
    """Returns the number of the signal that a worker has received; 0 if none has."""
    return int(max(gather_from_workers(strategy, stop_request.signum or 0)))


def _digest(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
