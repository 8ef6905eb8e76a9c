"""Checks that runs with a config resume bit-exactly on these devices."""

import tempfile

import tensorflow as tf
from etils import epath
from ml_collections import ConfigDict

from bn_keras.distribute import make_strategy
from bn_keras.errors import ResumeError
from bn_keras.merge import merge_moving_statistics
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.training.build import build_data, build_trainer_for
from bn_keras.training.config import check_config
from bn_keras.training.restoring import initialize_trainer
from bn_keras.training.step import Trainer

_STEPS = 4


def verify_resume(config: ConfigDict) -> str:
    """Trains a few steps twice, uninterrupted and resumed half-way, and compares all variables.

    The resumed network starts from a checkpoint that the uninterrupted one saves half-way. Nothing
    else is written, and the checkpoint is temporary.

    Args:
      config: see `default_config`.

    Returns:
      SHA-256 over all variables, the same for both networks.

    Raises:
      UsageError: an invalid value in the config, or data that is not available.
      StorageError: the temporary checkpoint cannot be written.
      ResumeError: the variables of the two networks differ.
    """
    check_config(config)
    strategy = make_strategy(**config.distribution)
    data = build_data(config)

    def build() -> Trainer:
        return build_trainer_for(config, strategy, data)

    def train(trainer: Trainer, batches: tf.distribute.DistributedIterator, steps: int) -> None:
        trainer.train(batches, steps)
        merge_moving_statistics(trainer.model, strategy)

    half = _STEPS // 2
    with tempfile.TemporaryDirectory() as folder, data.reporting_errors():
        uninterrupted = build()
        initialize_trainer(config, uninterrupted, data.class_names)
        batches = uninterrupted.open_batches(data, 0)
        train(uninterrupted, batches, half)
        Checkpoints(epath.Path(folder), uninterrupted.parts).save(half)
        train(uninterrupted, batches, _STEPS - half)
        resumed = build()
        step = Checkpoints(epath.Path(folder), resumed.parts).restore()
        train(resumed, resumed.open_batches(data, step), _STEPS - step)
    differing = [
        one.path
        for one, other in zip(uninterrupted.variables, resumed.variables, strict=True)
        if one.numpy().tobytes() != other.numpy().tobytes()
    ]
    if differing:
        raise ResumeError(
            f"stopped at step {half} and resumed, {len(differing)} of {len(resumed.variables)}"
            f" variables differ at step {_STEPS}, the first of them {differing[0]}: a run with this"
            " config does not resume bit-exactly on these devices"
        )
    return resumed.hash()
