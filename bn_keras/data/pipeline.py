"""The input pipeline: a data set, its preprocessing, and their batches for a strategy.

The batch of step s is a pure function of (seed, s). No iterator state is saved, and a run that
starts at step k sees the same batches as an uninterrupted one from there on. Random numbers are
drawn for the global batch, and each replica gets its rows, so that a batch does not depend on the
number of replicas.
"""

import contextlib
import functools
import math
import re
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from bn_keras.data.accepted_settings import check_settings
from bn_keras.data.array_batches import ArrayBatches
from bn_keras.data.augment import Mixing
from bn_keras.data.balance import class_weights
from bn_keras.data.batching import PREFETCH, Rows
from bn_keras.data.multi_crop import CropPreprocessing
from bn_keras.data.random_numbers import RandomNumbers
from bn_keras.data.shard_batches import ShardBatches
from bn_keras.data.sources import open_source
from bn_keras.data.splits import TOO_FEW_RECORDS, Arrays, Files, Shards, Source, Split
from bn_keras.data.transforms import Preprocessing
from bn_keras.data.unreadable_examples import UnreadableExamples
from bn_keras.errors import BucketUnavailableError, UsageError
from bn_keras.storage import is_temporary, reason_of


class Data:
    """Batches of a preprocessed data set; opened by `open_data`.

    Args:
      source: classes and splits.
      preprocessing: preprocessing of the images.
      seed: seed of the order and the augmentation of the training examples.
      shuffle: "examples" or "shards"; see bn_keras/training/config.py.
      max_bad_examples: unreadable examples accepted per split and process.
      mixing: MixUp and CutMix for training; None for neither.
      balance: "none", "weights" or "sampling"; see bn_keras/training/config.py.

    Attributes:
      class_names: names of the classes, in the order of the labels.
      fingerprint, description: see `Source`.
      num_classes: number of classes.
      input_shape: (H, W, C) of the network's input.
      num_train_examples, num_validation_examples: sizes of the splits.
      preprocessing, mixing, balance: see Args.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        *,
        seed: int,
        shuffle: str,
        max_bad_examples: int = 0,
        mixing: Mixing | None = None,
        balance: str = "none",
    ) -> None:
        self.class_names = source.class_names
        self.fingerprint = source.fingerprint
        self.description = source.description
        self.num_classes = len(source.class_names)
        self.num_train_examples = source.train.num_examples
        self.num_validation_examples = source.validation.num_examples
        self.input_shape = (*preprocessing.size, source.train.image_shape[-1])
        self.preprocessing = preprocessing
        self.mixing = mixing
        self.balance = balance
        self._source = source
        self._shuffle = shuffle
        self._seed = seed
        self._unreadable_train = UnreadableExamples(max_bad_examples)
        self._unreadable_validation = UnreadableExamples(max_bad_examples)
        self._reads_all = True
        self._train = self._open_train(preprocessing)

    @functools.cached_property
    def class_counts(self) -> np.ndarray | None:
        """Number of training examples of each class, int64 [classes].

        The labels of a set that is read from TFRecord files are known only after reading all of
        them: they are read if the loss needs the counts for its weights, and are None otherwise.
        """
        split = self._source.train
        if isinstance(split, Shards):
            if self.balance != "weights":
                return None
            logging.info("counting the classes of %s records", f"{split.num_examples:,}")
        with self.reporting_errors():
            return split.count_classes(self.num_classes)

    @property
    def class_weights(self) -> np.ndarray | None:
        """Weight of each class in the loss, float64 [classes]; None without balance "weights"."""
        if self.balance != "weights" or self.class_counts is None:
            return None
        return class_weights(self.class_counts)

    @property
    def num_balanced_groups(self) -> int:
        """Number of groups per epoch within which balanced sampling draws; 1 is the whole set."""
        return self._train.num_groups if isinstance(self._train, ShardBatches) else 1

    def train_batches(
        self,
        strategy: tf.distribute.Strategy,
        global_batch_size: int,
        start_step: int = 0,
        preprocessing: Preprocessing | None = None,
        mix: bool = False,
    ) -> tf.distribute.DistributedDataset:
        """Returns the endless training input, beginning with step `start_step`.

        Args:
          strategy: replica r gets rows [r * b, (r + 1) * b) of a global batch.
          global_batch_size: examples per step, over all replicas.
          start_step: number of the first step, counted from 0; k for a run resumed after k steps.
          preprocessing: replaces the data's own.
          mix: whether to apply the config's MixUp and CutMix: in training, but not for statistics,
            which are computed on unmixed images.

        Returns:
          A distributed dataset of images, float32 [b, H, W, C], and labels, int32 [b], or float32
          [b, classes] if mixed.

        Raises:
          UsageError: the replicas do not divide the global batch, or a replica has an odd number
            of examples to mix in pairs.
        """
        check_divides(strategy, global_batch_size)
        mixing = self.mixing if mix else None
        per_replica_batch_size = global_batch_size // strategy.num_replicas_in_sync
        if mixing and per_replica_batch_size % 2:
            raise UsageError(
                f"data.mixup and data.cutmix mix pairs, but each replica has"
                f" {per_replica_batch_size} examples of a batch of {global_batch_size}: choose a"
                " batch size that is even on each replica"
            )
        batches = self._open_train(preprocessing) if preprocessing else self._train

        def open_rows(context: tf.distribute.InputContext) -> tf.data.Dataset:
            rows = Rows(global_batch_size, context)
            dataset = batches.dataset(rows, start_step)
            return self._mix(dataset, mixing, rows, start_step) if mixing else dataset

        return strategy.distribute_datasets_from_function(open_rows)

    def validation_batches(
        self,
        strategy: tf.distribute.Strategy,
        global_batch_size: int,
        preprocessing: CropPreprocessing | None = None,
    ) -> tuple[tf.distribute.DistributedDataset, int]:
        """Returns the validation input: each example once per pass, the last batch padded.

        Args:
          strategy: see `train_batches`.
          global_batch_size: see `train_batches`.
          preprocessing: replaces the data's own, for several crops of each image.

        Returns:
          An endless distributed dataset of images, float32 [b, H, W, C], or the input of
          `preprocessing.cut`; labels, int32 [b]; and weights, float32 [b]: 1, or 0 for padding and
          unreadable examples. Then the number of steps of one pass.

        Raises:
          UsageError: the replicas do not divide the global batch.
        """
        check_divides(strategy, global_batch_size)
        batches = self._open_batches(
            self._source.validation,
            preprocessing or self.preprocessing,
            None,
            self._unreadable_validation,
        )

        def open_rows(context: tf.distribute.InputContext) -> tf.data.Dataset:
            self._reads_all = context.num_input_pipelines == 1
            return batches.dataset(Rows(global_batch_size, context), 0)

        dataset = strategy.distribute_datasets_from_function(open_rows)
        return dataset, math.ceil(self.num_validation_examples / global_batch_size)

    def validation_sample(
        self, strategy: tf.distribute.Strategy, num_examples: int
    ) -> tf.distribute.DistributedDataset:
        """Returns an endless dataset of validation examples of as many classes as possible.

        Where the labels are known only after reading the whole split, the examples are evenly
        spaced in it. The choice is always the same.

        Args:
          strategy: see `train_batches`.
          num_examples: number of examples, and size of the global batch; a smaller split is padded.

        Returns:
          See `validation_batches`.

        Raises:
          UsageError: the replicas do not divide the number of examples.
        """
        check_divides(strategy, num_examples)
        sample = self._source.validation.sample(num_examples)
        batches = self._open_batches(sample, self.preprocessing, None, self._unreadable_validation)
        return strategy.distribute_datasets_from_function(
            lambda context: batches.dataset(Rows(num_examples, context), 0)
        )

    def read_validation_example(self, index: int) -> tuple[str, np.ndarray]:
        """Reads one validation example.

        Args:
          index: position in the split.

        Returns:
          A name by which a user can find the example, and the network's input, float32 [H, W, C].

        Raises:
          tf.errors.OpError: it cannot be read.
        """
        split = self._source.validation
        if isinstance(split, Arrays):
            entry = index % len(split.labels)
            image = split.images[entry : entry + 1]
            batch = self.preprocessing.process_batch(
                tf.constant(image), tf.constant([0]), None, split.white
            )
            return f"example {index}", batch[0].numpy()
        ends = np.cumsum(split.lengths)
        shard = int(np.searchsorted(ends, index, "right"))
        name, record = split.read_one(shard, int(index - ends[shard] + split.lengths[shard]))
        encoded, _ = split.parse(tf.constant(record))
        channels = split.image_shape[-1]
        return name, self.preprocessing.process_encoded(encoded, None, channels).numpy()

    def begin_validation(self) -> None:
        """Starts the count of unreadable examples of a pass, which `check_counted` compares."""
        self._unreadable_validation.missing.clear()

    def check_counted(self, num_examples: float) -> None:
        """Raises AssertionError unless a validation pass counted every readable example.

        If none is readable, raises UsageError.

        A process that reads only some of the examples does not know how many of the others are
        unreadable, and accepts a smaller count.
        """
        if not num_examples:
            raise UsageError(
                f"none of the {self.num_validation_examples:,} validation images is readable: check"
                " the files and the permission to read them"
            )
        missing = self.num_validation_examples - num_examples
        unreadable = len(self._unreadable_validation.missing)
        if missing != unreadable and (self._reads_all or missing < unreadable):
            raise AssertionError(
                f"{num_examples:.0f} of {self.num_validation_examples} validation examples were"
                f" counted, but {unreadable} are unreadable"
            )

    @contextlib.contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Wraps code that reads batches; reports errors of the input on one line.

        Raises:
          BucketUnavailableError: the data is in a bucket that does not answer.
          UsageError: more examples than `data.max_bad_examples` are unreadable, or a file of
            records is damaged.
        """
        try:
            yield
        except tf.errors.OpError as error:
            for unreadable in (self._unreadable_train, self._unreadable_validation):
                if unreadable.error:
                    raise unreadable.error from None
            if is_temporary(error) and "gs://" in str(error):
                raise BucketUnavailableError(
                    f"the data cannot be read: {reason_of(error)}"
                ) from None
            found = re.search(rf"({TOO_FEW_RECORDS})\] (\[.*?\])", str(error))
            if not found:
                raise
            raise UsageError(f"{found[1]} {found[2]}: prepare the data set again") from None

    def _open_train(self, preprocessing: Preprocessing) -> ArrayBatches | ShardBatches:
        random = RandomNumbers(self._seed, draws_random_augment=preprocessing.random_augment > 0)
        return self._open_batches(self._source.train, preprocessing, random, self._unreadable_train)

    def _open_batches(
        self,
        split: Split,
        preprocessing: Preprocessing | CropPreprocessing,
        random: RandomNumbers | None,
        unreadable: UnreadableExamples,
    ) -> ArrayBatches | ShardBatches:
        order = "balanced" if self.balance == "sampling" else self._shuffle
        if isinstance(split, Arrays):
            return ArrayBatches(split, preprocessing, random, order)
        if isinstance(split, Files) and order == "shards":
            # All files form one shard: permuting shards would leave them in stored order.
            order = "examples"
        return ShardBatches(split, preprocessing, random, order, unreadable)

    # AutoGraph would take a second at every start, and has nothing to convert here.
    @tf.autograph.experimental.do_not_convert
    def _mix(
        self, dataset: tf.data.Dataset, mixing: Mixing, rows: Rows, start_step: int
    ) -> tf.data.Dataset:
        """Mixes each replica's batch with the random numbers of its rows of the global batch."""
        random = RandomNumbers(self._seed)

        def mix_batch(
            index: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]
        ) -> tuple[tf.Tensor, tf.Tensor]:
            step, replica = start_step + index // rows.num_replicas, index % rows.num_replicas
            drawn = random.draw_for_mixing(step, rows.global_batch_size)
            first = rows.first + tf.cast(replica, tf.int32) * rows.per_replica_batch_size
            own = tf.slice(drawn, [first, 0], [rows.per_replica_batch_size, drawn.shape[-1]])
            return mixing.mix(*batch, own, step)

        batches = dataset.enumerate().map(mix_batch, num_parallel_calls=tf.data.AUTOTUNE)
        return batches.prefetch(PREFETCH)


def open_data(settings: ConfigDict, seed: int, source: Source | None = None) -> Data:
    """Opens a data set.

    Args:
      settings: section `data` of a config; see bn_keras/training/config.py.
      seed: seed of the order and the augmentation of the training examples.
      source: replaces the source called `settings.name`.

    Raises:
      UsageError: an invalid setting, or a data set or split that does not exist or cannot be
        prepared.
    """
    check_settings(settings)
    size = settings.image_size
    source = source or open_source(
        settings.name, settings.data_dir, settings.train_split, settings.validation_split, size
    )
    keeps_order = settings.shuffle == "shards" and not isinstance(source.train, Files)
    if settings.balance == "sampling" and keeps_order:
        raise UsageError(
            "data.balance='sampling' draws examples in random order, but data.shuffle='shards'"
            " keeps their stored order: set data.shuffle='examples', or data.balance='weights'"
        )
    height, width, _ = (size, size, None) if size else source.train.image_shape
    if height is None or width is None:
        raise UsageError(
            "data.image_size=0 keeps the size of the images, but those of"
            f" {settings.name!r} differ in size: set the side in pixels"
        )
    preprocessing = Preprocessing(
        (height, width),
        settings.crop,
        binary=settings.binary,
        mirror=settings.mirror,
        distortion=settings.distortion,
        random_augment=settings.random_augment,
    )
    mixing = None
    if settings.mixup or settings.cutmix:
        mixing = Mixing(settings.mixup, settings.cutmix, len(source.class_names))
    return Data(
        source,
        preprocessing,
        seed=seed,
        shuffle=settings.shuffle,
        max_bad_examples=settings.max_bad_examples,
        mixing=mixing,
        balance=settings.balance,
    )


def check_divides(strategy: tf.distribute.Strategy, global_batch_size: int) -> None:
    """Raises UsageError unless the replicas divide a global batch evenly."""
    replicas = strategy.num_replicas_in_sync
    if global_batch_size < 1 or global_batch_size % replicas:
        raise UsageError(
            f"a global batch of {global_batch_size} cannot be split evenly over {replicas}"
            " replicas: expected a positive multiple of their number"
        )
