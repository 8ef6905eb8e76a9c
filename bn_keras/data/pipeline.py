"""A data set joined with what is done to its images, as the input of a strategy.

The batch of step s is a pure function of (seed, s): no iterator state is ever saved, and a run
that starts at step k sees what the unbroken run sees from there on. The global batch is the unit
of everything random, and a replica takes its rows of it, so that the number of replicas changes
nothing.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras.data import images as images_lib
from bn_keras.data import sources
from bn_keras.data.augment import MIXING_UNIFORMS, RAND_AUGMENT_UNIFORMS, Mixing
from bn_keras.data.images import Preprocessing
from bn_keras.data.multi_crop import CropPreprocessing
from bn_keras.data.unreadable import BadExamples
from bn_keras.errors import UsageError

# Batches of small images are made several steps at a time, since tf.data's cost for an element
# (some 100 microseconds) is a good part of a small network's step.
CHUNK_BYTES = 2**22
MAX_CHUNK_STEPS = 16
# Chunks or batches prepared ahead.
PREFETCH = 2
# Examples that are decoded one after the other, by one of the threads.
MAX_PIECE = 32
# Records that are shuffled with each other; two to three times as much is held in memory.
GROUP_BYTES = 2**29

# What a permutation is of.
EXAMPLES, SHARDS = 0, 1
# What uniform numbers are for: each has its own, whatever else is asked for.
DISTORTIONS, RAND_AUGMENT, MIXTURES = 0, 1, 2


class Data:
    """A data set as a trainer sees it; made by `open_data`.

    Attributes:
      class_names: one a class, in the order of the labels.
      num_classes: their number.
      input_shape: (H, W, C) of what the network is fed.
      num_train_examples, num_validation_examples: sizes of the two splits.
      preprocessing: what brings its images to input_shape.
      mixing: how training images are mixed, if they are.
    """

    def __init__(
        self,
        source: sources.Source,
        preprocessing: Preprocessing,
        seed: int,
        shuffle: str,
        max_bad_examples: int = 0,
        mixing: Mixing | None = None,
    ) -> None:
        self.class_names = source.class_names
        self.num_classes = len(source.class_names)
        self.num_train_examples = source.train.num_examples
        self.num_validation_examples = source.validation.num_examples
        self.input_shape = (*preprocessing.size, source.train.image_shape[-1])
        self.preprocessing = preprocessing
        self.mixing = mixing
        self._source = source
        self._shuffle = shuffle
        self._bad_train = BadExamples(max_bad_examples)
        self._bad_validation = BadExamples(max_bad_examples)
        self._reads_all = True
        self._seed = seed
        self._train = self._batches(source.train, preprocessing, seed)

    def _batches(
        self,
        split: sources.Arrays | sources.Shards | sources.Files,
        preprocessing: Preprocessing | CropPreprocessing,
        seed: int | None,
    ) -> "_ArrayBatches | _ShardBatches":
        """A seed makes it training input; None makes it one pass after the other, in order."""
        if isinstance(split, sources.Arrays):
            return _ArrayBatches(split, preprocessing, seed, self._shuffle)
        # Single files lie in no shards whose order could be all that changes.
        shuffle = "examples" if isinstance(split, sources.Files) else self._shuffle
        bad = self._bad_validation if seed is None else self._bad_train
        return _ShardBatches(split, preprocessing, seed, shuffle, bad)

    def train_batches(
        self,
        strategy: tf.distribute.Strategy,
        global_batch_size: int,
        start_step: int = 0,
        preprocessing: Preprocessing | None = None,
        mixed: bool = False,
    ) -> tf.distribute.DistributedDataset:
        """The endless training input, from step `start_step` on (the first step is 0).

        Args:
          strategy: where it goes; replica r takes rows [r * b, (r + 1) * b) of a global batch.
          global_batch_size: examples a step, over all replicas.
          start_step: a run resumed after k steps gives k.
          preprocessing: takes the place of the data's own.
          mixed: whether images are mixed in pairs where the config says so. It is for what trains;
            statistics are taken over images as such.

        Returns:
          A distributed dataset of (images float32 [b, H, W, C], labels int32 [b], or float32
          [b, classes] if they are mixed).

        Raises:
          UsageError: the replicas do not divide the global batch, or it has no pairs to mix.
        """
        check_divides(strategy, global_batch_size)
        is_mixed = mixed and self.mixing is not None
        per_replica_batch_size = global_batch_size // strategy.num_replicas_in_sync
        if is_mixed and per_replica_batch_size % 2:
            raise UsageError(
                f"data.mixup and data.cutmix mix pairs, but each replica has"
                f" {per_replica_batch_size} examples of a batch of {global_batch_size}: take a"
                " batch of which each has an even number"
            )
        batches = self._train
        if preprocessing:
            batches = self._batches(self._source.train, preprocessing, self._seed)

        def open_rows(context: tf.distribute.InputContext) -> tf.data.Dataset:
            rows = _Rows(global_batch_size, context)
            dataset = batches.dataset(rows, start_step)
            return self._mixed(dataset, rows, start_step) if is_mixed else dataset

        return strategy.distribute_datasets_from_function(open_rows)

    def _mixed(self, dataset: tf.data.Dataset, rows: "_Rows", start_step: int) -> tf.data.Dataset:
        """Mixes the images of each batch, by random numbers of its place in the global batch."""

        def mix(
            index: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]
        ) -> tuple[tf.Tensor, tf.Tensor]:
            step, replica = start_step + index // rows.num_replicas, index % rows.num_replicas
            shape = [rows.global_batch_size, MIXING_UNIFORMS]
            drawn = _uniforms(self._seed, MIXTURES, step, shape)
            first = rows.first + tf.cast(replica, tf.int32) * rows.per_replica_batch_size
            own = tf.slice(drawn, [first, 0], [rows.per_replica_batch_size, MIXING_UNIFORMS])
            return self.mixing.mix(*batch, own, step)

        batches = dataset.enumerate().map(mix, num_parallel_calls=tf.data.AUTOTUNE)
        return batches.prefetch(PREFETCH)

    def validation_batches(
        self,
        strategy: tf.distribute.Strategy,
        global_batch_size: int,
        preprocessing: CropPreprocessing | None = None,
    ) -> tuple[tf.distribute.DistributedDataset, int]:
        """Every validation example once, in full batches, the last padded.

        Args:
          strategy: as in `train_batches`.
          global_batch_size: as in `train_batches`.
          preprocessing: takes the place of the data's own, for several crops of each image.

        Returns:
          A distributed dataset of (images float32 [b, H, W, C], or what `preprocessing.cut` takes;
          labels int32 [b]; weights float32 [b]: 1, or 0 for padding and for examples that can't be
          read), and the number of steps of one pass. The dataset goes on with the next pass after
          that.

        Raises:
          UsageError: the replicas do not divide the global batch.
        """
        check_divides(strategy, global_batch_size)
        batches = self._batches(self._source.validation, preprocessing or self.preprocessing, None)

        def open_rows(context: tf.distribute.InputContext) -> tf.data.Dataset:
            self._reads_all = context.num_input_pipelines == 1
            return batches.dataset(_Rows(global_batch_size, context), 0)

        dataset = strategy.distribute_datasets_from_function(open_rows)
        return dataset, math.ceil(self.num_validation_examples / global_batch_size)

    def check_counted(self, num_examples: float) -> None:
        """Raises AssertionError unless a pass over the validation examples counted all there are.

        All are those that can be read. A process that reads only its part of them knows of no bad
        ones in the others' parts, and leaves room for these.
        """
        missing = self.num_validation_examples - num_examples
        bad = self._bad_validation.count
        if missing != bad and (self._reads_all or missing < bad):
            raise AssertionError(
                f"{num_examples:.0f} of {self.num_validation_examples} examples were counted, while"
                f" {bad} can't be read"
            )

    @contextlib.contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Where batches are used: errors of the input tell the user what to repair.

        Raises:
          UsageError: more examples than `data.max_bad_examples` can't be read, or a file of records
            is damaged.
        """
        try:
            yield
        except tf.errors.OpError as error:
            for bad in (self._bad_train, self._bad_validation):
                if bad.too_many:
                    raise bad.too_many from None
            found = re.search(rf"({sources.FEWER_RECORDS})\] (\[.*?\])", str(error))
            if not found:
                raise
            raise UsageError(f"{found[1]} {found[2]}: prepare the data set anew") from None


def open_data(config: ConfigDict, seed: int, source: sources.Source | None = None) -> Data:
    """Opens what `config.data` describes.

    Args:
      config: the section `data` of the config.
      seed: the order and the distortions of the training examples follow from it.
      source: takes the place of the one that the config names.

    Raises:
      UsageError: a setting is not among the accepted, or the data set can't be had as asked.
    """
    accepted = {"crop": images_lib.CROPS, "shuffle": ("examples", "shards")}
    for key, values in accepted.items():
        if config[key] not in values:
            raise UsageError(
                f"data.{key} is {config[key]!r}: accepted are {', '.join(map(repr, values))}"
            )
    if config.image_size < 0:
        raise UsageError(f"data.image_size is {config.image_size}: it is a side in pixels or 0")
    if not 0 <= config.distortion <= 1:
        raise UsageError(f"data.distortion is {config.distortion}: it lies between 0 and 1")
    if not 0 <= config.random_augment <= 1:
        raise UsageError(f"data.random_augment is {config.random_augment}: it is from 0 to 1")
    for key in ("mixup", "cutmix"):
        if not 0 <= config[key] < math.inf:
            raise UsageError(f"data.{key} is {config[key]}: it has to be 0 or more")
    if config.max_bad_examples < 0:
        raise UsageError(
            f"data.max_bad_examples is {config.max_bad_examples}: it has to be 0 or more"
        )
    source = source or sources.open_source(
        config.name,
        config.data_dir,
        config.train_split,
        config.validation_split,
        config.image_size,
    )
    size = (config.image_size,) * 2 if config.image_size else source.train.image_shape[:2]
    if None in size:
        raise UsageError(
            f"data.image_size is 0, which keeps the size of the data, but the images of "
            f"{config.name!r} differ in size: give the side in pixels"
        )
    preprocessing = make_preprocessing(config, size)
    mixing = None
    if config.mixup or config.cutmix:
        mixing = Mixing(config.mixup, config.cutmix, len(source.class_names))
    return Data(source, preprocessing, seed, config.shuffle, config.max_bad_examples, mixing)


def make_preprocessing(config: ConfigDict, size: tuple[int, int]) -> Preprocessing:
    """Makes what `config.data` asks for, to images of this height and width."""
    return Preprocessing(
        size=size,
        crop=config.crop,
        mirror=config.mirror,
        distortion=config.distortion,
        binary=config.binary,
        random_augment=config.random_augment,
    )


class _Rows:
    """The rows of each global batch that one input pipeline feeds, and to how many replicas."""

    def __init__(self, global_batch_size: int, context: tf.distribute.InputContext) -> None:
        self.global_batch_size = global_batch_size
        self.num_replicas = context.num_replicas_in_sync // context.num_input_pipelines
        self.count = global_batch_size // context.num_input_pipelines
        self.per_replica_batch_size = self.count // self.num_replicas
        self.first = context.input_pipeline_id * self.count


class _ArrayBatches:
    """Batches of a split in memory, made whole: no step is taken example by example.

    It counts as one shard: in training its examples are permuted anew each epoch with shuffle
    "examples", and with "shards" come in the order in which they are stored, in every epoch.
    """

    def __init__(
        self,
        arrays: sources.Arrays,
        preprocessing: Preprocessing | CropPreprocessing,
        seed: int | None,
        shuffle: str,
    ) -> None:
        """A seed makes it training input; None makes it one pass after the other, in order."""
        with tf.device("CPU:0"):
            self._images = tf.constant(arrays.images)
            self._labels = tf.constant(arrays.labels)
        self._white = arrays.white
        self._num_examples = arrays.num_examples
        self._preprocessing = preprocessing
        self._seed = seed
        self._is_permuted = shuffle == "examples"

    def dataset(self, rows: _Rows, start_step: int) -> tf.data.Dataset:
        """Endless batches of one replica each, replica by replica, step by step."""
        image_bytes = 4 * self._preprocessing.num_pixels * self._images.shape[-1]
        step_bytes = rows.global_batch_size * image_bytes
        # The same for any number of replicas: random numbers are drawn by the chunk.
        steps = max(1, min(MAX_CHUNK_STEPS, CHUNK_BYTES // step_bytes))
        chunks = tf.data.Dataset.counter(start_step // steps).map(
            lambda chunk: self._chunk(chunk, steps, rows)
        )
        batches = chunks.prefetch(PREFETCH).unbatch()
        skipped = start_step % steps * rows.num_replicas
        # One thread keeps up with steps of 100 microseconds and takes no core from the network.
        return _plain(batches.skip(skipped) if skipped else batches, threads=1)

    def _chunk(self, chunk: tf.Tensor, steps: int, rows: _Rows) -> tuple[tf.Tensor, ...]:
        """Several steps' batches: tensors [steps * replicas, per-replica batch, ...]."""
        step = chunk * steps + tf.range(steps, dtype=tf.int64)[:, None]
        row = rows.first + tf.range(rows.count, dtype=tf.int64)
        if self._seed is None:
            num_steps = math.ceil(self._num_examples / rows.global_batch_size)
            examples = tf.reshape(step % num_steps * rows.global_batch_size + row, [-1])
            weights = [tf.cast(examples < self._num_examples, tf.float32)]
            uniforms = None
        else:
            places = tf.reshape(step * rows.global_batch_size + row, [-1])
            epochs, examples = places // self._num_examples, places % self._num_examples
            if self._is_permuted:
                examples = _permuted(examples, self._num_examples, self._seed, EXAMPLES, epochs)
            weights = []
            uniforms = self._uniforms(chunk, steps, rows)
        indices = tf.cast(examples % self._images.shape[0], tf.int32)
        images = self._preprocessing.from_pool(self._images, indices, uniforms, self._white)
        shape = [steps * rows.num_replicas, rows.per_replica_batch_size]
        return tf.nest.map_structure(
            lambda batch: tf.reshape(batch, [*shape, *batch.shape[1:]]),
            (images, tf.gather(self._labels, indices), *weights),
        )

    def _uniforms(self, chunk: tf.Tensor, steps: int, rows: _Rows) -> tf.Tensor:
        """Random numbers, a row an image, drawn for all rows of which these are taken."""
        shape = [steps, rows.global_batch_size]
        drawn = _image_uniforms(self._preprocessing, self._seed, chunk, shape)
        own = drawn[:, rows.first : rows.first + rows.count]
        return tf.reshape(own, [-1, drawn.shape[-1]])


class _ShardBatches:
    """Batches of a split that is read from its files, decoded example by example.

    The order is that of groups of shards. In training the shards are permuted anew each epoch
    and cut into groups; with shuffle "examples" a group is read into memory whole and its records
    permuted. So the place of an example follows from (seed, epoch) alone, and to start anywhere
    takes reading one group. Every input pipeline reads every record, and decodes only its rows.

    The place of an example that can't be read is taken, in training, by the next one of its group
    that can, under the same random numbers; in evaluation by a blank image of weight 0.
    """

    def __init__(
        self,
        shards: sources.Shards | sources.Files,
        preprocessing: Preprocessing | CropPreprocessing,
        seed: int | None,
        shuffle: str,
        bad_examples: BadExamples,
    ) -> None:
        """A seed makes it training input; None makes it one pass after the other, in order."""
        self._shards = shards
        self._preprocessing = preprocessing
        self._seed = seed
        self._bad_examples = bad_examples
        self._within_groups = seed is not None and shuffle == "examples"
        num_shards = len(shards.lengths)
        fitting = GROUP_BYTES * num_shards // (shards.num_examples * shards.example_bytes)
        self._group_shards = max(1, min(fitting, num_shards)) if self._within_groups else 1
        self._num_groups = math.ceil(num_shards / self._group_shards)

    def dataset(self, rows: _Rows, start_step: int) -> tf.data.Dataset:
        """Endless batches of one replica each, replica by replica, step by step."""
        num_examples = self._shards.num_examples
        num_steps = math.ceil(num_examples / rows.global_batch_size)
        # A pass of evaluation ends with a padded batch, an epoch of training within one.
        padding = num_steps * rows.global_batch_size - num_examples if self._seed is None else 0
        start = start_step * rows.global_batch_size

        def read_group(group: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return self._read_group(group, rows, start, padding)

        def examples_of(records: tf.Tensor, *each: tf.Tensor) -> tf.data.Dataset:
            # All records go along with each example: that takes a reference. To copy one, as
            # gather, unbatch and batch do, takes up to 60 microseconds.
            return tf.data.Dataset.from_tensor_slices(each).map(lambda *one: (records, *one))

        epoch, place = divmod(start, num_examples + padding)
        first = epoch * self._num_groups + self._group_of(epoch, place)
        groups = tf.data.Dataset.counter(first).map(read_group).prefetch(1)
        examples = groups.flat_map(examples_of)
        batch_size = rows.per_replica_batch_size
        size = max(n for n in range(1, min(batch_size, MAX_PIECE) + 1) if batch_size % n == 0)
        batches = examples.window(size, drop_remainder=True).map(
            lambda *parts: self._decode(tf.data.Dataset.zip(parts), size),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        if size < batch_size:
            batches = batches.batch(batch_size // size, drop_remainder=True).map(_joined)
        endless = tf.data.experimental.assert_cardinality(tf.data.experimental.INFINITE_CARDINALITY)
        return _plain(batches.prefetch(PREFETCH).apply(endless))

    def _read_group(
        self, group: tf.Tensor, rows: _Rows, start: int, padding: int
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Reads one group of shards.

        Args:
          group: its number in the endless row of epochs, int64.
          rows: of the global batches, the ones to keep.
          start: place in the endless row of epochs before which nothing is kept.
          padding: how often the last record of an epoch is repeated after it, with weight 0.

        Returns:
          All its records, string [count]; then of the examples to keep, in their order: which
          record it is, int64 [n]; the group and its place there, int64 [n, 2]; and what goes with
          it: in training random numbers, a row each, else weights [n].
        """
        epoch, number = group // self._num_groups, group % self._num_groups
        shards, begin = self._shards_of(group)
        count = tf.reduce_sum(tf.gather(_int64(self._shards.lengths), shards))
        records = self._shards.read(shards)

        last = tf.cast(tf.equal(number, self._num_groups - 1), tf.int64)
        index = tf.range(count + last * padding)
        place = epoch * (self._shards.num_examples + padding) + begin + index
        row = place % rows.global_batch_size
        own = (place >= start) & (row >= rows.first) & (row < rows.first + rows.count)
        index = index[own]
        if self._seed is None:
            extra = tf.cast(index < count, tf.float32)
            index = tf.minimum(index, count - 1)
        else:
            # Drawn for the whole group at once: one at a time costs some 60 microseconds each.
            drawn = _image_uniforms(self._preprocessing, self._seed, group, [count])
            extra = tf.gather(drawn, index)
        where = tf.stack([tf.broadcast_to(group, tf.shape(index)), index], axis=1)
        return records, self._stored(group, index, count), where, extra

    def _stored(self, group: tf.Tensor, index: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """Where the examples at these places of a group lie among its records."""
        if not self._within_groups:
            return index
        return _permuted(index, count, self._seed, EXAMPLES, group)

    def _shards_of(self, group: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The shards of a group, and its place in the epoch."""
        order, begins = self._shard_order(group // self._num_groups)
        first = group % self._num_groups * self._group_shards
        return order[first:][: self._group_shards], begins[first]

    def _shard_order(self, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The shards in the order of an epoch, and the place where each begins in it."""
        num_shards = len(self._shards.lengths)
        order = tf.range(num_shards, dtype=tf.int64)
        if self._seed is not None:
            order = _permuted(order, num_shards, self._seed, SHARDS, epoch)
        return order, tf.cumsum(tf.gather(_int64(self._shards.lengths), order), exclusive=True)

    def _group_of(self, epoch: int, place: int) -> int:
        """The group that holds the example at this place in an epoch."""
        with tf.device("CPU:0"):
            _, begins = self._shard_order(_int64(epoch))
        return int(np.searchsorted(begins.numpy()[:: self._group_shards], place, "right")) - 1

    def _decode(
        self, examples: tf.data.Dataset, size: int
    ) -> tuple[tf.Tensor | tuple[tf.Tensor, ...], ...]:
        """So many examples of what `_read_group` tells: batches of images, labels and weights."""
        decoded = examples.enumerate().map(
            lambda i, example: (i, self._example(example[0][example[1]], example[3]))
        )
        none = tf.nest.map_structure(
            lambda spec: tf.zeros([0, *spec.shape], spec.dtype), decoded.element_spec
        )
        # What fails is left out, which costs nothing where nothing does.
        read = decoded.ignore_errors().batch(size).concatenate(tf.data.Dataset.from_tensors(none))
        indices, batch = read.take(1).get_single_element()
        batch = tf.cond(
            tf.equal(tf.size(indices), size),
            lambda: batch,
            lambda: self._completed(tf.cast(indices, tf.int32), batch, examples, size),
        )
        return tf.nest.map_structure(lambda t: tf.ensure_shape(t, [size, *t.shape[1:]]), batch)

    def _example(self, record: tf.Tensor, extra: tf.Tensor) -> tuple[tf.Tensor, ...]:
        encoded, label = self._shards.parse(record)
        channels = self._shards.image_shape[-1]
        if self._seed is None:
            return self._preprocessing.from_encoded(encoded, None, channels), label, extra
        return self._preprocessing.from_encoded(encoded, extra, channels), label

    def _completed(
        self,
        indices: tf.Tensor,
        batch: tuple[tf.Tensor, ...],
        examples: tf.data.Dataset,
        size: int,
    ) -> tuple[tf.Tensor, ...]:
        """Fills up a batch of which only the examples with these indices could be read."""
        missing = tf.sets.difference([tf.range(size)], [indices]).values
        places = examples.map(lambda records, stored, where, extra: (where, extra)).batch(size)
        where, extras = places.take(1).get_single_element()
        flat = tf.nest.flatten(batch)

        def substitutes(where: tf.Tensor, extras: tf.Tensor) -> list[tf.Tensor]:
            with tf.device("CPU:0"):
                found = [self._substitute(*pair, blank) for pair in zip(where, extras, strict=True)]
            return [tf.stack(values) for values in zip(*found, strict=True)]

        blank = [np.zeros(t.shape[1:], t.dtype.as_numpy_dtype) for t in flat]
        others = tf.py_function(
            substitutes,
            [tf.gather(where, missing), tf.gather(extras, missing)],
            [t.dtype for t in flat],
        )
        order = tf.argsort(tf.concat([indices, missing], axis=0))
        full = [
            tf.ensure_shape(tf.gather(tf.concat(parts, axis=0), order), parts[0].shape)
            for parts in zip(flat, others, strict=True)
        ]
        return tf.nest.pack_sequence_as(batch, full)

    def _substitute(
        self, where: tf.Tensor, extra: tf.Tensor, blank: list[np.ndarray]
    ) -> list[tf.Tensor | np.ndarray]:
        """What stands, eagerly and rarely, for an example that could not be read."""
        group, index = where
        shards, _ = self._shards_of(group)
        ends = np.cumsum(np.array(self._shards.lengths)[shards])
        for further in range(ends[-1]):
            place = (index + further) % ends[-1]
            stored = int(self._stored(group, place[None], _int64(ends[-1]))[0])
            number = int(np.searchsorted(ends, stored, "right"))
            shard, end = int(shards[number]), ends[number]
            name, record = self._shards.read_one(
                shard, int(stored - end + self._shards.lengths[shard])
            )
            try:
                return tf.nest.flatten(self._example(tf.constant(record), extra))
            except tf.errors.OpError as error:
                self._bad_examples.add(name, error)
            if self._seed is None:
                return blank
        raise AssertionError("not one example of a group can be read")


def _joined(*batches: tf.Tensor | tuple[tf.Tensor, ...]) -> tuple:
    """Of tensors [n, m, ...], each [n * m, ...]."""
    return tf.nest.map_structure(
        lambda t: tf.reshape(t, [t.shape[0] * t.shape[1], *t.shape[2:]]), batches
    )


def _image_uniforms(
    preprocessing: Preprocessing, seed: int, number: tf.Tensor, shape: Sequence[int | tf.Tensor]
) -> tf.Tensor:
    """Random numbers [*shape, columns], a row for each image, as `preprocessing` takes them."""
    drawn = _uniforms(seed, DISTORTIONS, number, [*shape, images_lib.NUM_UNIFORMS])
    if not preprocessing.random_augment:
        return drawn
    others = _uniforms(seed, RAND_AUGMENT, number, [*shape, RAND_AUGMENT_UNIFORMS])
    return tf.concat([drawn, others], axis=-1)


def _uniforms(
    seed: int, stream: int, number: tf.Tensor, shape: Sequence[int | tf.Tensor]
) -> tf.Tensor:
    """Numbers in [0, 1) that follow from a seed of 32 bits, what they are for, and an int64."""
    words = tf.stack([_int64(seed + stream * 2**32), number])
    return tf.random.stateless_uniform(tf.stack(shape), seed=words)


def _permuted(
    indices: tf.Tensor, count: tf.Tensor, seed: int, stream: int, number: tf.Tensor
) -> tf.Tensor:
    """Where a random permutation of `count` things takes each of the indices.

    As TensorFlow's index_shuffle, which is used here with seeds mixed well and twice its rounds:
    by itself it looks at the lowest byte of each seed alone, and permutes 60,000 things alike for
    seeds that are neighbours (a correlation of 0.9). It also pads a matrix of seeds wrongly.

    Args:
      indices: int64 [n] in [0, count).
      count: how many things there are.
      seed: with stream and number, it determines the permutation.
      stream: what is permuted, so that different things are permuted differently.
      number: int64, one for all or [n], one each: the epoch, for example.

    Returns:
      int64 [n].
    """
    key = _mixed(_int64(2 * seed + stream)) + tf.cast(number, tf.uint64)
    words = tf.broadcast_to(_mixed(key), tf.shape(indices))[:, None] + tf.constant(
        [1, 2, 3], tf.uint64
    )
    return tf.raw_ops.RandomIndexShuffle(
        index=indices, seed=_mixed(words), max_index=tf.cast(count, tf.int64) - 1, rounds=8
    )


def _mixed(numbers: tf.Tensor) -> tf.Tensor:
    """Integers to uint64 that look random, one to one: the finalizer of SplitMix64.

    Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators.
    """
    mixed = tf.cast(numbers, tf.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        shifted = tf.bitwise.right_shift(mixed, tf.constant(shift, tf.uint64))
        mixed = tf.bitwise.bitwise_xor(mixed, shifted) * tf.constant(factor, tf.uint64)
    return mixed


def check_divides(strategy: tf.distribute.Strategy, global_batch_size: int) -> None:
    """Raises UsageError if a global batch can't be split evenly over the replicas."""
    if global_batch_size < 1 or global_batch_size % strategy.num_replicas_in_sync:
        raise UsageError(
            f"a global batch of {global_batch_size} can't be split over "
            f"{strategy.num_replicas_in_sync} replicas: take a positive multiple of their number"
        )


def _plain(dataset: tf.data.Dataset, threads: int = 0) -> tf.data.Dataset:
    """Without tf.data's tuning and rewriting, which cost more than they find to do here."""
    options = tf.data.Options()
    options.deterministic = True
    if threads:
        options.threading.private_threadpool_size = threads
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    # One rewriting has to stay: it gives the iterator functions of its own. With those of the
    # operation that made it, TensorFlow's iterator over several devices crashes where it is dropped
    # while it reads ahead.
    options.experimental_optimization.noop_elimination = True
    return dataset.with_options(options)


def _int64(value: int | Sequence[int]) -> tf.Tensor:
    return tf.constant(value, tf.int64)
