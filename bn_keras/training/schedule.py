"""The learning rate as a function of the number of examples seen."""

import math

import keras
import numpy as np
import tensorflow as tf

from bn_keras.errors import UsageError
from bn_keras.text import counted

# Examples per step in the paper, the unit of "paper steps".
PAPER_BATCH_SIZE = 32

# A rate below this fraction of the highest one has vanished.
_VANISHING_RATE = 0.01

_DECAYS = ("steps", "cosine")


@keras.saving.register_keras_serializable("bn_keras")
class ExamplesSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then step or cosine decay, all counted in examples.

    Counting in examples makes one schedule serve every batch size: the rate scales linearly with
    the batch, and changes at the same points of the data.

    Args:
      base_rate: learning rate at reference_batch_size.
      global_batch_size: examples per step, over all replicas.
      reference_batch_size: batch size that base_rate was tuned at; the paper's is 32.
      decay: "steps": multiply the rate by decay_factor after each decay_examples. "cosine": half a
        cosine from the full rate at the end of the warm-up to 0 at cosine_examples, and 0 after
        that; decay_factor and decay_examples then have no effect.
      decay_factor: factor on the rate after each decay_examples; 1 keeps it constant.
      decay_examples: examples between two decays; required unless decay_factor is 1.
      warmup_examples: examples over which the rate rises linearly to its full value.
      cosine_examples: examples until the cosine ends; required by "cosine".

    Raises:
      UsageError: an unknown decay, a decay without its examples, or a warm-up that leaves no
        examples for a cosine.

    Source: Ioffe & Szegedy 2015, section 4.2.1; GoogLeNet (arXiv 1409.4842, section 6) for the
    decay of 4% every 8 epochs; Goyal et al. 2017 (arXiv 1706.02677) for scaling and warm-up;
    Loshchilov & Hutter 2017 (arXiv 1608.03983) for the cosine, here without restarts.
    """

    def __init__(
        self,
        base_rate: float,
        global_batch_size: int,
        *,
        reference_batch_size: int = PAPER_BATCH_SIZE,
        decay: str = "steps",
        decay_factor: float = 1.0,
        decay_examples: int = 0,
        warmup_examples: int = 0,
        cosine_examples: int = 0,
    ) -> None:
        if decay not in _DECAYS:
            raise UsageError(f"unknown schedule.decay {decay!r}: expected {' or '.join(_DECAYS)}")
        if decay == "steps" and decay_factor != 1 and not decay_examples:
            raise UsageError(f"decay_factor={decay_factor} requires decay_examples")
        if decay == "cosine" and not cosine_examples:
            raise UsageError("decay='cosine' requires cosine_examples")
        if decay == "cosine" and warmup_examples >= cosine_examples:
            raise UsageError(
                f"the warm-up of {warmup_examples:,} examples leaves none of the"
                f" {cosine_examples:,} of schedule.decay 'cosine': lower schedule.warmup_epochs,"
                " raise schedule.cosine_steps if it is set, or train longer (train.epochs or"
                " train.steps)"
            )
        self.base_rate = base_rate
        self.global_batch_size = global_batch_size
        self.reference_batch_size = reference_batch_size
        self.decay = decay
        self.decay_factor = decay_factor
        self.decay_examples = decay_examples
        self.warmup_examples = warmup_examples
        self.cosine_examples = cosine_examples

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the float32 learning rate of a step, counted from 0."""
        rate = tf.constant(self._full_rate, tf.float32)
        # int64: float32 cannot count examples beyond 1.6e7.
        examples = tf.cast(step, tf.int64) * self.global_batch_size
        if self.decay == "cosine":
            rate *= self._cosine(examples)
        elif self.decay_factor != 1:
            decays = tf.cast(examples // self.decay_examples, tf.float32)
            rate *= tf.pow(tf.constant(self.decay_factor, tf.float32), decays)
        if self.warmup_examples:
            seen = tf.cast(examples + self.global_batch_size, tf.float32)
            rate *= tf.minimum(1.0, seen / self.warmup_examples)
        return rate

    def _cosine(self, examples: tf.Tensor) -> tf.Tensor:
        span = self.cosine_examples - self.warmup_examples
        left = tf.clip_by_value(self.cosine_examples - examples, 0, span)
        # Equals (1 + cos(pi * done)) / 2, without cancellation near the end.
        return tf.square(tf.sin(math.pi / 2 * tf.cast(left, tf.float32) / span))

    def vanishes_at(self, steps: int) -> int | None:
        """Returns the step from which on the rate stays below 1% of its highest value.

        The rate is examined at a thousand steps at most.

        Args:
          steps: steps of the training.

        Returns:
          The step, counted from 0; None if the rate of the last step is not that low.
        """
        examined = np.unique(np.linspace(0, steps - 1, 1000).astype(np.int64))
        rates = self(tf.constant(examined)).numpy() * np.ones(len(examined))
        last = np.flatnonzero(rates >= _VANISHING_RATE * rates.max())[-1]
        return int(examined[last + 1]) if last + 1 < len(examined) else None

    @property
    def _full_rate(self) -> float:
        return self.base_rate * self.global_batch_size / self.reference_batch_size

    def describe(self, steps: int, num_train_examples: int) -> str:
        """Returns two lines of text: the learning rate over time, and the length of the training.

        Args:
          steps: steps of the training.
          num_train_examples: examples per epoch.
        """
        examples = steps * self.global_batch_size
        warmup = math.ceil(self.warmup_examples / self.global_batch_size)
        rate = f"learning rate {self._full_rate:.4g}"
        if warmup:
            rate = (
                f"learning rate from {float(self(0)):.2g} up to {self._full_rate:.4g} over"
                f" {warmup:,} steps"
            )
        if self.decay == "cosine":
            rate += ", cosine decay"
        elif self.decay_factor != 1:
            every = self.decay_examples / self.global_batch_size
            period = f"{every:,.0f}" if every >= 10 else f"{every:.2g}"
            rate += f", multiplied by {self.decay_factor:g} every {period} steps"
        length = (
            f"{counted(steps, 'step')} of {counted(self.global_batch_size, 'image')} ="
            f" {examples / num_train_examples:,.1f} epochs of"
            f" {counted(num_train_examples, 'training image')}"
        )
        if self.global_batch_size != PAPER_BATCH_SIZE:
            length += f", as many images as {examples / PAPER_BATCH_SIZE:,.0f} of the paper's steps"
        return f"{rate}, {float(self(steps - 1)):.2g} at the end\n{length}"

    def get_config(self) -> dict:
        """Returns the constructor's arguments."""
        return dict(vars(self))
