"""Classes of unequal size: an order that draws them equally often, and weights for the loss."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from bn_keras.data.random_numbers import RandomNumbers, Stream

# With one draw of each class per block, the rows of a pair that is mixed would never have the same
# class, and every mini-batch the same composition.
DRAWS_PER_BLOCK = 8


class BalancedOrder:
    """An endless order of examples in which all classes are equally frequent.

    Each block of 8 K positions, where K is the number of classes with examples, has 8 draws of each
    class, in random order. The draws of a class go through one permutation of its examples after
    the other, so that no example is drawn again before all others of its class. The example at a
    position depends only on the seed, the position and the labels.

    Args:
      labels: integers [n], at least one of them not negative; examples with a negative label are
        never drawn.
    """

    def __init__(self, labels: tf.Tensor) -> None:
        [drawn] = tf.unstack(tf.where(labels >= 0), axis=1)
        labels = tf.gather(labels, drawn)
        by_class = tf.argsort(labels, stable=True)
        self._examples = tf.gather(drawn, by_class)
        _, _, self._sizes = tf.unique_with_counts(tf.gather(labels, by_class), tf.int64)
        self._begins = tf.cumsum(self._sizes, exclusive=True)

    def find_examples(self, positions: tf.Tensor, random: RandomNumbers) -> tf.Tensor:
        """Returns the examples at positions, both int64 [m]."""
        num_classes = tf.size(self._sizes, tf.int64)
        block_size = DRAWS_PER_BLOCK * num_classes
        block = positions // block_size
        place = random.permute(Stream.CLASSES, positions % block_size, block_size, block)
        number = place % num_classes
        draw = block * DRAWS_PER_BLOCK + place // num_classes
        size = tf.gather(self._sizes, number)
        # Each pass through a class has a counter of its own.
        counter = draw // size * num_classes + number
        member = random.permute(Stream.MEMBERS, draw % size, size, counter)
        return tf.gather(self._examples, tf.gather(self._begins, number) + member)


def class_weights(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns weights by which all classes contribute equally to the mean loss of an epoch.

    The weight of a class is n / (K * its number of examples), for n examples in K classes that have
    examples: the mean over the examples is 1. A class without examples has weight 0.

    Args:
      counts: number of training examples of each class.

    Returns:
      float64 [classes].
    """
    sizes = np.asarray(counts, np.float64)
    present = sizes > 0
    return np.where(present, sizes.sum() / (present.sum() * np.maximum(sizes, 1)), 0.0)
