"""Reports a loss or a variable that is no longer finite, and finds the cause."""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from bn_keras.data.pipeline import Data
from bn_keras.errors import TrainingDivergedError
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.training.diagnosis import first_non_finite
from bn_keras.training.step import Trainer


def make_error(
    what: str, step: int, rate: float, cause: str, checkpoints: Checkpoints
) -> TrainingDivergedError:
    """Returns an error with the step, the cause and the last good checkpoint.

    Args:
      what: what is not finite, "loss" or "network".
      step: step at which this was found.
      rate: learning rate of that step.
      cause: name of the first non-finite tensor.
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
    """Repeats a loop up to the step that failed and names the first non-finite tensor.

    The step before it is examined first: non-finite gradients only show in the next loss.

    Args:
      trainer: trainer of the network; its variables are changed.
      data: training input.
      before: snapshot of the trainer before the loop.
      step: last step before the loop.
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
                trainer.model, trainer.compute_gradients, images, labels, trainer.strategy
            )
            if cause:
                return cause
    # Each tensor is finite; their sum over replicas or micro-batches, or the update, is not.
    return "an update of the weights"


def non_finite_variable(variables: Sequence[keras.Variable]) -> str:
    """Returns the name of the first variable that is not finite; "" if all are."""
    return next((f"variable {v.path}" for v in variables if not np.isfinite(v.numpy()).all()), "")
