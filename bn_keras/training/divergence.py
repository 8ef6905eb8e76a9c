"""What a run does when its loss or a variable is no longer finite."""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from bn_keras.data.pipeline import Data
from bn_keras.errors import TrainingDivergedError
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.training.diagnosis import first_non_finite
from bn_keras.training.step import Trainer


def diverged(
    what: str, step: int, rate: float, cause: str, checkpoints: Checkpoints
) -> TrainingDivergedError:
    """Returns the error that names a divergence and the last good checkpoint.

    Args:
      what: "loss" or "network".
      step: step at which it is not finite.
      rate: learning rate of that step.
      cause: the first non-finite tensor.
      checkpoints: checkpoints of the run.
    """
    return TrainingDivergedError(
        f"the {what} is not finite at step {step} (learning rate {rate:.6g}); first non-finite"
        f" tensor: {cause}; the last good checkpoint is {checkpoints.latest}",
        step,
    )


def find_cause(
    trainer: Trainer,
    data: Data,
    before: Sequence[tf.Tensor],
    step: int,
    finite_steps: int,
) -> str:
    """Repeats the steps of a loop up to the one that failed and names the first non-finite tensor.

    The step before it is examined first: non-finite gradients show in the next loss only.

    Args:
      trainer: trainer of the network; its variables are changed.
      data: training input.
      before: snapshot of the trainer before the loop.
      step: step before the loop.
      finite_steps: steps of the loop whose loss was finite.
    """
    for steps in range(max(0, finite_steps - 1), finite_steps + 1):
        trainer.restore(before)
        batches = trainer.open_batches(data, step)
        if steps:
            trainer.train(batches, steps)
        for _ in range(trainer.micro_batches):
            images, labels = next(batches)
            cause = first_non_finite(
                trainer.model, trainer.gradients, images, labels, strategy=trainer.strategy
            )
            if cause:
                return cause
    # Every tensor of a step is finite, but not the sum over replicas or micro-batches.
    return "an update of the weights"


def non_finite_variable(variables: Sequence[keras.Variable]) -> str:
    """Returns the name of the first variable that is not finite; "" if all are."""
    return next((f"variable {v.path}" for v in variables if not np.isfinite(v.numpy()).all()), "")
