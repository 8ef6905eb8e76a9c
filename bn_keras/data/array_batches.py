"""Batches of a split in memory."""

import math

import tensorflow as tf

from bn_keras.data.balance import BalancedOrder
from bn_keras.data.batching import PREFETCH, Rows, without_autotuning
from bn_keras.data.multi_crop import CropPreprocessing
from bn_keras.data.random_numbers import RandomNumbers, Stream
from bn_keras.data.splits import Arrays
from bn_keras.data.transforms import Preprocessing

# Batches of small images are computed in chunks of several steps: tf.data takes about 100
# microseconds per element, a large part of a small network's step.
CHUNK_BYTES = 2**22
MAX_CHUNK_STEPS = 16


class ArrayBatches:
    """Batches of a split in memory; preprocesses several batches at once.

    The split counts as one shard. In training, order "examples" permutes the examples anew in each
    epoch; "shards" keeps the stored order in every epoch; "balanced" is `BalancedOrder`.

    Args:
      arrays: the split.
      preprocessing: preprocessing of its images.
      random: random numbers for training; None for evaluation, in stored order.
      order: "examples", "shards" or "balanced"; ignored in evaluation.
    """

    def __init__(
        self,
        arrays: Arrays,
        preprocessing: Preprocessing | CropPreprocessing,
        random: RandomNumbers | None,
        order: str,
    ) -> None:
        with tf.device("CPU:0"):
            self._images = tf.constant(arrays.images)
            self._labels = tf.constant(arrays.labels)
        self._white = arrays.white
        self._num_examples = arrays.num_examples
        self._preprocessing = preprocessing
        self._random = random
        self._is_permuted = order == "examples"
        self._balanced: BalancedOrder | None = None
        if random is not None and order == "balanced":
            with tf.device("CPU:0"):
                self._balanced = BalancedOrder(self._labels)

    # AutoGraph would take a second at every start, and has nothing to convert here.
    @tf.autograph.experimental.do_not_convert
    def dataset(self, rows: Rows, start_step: int) -> tf.data.Dataset:
        """Returns endless batches, one per replica and step, ordered by step, then by replica."""
        image_bytes = 4 * self._preprocessing.num_pixels * self._images.shape[-1]
        step_bytes = rows.global_batch_size * image_bytes
        # Must not depend on the number of replicas: random numbers are drawn per chunk.
        steps = max(1, min(MAX_CHUNK_STEPS, CHUNK_BYTES // step_bytes))
        chunks = tf.data.Dataset.counter(start_step // steps).map(
            lambda chunk: self._make_chunk(chunk, steps, rows)
        )
        batches = chunks.prefetch(PREFETCH).unbatch()
        skipped = start_step % steps * rows.num_replicas
        # One thread keeps up with steps of 100 microseconds and leaves the cores to the network.
        return without_autotuning(batches.skip(skipped) if skipped else batches, threads=1)

    def _make_chunk(self, chunk: tf.Tensor, steps: int, rows: Rows) -> tuple[tf.Tensor, ...]:
        """Returns the batches of several steps: tensors [steps * replicas, batch, ...]."""
        step = chunk * steps + tf.range(steps, dtype=tf.int64)[:, None]
        row = rows.first + tf.range(rows.count, dtype=tf.int64)
        if self._random is None:
            num_steps = math.ceil(self._num_examples / rows.global_batch_size)
            examples = tf.reshape(step % num_steps * rows.global_batch_size + row, [-1])
            weights = [tf.cast(examples < self._num_examples, tf.float32)]
            uniforms = None
        else:
            positions = tf.reshape(step * rows.global_batch_size + row, [-1])
            epochs, examples = positions // self._num_examples, positions % self._num_examples
            if self._balanced:
                examples = self._balanced.find_examples(positions, self._random)
            elif self._is_permuted:
                examples = self._random.permute(
                    Stream.EXAMPLES, examples, self._num_examples, epochs
                )
            weights = []
            # Drawn for the global batch, whatever rows this pipeline keeps.
            drawn = self._random.draw_for_images(chunk, [steps, rows.global_batch_size])
            own = drawn[:, rows.first : rows.first + rows.count]
            uniforms = tf.reshape(own, [-1, drawn.shape[-1]])
        indices = tf.cast(examples % self._images.shape[0], tf.int32)
        images = self._preprocessing.process_batch(self._images, indices, uniforms, self._white)
        shape = [steps * rows.num_replicas, rows.per_replica_batch_size]
        return tf.nest.map_structure(
            lambda batch: tf.reshape(batch, [*shape, *batch.shape[1:]]),
            (images, tf.gather(self._labels, indices), *weights),
        )
