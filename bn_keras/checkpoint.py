"""What of a run is saved: every variable of the model and the optimizer, in their order."""

import keras
import tensorflow as tf
from etils import epath

from bn_keras.batch_norm import merge_moving_statistics
from bn_keras.errors import UsageError


class Checkpoints:
    """The checkpoints of one run, named by step.

    Model and optimizer are saved as flat dictionaries of variables, since an object-based
    checkpoint of a Keras model leaves out the state of its random generators (dropout's).

    Args:
      folder: where they lie.
      model: built.
      optimizer: built on the model's trainable variables; None reads the model alone.
      strategy: in whose scope both were made.
      keep: how many of the latest stay.
      training_model: what is trained, where it has more variables than `model`, those of an
        auxiliary classifier: they are saved as well, and reading the model alone leaves them out.
    """

    def __init__(
        self,
        folder: epath.Path,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer | None,
        strategy: tf.distribute.Strategy,
        keep: int = 1,
        training_model: keras.Model | None = None,
    ) -> None:
        self._model = training_model or model
        self._strategy = strategy
        shared = {id(v) for v in model.variables}
        parts = {
            "model": _named(model.variables),
            "auxiliary": _named([v for v in self._model.variables if id(v) not in shared]),
        }
        if optimizer is not None:
            parts["optimizer"] = _named(optimizer.variables)
        self._manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(**parts), str(folder), max_to_keep=keep, checkpoint_name="step"
        )

    @property
    def latest(self) -> str | None:
        """Path of the latest one, without its endings; None where there is none."""
        return self._manager.latest_checkpoint

    @property
    def latest_step(self) -> int:
        """Step of the latest one; 0 where there is none."""
        return int(self.latest.rsplit("-", 1)[1]) if self.latest else 0

    def save(self, step: int) -> None:
        """Saves a step, after the replicas have agreed on their moving statistics.

        Saving one step twice does nothing, so that a resumed run may come by its own start.
        """
        if self.latest_step == step and self.latest:
            return
        merge_moving_statistics(self._model, self._strategy)
        self._manager.save(checkpoint_number=step)

    def restore(self) -> int:
        """Reads the latest one, if there is one, and gives its step, else 0.

        Raises:
          UsageError: it is damaged, or of another network.
        """
        if self.latest:
            try:
                status = self._manager.checkpoint.restore(self.latest)
                status.assert_existing_objects_matched()
            except (AssertionError, ValueError, IndexError, tf.errors.OpError):
                # Their messages list every variable with its values, or nothing of use.
                raise UsageError(
                    f"checkpoint {self.latest} does not fit this network: it is damaged, or was"
                    " written by another network or another version of bn_keras"
                ) from None
            status.expect_partial()
        return self.latest_step


def _named(variables: list[keras.Variable]) -> dict[str, tf.Variable]:
    # Not by path: Keras counts its names up over all models of one process.
    return {f"{i:04}.{v.name}": v.value for i, v in enumerate(variables)}
