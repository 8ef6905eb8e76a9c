"""Random numbers and permutations as pure functions of a seed and a counter; no state."""

import dataclasses
import enum
from collections.abc import Sequence

import tensorflow as tf

from bn_keras.data.augment import MIXING_UNIFORMS, RANDOM_AUGMENT_UNIFORMS
from bn_keras.data.transforms import NUM_UNIFORMS


class Stream(enum.IntEnum):
    """The kinds of items that are permuted, each independently of the others.

    The permutations of examples and shards have the keys 2 * seed and 2 * seed + 1. The other
    streams are larger than these keys, since a seed has 32 bits.
    """

    EXAMPLES = 0
    SHARDS = 1
    CLASSES = 2**33
    MEMBERS = 2**33 + 1


# Streams of uniform numbers.
_DISTORTIONS, _RANDOM_AUGMENT, _MIXING = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class RandomNumbers:
    """Everything random in the training input.

    Attributes:
      seed: integer of 32 bits.
      draws_random_augment: whether images get numbers for RandAugment as well.
    """

    seed: int
    draws_random_augment: bool = False

    def permute(
        self, stream: Stream, indices: tf.Tensor, count: int | tf.Tensor, counter: tf.Tensor
    ) -> tf.Tensor:
        """Maps indices through a random permutation of `count` items.

        Args:
          stream: kind of the items.
          indices: int64 [n] in [0, count).
          count: number of items: a scalar or int64 [n], one for each index.
          counter: determines the permutation, with seed and stream. It is int64, such as the epoch:
            a scalar or [n], one for each index.

        Returns:
          int64 [n].
        """
        # TensorFlow's index_shuffle kernel, with scrambled seeds and twice its rounds. By itself,
        # it uses only the lowest byte of each seed and permutes 60,000 items almost identically for
        # neighbouring seeds (correlation 0.9). It also pads a matrix of seeds wrongly.
        key = _scramble(tf.constant(2 * self.seed + stream, tf.int64))
        seeds = _scramble(key + tf.cast(counter, tf.uint64))
        words = tf.broadcast_to(seeds, tf.shape(indices))[:, None] + tf.constant(
            [1, 2, 3], tf.uint64
        )
        # A scalar would be an error for no indices: a pipeline may have no row in a small group.
        last = tf.broadcast_to(tf.cast(count, tf.int64) - 1, tf.shape(indices))
        return tf.raw_ops.RandomIndexShuffle(
            index=indices, seed=_scramble(words), max_index=last, rounds=8
        )

    def draw_for_images(self, counter: tf.Tensor, shape: Sequence[int | tf.Tensor]) -> tf.Tensor:
        """Draws uniform numbers in [0, 1) for preprocessing, a row for each image.

        Args:
          counter: int64, such as the number of a chunk or a group; each has its own numbers.
          shape: shape of the array of images.

        Returns:
          float32 [*shape, columns], the columns as in `Preprocessing.process_batch`.
        """
        drawn = _draw(self.seed, _DISTORTIONS, counter, [*shape, NUM_UNIFORMS])
        if not self.draws_random_augment:
            return drawn
        others = _draw(self.seed, _RANDOM_AUGMENT, counter, [*shape, RANDOM_AUGMENT_UNIFORMS])
        return tf.concat([drawn, others], axis=-1)

    def draw_for_mixing(self, step: tf.Tensor, global_batch_size: int) -> tf.Tensor:
        """Draws uniform numbers for `Mixing`, float32 [global_batch_size, MIXING_UNIFORMS]."""
        return _draw(self.seed, _MIXING, step, [global_batch_size, MIXING_UNIFORMS])


def _draw(
    seed: int, stream: int, counter: tf.Tensor, shape: Sequence[int | tf.Tensor]
) -> tf.Tensor:
    """Draws numbers in [0, 1), determined by a 32-bit seed, a stream and an int64 counter."""
    words = tf.stack([tf.constant(seed + stream * 2**32, tf.int64), counter])
    return tf.random.stateless_uniform(tf.stack(shape), seed=words)


def _scramble(numbers: tf.Tensor) -> tf.Tensor:
    """Maps integers one-to-one to uint64 that look random: SplitMix64's finalizer.

    Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators.
    """
    bits = tf.cast(numbers, tf.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        shifted = tf.bitwise.right_shift(bits, tf.constant(shift, tf.uint64))
        bits = tf.bitwise.bitwise_xor(bits, shifted) * tf.constant(factor, tf.uint64)
    return bits
