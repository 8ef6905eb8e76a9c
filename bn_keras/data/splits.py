"""The splits of a data set: in memory, in TFRecord files or in single image files."""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from bn_keras.errors import UsageError
from bn_keras.text import counted

# Part of the error for a truncated or damaged file of records; the pipeline looks for it.
TOO_FEW_RECORDS = "fewer readable records than expected in"
# The keys of a fingerprint, and for errors what each of its hashes covers.
FINGERPRINTS = {
    "file_names": "names of image files",
    "file_sizes": "sizes of image files",
    "tfrecord_files": "TFRecord files",
    "examples": "images or labels",
}
# Size of the read buffer of each TFRecord file.
_READ_AHEAD_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A split in memory.

    Attributes:
      images: uint8 [pool, H, W, C].
      labels: int32 [pool].
      white: value of a white pixel.
      num_examples: size of the split; 0 is the size of the pool. A larger split repeats the pool:
        example i is entry i mod pool.
    """

    images: np.ndarray
    labels: np.ndarray
    white: int = 255
    num_examples: int = 0

    def __post_init__(self) -> None:
        if not self.num_examples:
            object.__setattr__(self, "num_examples", len(self.labels))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (H, W, C) of each image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def count_classes(self, num_classes: int) -> np.ndarray:
        """Returns the number of examples of each class, int64 [num_classes]."""
        repeats, rest = divmod(self.num_examples, len(self.labels))
        counts = repeats * np.bincount(self.labels, minlength=num_classes)
        return counts + np.bincount(self.labels[:rest], minlength=num_classes)

    def sample(self, count: int) -> "Arrays":
        """Returns at most `count` examples, spread over the classes; see `spread_over_classes`."""
        chosen = spread_over_classes(self.labels, count)
        return Arrays(self.images[chosen], self.labels[chosen], self.white)


@dataclasses.dataclass(frozen=True)
class Shards:
    """A split in TFRecord files, read during training; images stay encoded until they are used.

    A shard is a run of consecutive records of one file.

    Attributes:
      paths: file of each shard.
      skips: number of records in the file before each shard.
      lengths: number of records in each shard.
      example_bytes: mean size of a record.
      image_shape: (H, W, C); H and W are None if they differ between images.
      parse: TensorFlow function from a record, a string tensor, to (encoded image, label); fails
        for a label that is not a class.
      read_labels: TensorFlow function from records, string [n], to their labels, integers [n]; -1
        for a label that is not a class.
    """

    paths: tuple[str, ...]
    skips: tuple[int, ...]
    lengths: tuple[int, ...]
    example_bytes: int
    image_shape: tuple[int | None, int | None, int]
    parse: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
    read_labels: Callable[[tf.Tensor], tf.Tensor]

    @property
    def num_examples(self) -> int:
        """Number of records in all shards."""
        return sum(self.lengths)

    def read(self, shards: tf.Tensor) -> tf.Tensor:
        """Reads whole shards.

        Args:
          shards: int64 [n] numbers of the shards.

        Returns:
          Their records, string [sum of their lengths], shard by shard.
        """
        paths, skips, lengths = map(tf.constant, (self.paths, self.skips, self.lengths))

        def open_shard(shard: tf.Tensor) -> tf.data.Dataset:
            # Nothing after damaged bytes can be read; the assertion below counts the records.
            records = tf.data.TFRecordDataset(paths[shard], buffer_size=_READ_AHEAD_BYTES)
            return (
                records.ignore_errors()
                .skip(tf.cast(skips, tf.int64)[shard])
                .take(tf.cast(lengths, tf.int64)[shard])
            )

        count = tf.reduce_sum(tf.gather(tf.cast(lengths, tf.int64), shards))
        records = tf.data.Dataset.from_tensor_slices(shards).flat_map(open_shard)
        # Without a readable record there is no batch; the empty one then fails the assertion.
        none = tf.data.Dataset.from_tensors(tf.constant([], tf.string))
        records = records.batch(count).concatenate(none).take(1).get_single_element()
        check = tf.debugging.Assert(
            tf.equal(tf.size(records, tf.int64), count),
            [TOO_FEW_RECORDS, tf.gather(paths, shards)],
            summarize=-1,
        )
        # Without this order, gathering a missing record could fail first, with an unhelpful error.
        with tf.control_dependencies([check]):
            return tf.identity(records)

    def count_classes(self, num_classes: int) -> np.ndarray:
        """Reads all records, and returns the number of examples of each class, int64."""
        shards = tf.data.Dataset.range(len(self.lengths)).map(
            lambda shard: self.read_labels(self.read(shard[tf.newaxis])),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        counts = np.zeros(num_classes, np.int64)
        for labels in shards.as_numpy_iterator():
            counts += np.bincount(labels[labels >= 0], minlength=num_classes)
        return counts

    def sample(self, count: int) -> "Shards":
        """Returns at most `count` records, evenly spaced in the order of the files.

        The labels are known only after reading all records; TFDS stores most sets in random order.
        """
        count = min(count, self.num_examples)
        begins = [0, *itertools.accumulate(self.lengths)]
        places = []
        for position in (i * self.num_examples // count for i in range(count)):
            shard = bisect.bisect_right(begins, position) - 1
            places.append((self.paths[shard], self.skips[shard] + position - begins[shard]))
        paths, skips = zip(*places, strict=True)
        return dataclasses.replace(self, paths=paths, skips=skips, lengths=(1,) * count)

    def read_one(self, shard: int, index: int) -> tuple[str, bytes]:
        """Reads one record of a shard.

        Returns:
          A name by which a user can find the record, and the record.
        """
        path, index = self.paths[shard], self.skips[shard] + index
        [record] = tf.data.TFRecordDataset(path).skip(index).take(1).as_numpy_iterator()
        features = tf.train.Example.FromString(record).features.feature
        location = f"record {index} of {path}"
        if not features["file_name"].bytes_list.value:
            return location, record
        return f"{features['file_name'].bytes_list.value[0].decode()} ({location})", record


class Files:
    """A split of single image files, read during training.

    Its interface is that of `Shards`. All files form one shard, and each record is the number of a
    file, so that all records fit into memory: they are permuted as a whole, and a run can start
    anywhere without reading a file.

    Args:
      paths: path of each file, in the encoding of the file system.
      labels: label of each file.
    """

    image_shape = (None, None, 3)
    # Approximate size of a record.
    example_bytes = 32

    def __init__(self, paths: Sequence[bytes], labels: Sequence[int]) -> None:
        self.lengths = (len(paths),)
        self.num_examples = len(paths)
        # Kept as tensors, because a million paths would not fit into a graph as constants.
        with tf.device("CPU:0"):
            self._paths = tf.constant(paths)
            self._labels = tf.constant(labels, tf.int32)

    def read(self, shards: tf.Tensor) -> tf.Tensor:
        """Reads whole shards; see `Shards.read`."""
        del shards  # There is only shard 0.
        return tf.as_string(tf.range(self.num_examples))

    def read_labels(self, records: tf.Tensor) -> tf.Tensor:
        """Returns the labels of records; see `Shards`."""
        return tf.gather(self._labels, tf.strings.to_number(records, tf.int32))

    def count_classes(self, num_classes: int) -> np.ndarray:
        """Returns the number of examples of each class, int64 [num_classes]."""
        return np.bincount(self._labels.numpy(), minlength=num_classes)

    def sample(self, count: int) -> "Files":
        """Returns at most `count` files, spread over the classes; see `spread_over_classes`."""
        labels = self._labels.numpy()
        chosen = spread_over_classes(labels, count)
        return Files(self._paths.numpy()[chosen].tolist(), labels[chosen].tolist())

    def read_one(self, shard: int, index: int) -> tuple[str, bytes]:
        """Reads one record; see `Shards.read_one`."""
        del shard
        return self._paths[index].numpy().decode(errors="backslashreplace"), str(index).encode()

    def parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Reads the file of a record; see `Shards.parse`."""
        index = tf.strings.to_number(record, tf.int32)
        return tf.io.read_file(tf.gather(self._paths, index)), tf.gather(self._labels, index)


Split = Arrays | Shards | Files


@dataclasses.dataclass(frozen=True)
class Source:
    """The classes of a data set and its two splits, both of the same kind.

    Attributes:
      class_names: names of the classes, in the order of the labels.
      train, validation: the splits.
      fingerprint: hashes that show whether a run resumes on the same data, with keys of
        FINGERPRINTS; empty for a set that is always the same.
    """

    class_names: tuple[str, ...]
    train: Split
    validation: Split
    fingerprint: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def description(self) -> "Description":
        """The sizes of the data set."""
        return Description(
            self.train.image_shape,
            len(self.class_names),
            self.train.num_examples,
            self.validation.num_examples,
        )


@dataclasses.dataclass(frozen=True)
class Description:
    """Sizes of a data set, known without reading its images or even having it.

    str() names the classes and the images of both splits on one line.

    Attributes:
      image_shape: (H, W, C); H and W are None if they differ between images.
      num_classes: number of classes.
      num_train_examples, num_validation_examples: None if unknown before the set is prepared.
    """

    image_shape: tuple[int | None, int | None, int]
    num_classes: int
    num_train_examples: int | None
    num_validation_examples: int | None

    def __str__(self) -> str:
        numbers = {"training": self.num_train_examples, "validation": self.num_validation_examples}
        images = [
            f"an unknown number of {split} images"
            if number is None
            else counted(number, f"{split} image")
            for split, number in numbers.items()
        ]
        return ", ".join([counted(self.num_classes, "class", "classes"), *images])


def spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Chooses examples of as many classes as possible; the choice depends on the labels alone.

    Each class contributes its first examples: one more or less than the others, unless it has no
    more. With fewer examples than classes, these are evenly spaced.

    Args:
      labels: integers [n], n >= 1.
      count: number of examples; at most n are chosen.

    Returns:
      Positions of the examples in ascending order of their labels, int64 [min(count, n)].
    """
    by_class = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    if count < len(starts):
        return by_class[starts[np.arange(count) * len(starts) // count]]
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)
    return by_class[np.sort(np.argsort(rank, kind="stable")[:count])]


def unknown_split(name: str, split: str, splits: Iterable[str]) -> UsageError:
    """Returns the error for a split that a data set does not have."""
    names = ", ".join(map(repr, splits))
    return UsageError(
        f"data set {name!r} has no split {split!r}: it has {names}; set data.train_split and"
        " data.validation_split"
    )
