"""The learning rate as a function of the number of examples seen."""

import keras
import tensorflow as tf

from bn_keras.errors import UsageError


@keras.saving.register_keras_serializable("bn_keras")
class ExamplesSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then a decay in steps, both counted in examples.

    Counting in examples makes one schedule serve every batch size: the rate scales linearly
    with the batch, and the moments at which it changes stay where they were in the data.

    Args:
      base_rate: learning rate at reference_batch_size.
      global_batch_size: examples per step, over all replicas.
      reference_batch_size: the paper's 32, unless the rate was found at another one.
      decay_factor: what the rate is multiplied by after each decay_examples; 1 holds it.
      decay_examples: examples between two decays; needed unless decay_factor is 1.
      warmup_examples: examples over which the rate rises linearly to its full value.

    Raises:
      UsageError: a decay without its examples.

    Source: Ioffe & Szegedy 2015, section 4.2.1; GoogLeNet (arXiv 1409.4842, section 6) for the
    decay of 4% every 8 epochs; Goyal et al. 2017 (arXiv 1706.02677) for scaling and warm-up.
    """

    def __init__(
        self,
        base_rate: float,
        global_batch_size: int,
        *,
        reference_batch_size: int = 32,
        decay_factor: float = 1.0,
        decay_examples: int | None = None,
        warmup_examples: int = 0,
    ) -> None:
        if decay_factor != 1 and not decay_examples:
            raise UsageError(f"decay_factor is {decay_factor}: decay_examples has to be given too")
        self.base_rate = base_rate
        self.global_batch_size = global_batch_size
        self.reference_batch_size = reference_batch_size
        self.decay_factor = decay_factor
        self.decay_examples = decay_examples
        self.warmup_examples = warmup_examples

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Gives the float32 learning rate of a step, counted from 0."""
        rate = tf.constant(
            self.base_rate * self.global_batch_size / self.reference_batch_size, tf.float32
        )
        if self.decay_factor == 1 and not self.warmup_examples:
            return rate
        # In int64: float32 can't count examples beyond 1.6e7.
        examples = tf.cast(step, tf.int64) * self.global_batch_size
        if self.decay_factor != 1:
            decays = tf.cast(examples // self.decay_examples, tf.float32)
            rate *= tf.pow(tf.constant(self.decay_factor, tf.float32), decays)
        if self.warmup_examples:
            seen = tf.cast(examples + self.global_batch_size, tf.float32)
            rate *= tf.minimum(1.0, seen / self.warmup_examples)
        return rate

    def get_config(self) -> dict:
        """Gives the constructor's arguments."""
        return dict(vars(self))
