"""Batches of a split in files, decoded example by example."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from bn_keras.data.balance import BalancedOrder
from bn_keras.data.batching import PREFETCH, Rows, without_autotuning
from bn_keras.data.decode_errors import READ_ERRORS, explain
from bn_keras.data.multi_crop import CropPreprocessing
from bn_keras.data.random_numbers import RandomNumbers, Stream
from bn_keras.data.splits import Files, Shards
from bn_keras.data.transforms import Preprocessing
from bn_keras.data.unreadable_examples import UnreadableExamples
from bn_keras.errors import UsageError

# Largest number of examples that one thread decodes in sequence.
MAX_PIECE = 32
# Size of the groups whose records are permuted; two to three times as much is held in memory.
GROUP_BYTES = 2**29


class ShardBatches:
    """Batches of a split that is read from its files.

    Order: in training the shards are permuted anew in each epoch and cut into groups. With order
    "examples" a whole group is read into memory and its records are permuted; with "balanced" they
    are drawn by `BalancedOrder`; with "shards" each shard is a group in stored order. The position
    of an example depends only on (seed, epoch), and starting anywhere reads only one group. Every
    input pipeline reads all records but decodes only its own rows.

    Unreadable examples: in training, each is replaced by the next readable example of the group,
    with the same random numbers; in evaluation, by a blank image of weight 0.

    Args:
      shards: the split.
      preprocessing: preprocessing of its images.
      random: random numbers for training; None for evaluation, in stored order.
      order: "examples", "balanced" or "shards"; ignored in evaluation.
      unreadable: where unreadable examples are recorded.

    Attributes:
      num_groups: number of groups per epoch.
    """

    def __init__(
        self,
        shards: Shards | Files,
        preprocessing: Preprocessing | CropPreprocessing,
        random: RandomNumbers | None,
        order: str,
        unreadable: UnreadableExamples,
    ) -> None:
        self._shards = shards
        self._preprocessing = preprocessing
        self._random = random
        self._unreadable = unreadable
        self._permutes_examples = random is not None and order == "examples"
        self._balances = random is not None and order == "balanced"
        num_shards = len(shards.lengths)
        fitting = GROUP_BYTES * num_shards // (shards.num_examples * shards.example_bytes)
        draws_from_groups = self._permutes_examples or self._balances
        self._shards_per_group = max(1, min(fitting, num_shards)) if draws_from_groups else 1
        self.num_groups = math.ceil(num_shards / self._shards_per_group)

    # AutoGraph would take a second at every start, and has nothing to convert here.
    @tf.autograph.experimental.do_not_convert
    def dataset(self, rows: Rows, start_step: int) -> tf.data.Dataset:
        """Returns endless batches, one per replica and step, ordered by step, then by replica."""
        num_examples = self._shards.num_examples
        num_steps = math.ceil(num_examples / rows.global_batch_size)
        # An evaluation pass ends with a padded batch; a training epoch may end within a batch.
        padding = num_steps * rows.global_batch_size - num_examples if self._random is None else 0
        start = start_step * rows.global_batch_size

        def read_group(group: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return self._read_group(group, rows, start, padding)

        def split_group(records: tf.Tensor, *each: tf.Tensor) -> tf.data.Dataset:
            # Each example carries a reference to all records of the group. gather, unbatch and
            # batch would copy its record, which takes up to 60 microseconds.
            return tf.data.Dataset.from_tensor_slices(each).map(lambda *one: (records, *one))

        epoch, position = divmod(start, num_examples + padding)
        first = epoch * self.num_groups + self._find_group(epoch, position)
        groups = tf.data.Dataset.counter(first).map(read_group).prefetch(1)
        examples = groups.flat_map(split_group)
        batch_size = rows.per_replica_batch_size
        piece_size = max(n for n in range(1, min(batch_size, MAX_PIECE) + 1) if batch_size % n == 0)
        batches = examples.window(piece_size, drop_remainder=True).map(
            lambda *parts: self._decode(tf.data.Dataset.zip(parts), piece_size),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        if piece_size < batch_size:
            batches = batches.batch(batch_size // piece_size, drop_remainder=True)
            batches = batches.map(_merge_pieces)
        endless = tf.data.experimental.assert_cardinality(tf.data.experimental.INFINITE_CARDINALITY)
        return without_autotuning(batches.prefetch(PREFETCH).apply(endless))

    def _read_group(
        self, group: tf.Tensor, rows: Rows, start: int, padding: int
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Reads one group of shards.

        Args:
          group: int64 number of the group, counted over all epochs.
          rows: rows of the global batches to keep.
          start: first position to keep, counted over all epochs.
          padding: number of copies of the last record, with weight 0, that follow each epoch.

        Returns:
          All records of the group, string [count]. Then for each example to keep, in order: the
          index of its record, int64 [n]; its group and its position in the group, int64 [n, 2]; and
          in training a row of random numbers, in evaluation its weight, float32 [n].
        """
        epoch, number = group // self.num_groups, group % self.num_groups
        shards, begin = self._shards_of(group)
        count = tf.reduce_sum(tf.gather(_int64(self._shards.lengths), shards))
        records = self._shards.read(shards)

        is_last = tf.cast(tf.equal(number, self.num_groups - 1), tf.int64)
        index = tf.range(count + is_last * padding)
        position = epoch * (self._shards.num_examples + padding) + begin + index
        row = position % rows.global_batch_size
        own = (position >= start) & (row >= rows.first) & (row < rows.first + rows.count)
        index = index[own]
        if self._random is None:
            extra = tf.cast(index < count, tf.float32)
            index = tf.minimum(index, count - 1)
        else:
            # Drawn for the whole group at once: one draw takes about 60 microseconds.
            drawn = self._random.draw_for_images(group, [count])
            extra = tf.gather(drawn, index)
        where = tf.stack([tf.broadcast_to(group, tf.shape(index)), index], axis=1)
        labels = self._shards.read_labels(records) if self._balances else None
        return records, self._record_indices(group, index, count, labels), where, extra

    def _record_indices(
        self, group: tf.Tensor, index: tf.Tensor, count: tf.Tensor, labels: tf.Tensor | None
    ) -> tf.Tensor:
        """Maps positions in a group to indices of its records, which have the given labels."""
        if self._random is not None and labels is not None:
            # With a single group, these are the positions counted over all epochs.
            return BalancedOrder(labels).find_examples(group * count + index, self._random)
        if self._random is not None and self._permutes_examples:
            return self._random.permute(Stream.EXAMPLES, index, count, group)
        return index

    def _shards_of(self, group: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the shards of a group and the group's first position in the epoch."""
        order, begins = self._shard_order(group // self.num_groups)
        first = group % self.num_groups * self._shards_per_group
        return order[first:][: self._shards_per_group], begins[first]

    def _shard_order(self, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the shards in the order of an epoch, and the first position of each."""
        num_shards = len(self._shards.lengths)
        order = tf.range(num_shards, dtype=tf.int64)
        # `BalancedOrder` continues its passes through a class from one epoch to the next.
        is_fixed = self._balances and self.num_groups == 1
        if self._random is not None and not is_fixed:
            order = self._random.permute(Stream.SHARDS, order, num_shards, epoch)
        return order, tf.cumsum(tf.gather(_int64(self._shards.lengths), order), exclusive=True)

    def _find_group(self, epoch: int, position: int) -> int:
        """Returns the number of the group that contains a position of an epoch."""
        with tf.device("CPU:0"):
            _, begins = self._shard_order(_int64(epoch))
        group_begins = begins.numpy()[:: self._shards_per_group]
        return int(np.searchsorted(group_begins, position, "right")) - 1

    def _decode(
        self, examples: tf.data.Dataset, size: int
    ) -> tuple[tf.Tensor | tuple[tf.Tensor, ...], ...]:
        """Decodes examples to one batch of images, labels and, in evaluation, weights.

        Args:
          examples: examples of `_read_group`.
          size: number of examples.
        """
        decoded = examples.enumerate().map(
            lambda i, example: (i, self._decode_example(example[0][example[1]], example[3]))
        )
        none = tf.nest.map_structure(
            lambda spec: tf.zeros([0, *spec.shape], spec.dtype), decoded.element_spec
        )
        # Unreadable examples are dropped here and replaced below, at no cost if there are none.
        read = decoded.ignore_errors().batch(size).concatenate(tf.data.Dataset.from_tensors(none))
        indices, batch = read.take(1).get_single_element()
        batch = tf.cond(
            tf.equal(tf.size(indices), size),
            lambda: batch,
            lambda: self._fill_in(tf.cast(indices, tf.int32), batch, examples, size),
        )
        return tf.nest.map_structure(lambda t: tf.ensure_shape(t, [size, *t.shape[1:]]), batch)

    def _decode_example(self, record: tf.Tensor, extra: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return self._process(*self._shards.parse(record), extra)

    def _process(
        self, encoded: tf.Tensor, label: tf.Tensor, extra: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        channels = self._shards.image_shape[-1]
        if self._random is None:
            return self._preprocessing.process_encoded(encoded, None, channels), label, extra
        return self._preprocessing.process_encoded(encoded, extra, channels), label

    def _fill_in(
        self,
        indices: tf.Tensor,
        batch: tuple[tf.Tensor, ...],
        examples: tf.data.Dataset,
        size: int,
    ) -> tuple[tf.Tensor, ...]:
        """Completes a batch that has only the readable examples, those at `indices`."""
        missing = tf.sets.difference([tf.range(size)], [indices]).values
        origins = examples.map(lambda records, index, where, extra: (where, extra)).batch(size)
        where, extras = origins.take(1).get_single_element()
        flat = tf.nest.flatten(batch)

        def find_substitutes(where: tf.Tensor, extras: tf.Tensor) -> list[tf.Tensor]:
            with tf.device("CPU:0"):
                found = [
                    self._find_substitute(*pair, blank) for pair in zip(where, extras, strict=True)
                ]
            return [tf.stack(values) for values in zip(*found, strict=True)]

        blank = [np.zeros(t.shape[1:], t.dtype.as_numpy_dtype) for t in flat]
        others = tf.py_function(
            find_substitutes,
            [tf.gather(where, missing), tf.gather(extras, missing)],
            [t.dtype for t in flat],
        )
        order = tf.argsort(tf.concat([indices, missing], axis=0))
        full = [
            tf.ensure_shape(tf.gather(tf.concat(parts, axis=0), order), parts[0].shape)
            for parts in zip(flat, others, strict=True)
        ]
        return tf.nest.pack_sequence_as(batch, full)

    def _find_substitute(
        self, where: tf.Tensor, extra: tf.Tensor, blank: list[np.ndarray]
    ) -> list[tf.Tensor | np.ndarray]:
        """Returns the replacement of an unreadable example; runs eagerly, and rarely."""
        group, index = where
        shards, _ = self._shards_of(group)
        labels = self._shards.read_labels(self._shards.read(shards)) if self._balances else None
        ends = np.cumsum(np.array(self._shards.lengths)[shards])
        for offset in range(ends[-1]):
            position = (index + offset) % ends[-1]
            record_index = int(
                self._record_indices(group, position[None], _int64(ends[-1]), labels)[0]
            )
            number = int(np.searchsorted(ends, record_index, "right"))
            shard, end = int(shards[number]), ends[number]
            name, record = self._shards.read_one(
                shard, int(record_index - end + self._shards.lengths[shard])
            )
            encoded: tf.Tensor | None = None
            try:
                encoded, label = self._shards.parse(tf.constant(record))
                return tf.nest.flatten(self._process(encoded, label, extra))
            except READ_ERRORS as error:
                reason: Exception = error
                if encoded is not None:
                    reason = UsageError(explain(encoded.numpy(), error))
                elif isinstance(error, UnicodeDecodeError):
                    reason = UsageError("the file does not exist, or may not be read")
                # An error of TensorFlow names the reason, such as a label that is not a class.
                self._unreadable.add(name, reason)
            if self._random is None:
                # Prefetching reads on into a second epoch, which belongs to no pass.
                if group < self.num_groups:
                    self._unreadable.missing.add((int(group), int(index)))
                return blank
        raise self._unreadable.fail(
            f"none of {ends[-1]:,} training images is readable, the last one {name}: check the"
            " files and the permission to read them"
        )


def _merge_pieces(*pieces: tf.Tensor | tuple[tf.Tensor, ...]) -> tuple:
    """Reshapes tensors [n, m, ...] to [n * m, ...]."""
    return tf.nest.map_structure(
        lambda t: tf.reshape(t, [t.shape[0] * t.shape[1], *t.shape[2:]]), pieces
    )


def _int64(value: int | Sequence[int]) -> tf.Tensor:
    return tf.constant(value, tf.int64)
