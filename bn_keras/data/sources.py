"""Where examples come from: scikit-learn's digits, generated images, TFDS, a user's own files."""

import contextlib
import dataclasses
import difflib
import math
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from bn_keras.data.folder import Files, open_folder
from bn_keras.data.unreadable import first_line
from bn_keras.errors import UsageError

EMBEDDED = ("digits", "synthetic")

# Sets whose decoded images take more than this are read from their files as training goes on.
MEMORY_LIMIT_BYTES = 2**30
# A file that is cut short or damaged.
FEWER_RECORDS = "fewer readable records than there should be in"
# Read ahead of a file that is read as training goes on.
READ_BYTES = 2**20
# How long the server of a set that has to be downloaded may take to answer.
CONNECTION_SECONDS = 5

SYNTHETIC_POOL = 64
SYNTHETIC_CLASSES = 1000
# ImageNet's number of training examples.
SYNTHETIC_TRAIN_EXAMPLES = 1_281_167
SYNTHETIC_VALIDATION_EXAMPLES = 1_000

# Examples in the splits of the sets that configs/ has. TFDS knows them once a set is prepared.
_SIZES = {
    "imagenet2012": {"train": SYNTHETIC_TRAIN_EXAMPLES, "validation": 50_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "mnist": {"train": 60_000, "test": 10_000},
}


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A split held in memory.

    Attributes:
      images: uint8 [pool, H, W, C].
      labels: int32 [pool].
      white: the value of a fully lit pixel.
      num_examples: the pool repeats up to this number: example i is entry i mod pool.
    """

    images: np.ndarray
    labels: np.ndarray
    white: int = 255
    num_examples: int = 0

    def __post_init__(self):
        if not self.num_examples:
            object.__setattr__(self, "num_examples", len(self.labels))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.images.shape[1:]


@dataclasses.dataclass(frozen=True)
class Shards:
    """A split in TFRecord files, read as training goes on; the images stay encoded until used.

    A shard is a run of consecutive records of one file.

    Attributes:
      paths: of each shard's file.
      skips: records of the file before each shard.
      lengths: records in each shard.
      example_bytes: mean size of a record.
      image_shape: (H, W, C), where H and W are None if they differ between images.
      parse: a function of a record, a string tensor, to (encoded image, label), in TensorFlow;
        it fails where the label is not one of the classes.
    """

    paths: tuple[str, ...]
    skips: tuple[int, ...]
    lengths: tuple[int, ...]
    example_bytes: int
    image_shape: tuple[int | None, int | None, int]
    parse: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]

    @property
    def num_examples(self) -> int:
        """Records in all shards."""
        return sum(self.lengths)

    def read(self, shards: tf.Tensor) -> tf.Tensor:
        """Reads whole shards.

        Args:
          shards: their numbers, int64 [n].

        Returns:
          Their records, string [sum of their lengths], one shard after the other.
        """
        paths, skips, lengths = map(tf.constant, (self.paths, self.skips, self.lengths))

        def open_shard(shard: tf.Tensor) -> tf.data.Dataset:
            # What comes after damaged bytes in a file can't be read; the count tells.
            records = tf.data.TFRecordDataset(paths[shard], buffer_size=READ_BYTES).ignore_errors()
            return records.skip(tf.cast(skips, tf.int64)[shard]).take(
                tf.cast(lengths, tf.int64)[shard]
            )

        count = tf.reduce_sum(tf.gather(tf.cast(lengths, tf.int64), shards))
        records = tf.data.Dataset.from_tensor_slices(shards).flat_map(open_shard)
        # Where there is not even one record, the count tells as well.
        none = tf.data.Dataset.from_tensors(tf.constant([], tf.string))
        records = records.batch(count).concatenate(none).take(1).get_single_element()
        check = tf.debugging.Assert(
            tf.equal(tf.size(records, tf.int64), count),
            [FEWER_RECORDS, tf.gather(paths, shards)],
            summarize=-1,
        )
        # Before a gather can fail with an error that says less.
        with tf.control_dependencies([check]):
            return tf.identity(records)

    def read_one(self, shard: int, index: int) -> tuple[str, bytes]:
        """Reads one record of a shard.

        Returns:
          Its name, for people to find it by, and the record.
        """
        path, index = self.paths[shard], self.skips[shard] + index
        [record] = tf.data.TFRecordDataset(path).skip(index).take(1).as_numpy_iterator()
        features = tf.train.Example.FromString(record).features.feature
        place = f"record {index} of {path}"
        if not features["file_name"].bytes_list.value:
            return place, record
        return f"{features['file_name'].bytes_list.value[0].decode()} ({place})", record


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: its classes and the two splits that are used of it, both of the same kind."""

    class_names: tuple[str, ...]
    train: Arrays | Shards | Files
    validation: Arrays | Shards | Files


@dataclasses.dataclass(frozen=True)
class Description:
    """What can be told of a data set without reading, or even having it.

    Attributes:
      image_shape: (H, W, C), where H and W are None if they differ between images.
      num_classes: of the labels.
      num_train_examples, num_validation_examples: None where nobody knows before it is prepared.
    """

    image_shape: tuple[int | None, int | None, int]
    num_classes: int
    num_train_examples: int | None
    num_validation_examples: int | None


def describe(
    name: str, data_dir: str, train_split: str, validation_split: str, image_size: int
) -> Description:
    """Describes what `open_source` would open, without a download; a folder is listed.

    Raises:
      UsageError: as `open_source`, as far as that can be known.
    """
    if name in (*EMBEDDED, "folder"):
        source = open_source(name, data_dir, train_split, validation_split, image_size)
        splits = (source.train, source.validation)
        shape, num_classes = source.train.image_shape, len(source.class_names)
    else:
        builder = _find_builder(name, data_dir)
        image, label = _image_and_label(name, builder.info)
        features = builder.info.features
        shape, num_classes = features[image].shape, features[label].num_classes
        known = builder.info.splits or _known_splits(builder)
        names = (train_split, validation_split)
        splits = [known and _tfds_split(name, known, split) for split in names]
    return Description(shape, num_classes, *(split and split.num_examples for split in splits))


def stand_in(description: Description, image_size: int) -> Source:
    """Makes up a small source that looks like the one described, for a try without it.

    Args:
      description: of the set; where it has no number of examples, there are a few.
      image_size: side of the images where those of the set differ in size; 0 is one pixel.
    """
    *size, channels = description.image_shape
    shape = (*(side or image_size or 1 for side in size), channels)
    pool = _pool(shape, description.num_classes)
    return Source(
        _numbers(description.num_classes),
        Arrays(*pool, num_examples=description.num_train_examples or 0),
        Arrays(*pool, num_examples=description.num_validation_examples or 0),
    )


def locate(name: str, data_dir: str) -> str:
    """Says where a data set is, or what will become of it where it is not.

    Raises:
      UsageError: there is no such set, or data_dir is no folder.
    """
    if name == "digits":
        return "comes with scikit-learn"
    if name == "synthetic":
        return "made up"
    if name == "folder":
        return f"in {data_dir}"
    builder = _find_builder(name, data_dir)
    if builder.is_prepared():
        return f"prepared in {builder.data_dir}"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        by = "launch.prepare" if name == "imagenet2012" else "TFDS"
        return f"not there: {by} makes it from archives that you have to get"
    return f"not there: to be downloaded and prepared in {builder.data_dir}"


def open_source(
    name: str, data_dir: str, train_split: str, validation_split: str, image_size: int
) -> Source:
    """Opens a data set by name.

    What fits into MEMORY_LIMIT_BYTES is read at once, if all its images have one size.

    Args:
      name: "digits", "synthetic", "folder", or a TFDS name.
      data_dir: the folder of prepared TFDS sets, where "" is TFDS's own default; of "folder", the
        one with a folder for each split.
      train_split: its name; TFDS's slices ("train[:90%]") work for TFDS's sets, those in percent
        for "folder" too.
      validation_split: likewise.
      image_size: side of the images that "synthetic" generates; others ignore it.

    Raises:
      UsageError: there is no such set or split, or it has no images with labels.
    """
    if name == "digits":
        class_names, splits = tuple("0123456789"), _digits()
    elif name == "synthetic":
        class_names, splits = _synthetic(image_size)
    elif name == "folder":
        return Source(*open_folder(data_dir, train_split, validation_split))
    else:
        return _open_tfds(name, data_dir, train_split, validation_split)
    for split in (train_split, validation_split):
        if split not in splits:
            raise _unknown_split(name, split, splits)
    return Source(class_names, splits[train_split], splits[validation_split])


def _digits() -> dict[str, Arrays]:
    """Scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels.

    Of each class the 5th, 10th, 15th, ... example in scikit-learn's order is for validation.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        held_out[np.flatnonzero(labels == digit)[4::5]] = True
    return {
        "train": Arrays(images[~held_out], labels[~held_out], white=16),
        "validation": Arrays(images[held_out], labels[held_out], white=16),
    }


def _synthetic(image_size: int) -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """As many examples as ImageNet from a small pool; validation shows the same."""
    if image_size < 1:
        raise UsageError(
            f"data.image_size is {image_size}, but 'synthetic' images have no size of their own: "
            "give the side in pixels"
        )
    pool = _pool((image_size, image_size, 3), SYNTHETIC_CLASSES)
    return _numbers(SYNTHETIC_CLASSES), {
        "train": Arrays(*pool, num_examples=SYNTHETIC_TRAIN_EXAMPLES),
        "validation": Arrays(*pool, num_examples=SYNTHETIC_VALIDATION_EXAMPLES),
    }


def _pool(image_shape: tuple[int, int, int], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Coloured noise on a coarse grid, with labels that belong to it and so can be learned."""
    height, width, channels = image_shape
    random = np.random.default_rng(0)
    cells = (SYNTHETIC_POOL, math.ceil(height / 8), math.ceil(width / 8), channels)
    coarse = random.integers(0, 256, cells, np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    labels = np.arange(SYNTHETIC_POOL) * num_classes // SYNTHETIC_POOL
    return np.ascontiguousarray(images), labels.astype(np.int32)


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _open_tfds(name: str, data_dir: str, train_split: str, validation_split: str) -> Source:
    tfds.disable_progress_bar()
    builder = _prepared_builder(name, data_dir)
    image, label = _image_and_label(name, builder.info)
    names = (train_split, validation_split)
    splits = [_tfds_split(name, builder.info.splits, split) for split in names]
    height, width, channels = builder.info.features[image].shape
    decoded_bytes = sum(split.num_examples for split in splits) * math.prod(
        (height or 0, width or 0, channels)
    )
    class_names = tuple(builder.info.features[label].names)
    if 0 < decoded_bytes <= MEMORY_LIMIT_BYTES:
        try:
            return Source(
                class_names, *(_read_arrays(builder, split, image, label) for split in splits)
            )
        except tf.errors.InvalidArgumentError:
            # An image that can't be decoded. Read as training goes on, it is named and replaced.
            pass
    return Source(class_names, *(_list_shards(builder, split, image, label) for split in splits))


def _find_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    if data_dir and not tf.io.gfile.isdir(data_dir):
        raise UsageError(
            f"data.data_dir {data_dir!r} is not a folder: give the folder that holds the prepared "
            "TFDS sets, or '' for TFDS's default"
        )
    try:
        return tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError):
        raise _unknown_name(name) from None


def _prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of a set that is on disk, after preparing it where that is needed."""
    builder = _find_builder(name, data_dir)
    if not builder.is_prepared():
        if name == "imagenet2012":
            raise UsageError(
                f"data set {name!r} is not in {builder.data_dir}: set data.data_dir to the folder"
                " that holds it, or prepare it from its archives, by"
                " python -m launch.prepare --manual_dir=ARCHIVES --data_dir=FOLDER"
            )
        try:
            _check_reachable(builder)
            # It prints what it is about to do; standard output is for results.
            with contextlib.redirect_stdout(sys.stderr):
                builder.download_and_prepare()
        except Exception as error:
            raise UsageError(
                f"data set {name!r} is not in {builder.data_dir} and could not be prepared there "
                f"({first_line(error)}): set data.data_dir to a folder that holds it, or take "
                "'digits', which needs no download"
            ) from error
    return builder


def _check_reachable(builder: tfds.core.DatasetBuilder) -> None:
    """Raises OSError if a set's server can't be reached, which TFDS tries for minutes."""
    if urllib.request.getproxies() or builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return
    urls = map(urllib.parse.urlsplit, builder.url_infos)
    for host in sorted({url.hostname for url in urls if url.scheme in ("http", "https")}):
        try:
            socket.create_connection((host, 443), timeout=CONNECTION_SECONDS).close()
        except OSError as error:
            raise OSError(f"no connection to {host}: {error.strerror or error}") from error


def _image_and_label(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """The names of the set's image and label features."""
    features = info.features
    keys = tuple(info.supervised_keys or ("image", "label"))
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if len(keys) == 2 and all(
        isinstance(key, str) and key in features and isinstance(features[key], kind)
        for key, kind in zip(keys, kinds, strict=True)
    ):
        return keys
    raise UsageError(
        f"data set {name!r} has no image with a class label (its features: "
        f"{', '.join(features)}): take an image classification set"
    )


def _known_splits(builder: tfds.core.DatasetBuilder) -> tfds.core.splits.SplitDict | None:
    """The splits of a set that is not prepared, whose parts can be counted; None if unknown."""
    if builder.name not in _SIZES:
        return None
    return tfds.core.splits.SplitDict(
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[size],
            num_bytes=0,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=builder.data_path, dataset_name=builder.name, filetype_suffix="tfrecord"
            ),
        )
        for name, size in _SIZES[builder.name].items()
    )


def _tfds_split(name: str, splits: tfds.core.splits.SplitDict, split: str) -> tfds.core.SplitInfo:
    try:
        found = splits[split]
    except (KeyError, ValueError):
        raise _unknown_split(name, split, splits) from None
    if not found.num_examples:
        raise UsageError(f"split {split!r} of data set {name!r} is empty: take more of it")
    return found


def _list_shards(
    builder: tfds.core.DatasetBuilder, split: tfds.core.SplitInfo, image: str, label: str
) -> Shards:
    """A split as the files it lies in."""
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise UsageError(
            f"data set {builder.name!r} is stored as {builder.info.file_format.value}, too large "
            "to hold in memory: prepare it as tfrecord to stream it"
        )
    wanted = tfds.decode.PartialDecoding({image: True, label: True})
    features = wanted.extract_features(builder.info.features)

    classes = np.arange(builder.info.features[label].num_classes, dtype=np.int32)

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        example = features.deserialize_example(record, decoders={image: tfds.decode.SkipDecoding()})
        # On the CPU a gather fails where there is no such class.
        return example[image], tf.gather(classes, example[label])

    files = split.file_instructions
    num_records = sum(whole.num_examples for whole in builder.info.splits.values())
    return Shards(
        paths=tuple(file.filename for file in files),
        skips=tuple(file.skip for file in files),
        lengths=tuple(file.take for file in files),
        example_bytes=builder.info.dataset_size // num_records,
        image_shape=builder.info.features[image].shape,
        parse=parse,
    )


def _read_arrays(
    builder: tfds.core.DatasetBuilder, split: tfds.core.SplitInfo, image: str, label: str
) -> Arrays:
    """A whole split, in the order of its files."""
    examples = builder.as_dataset(split=split.name, shuffle_files=False, batch_size=-1)
    return Arrays(examples[image].numpy(), examples[label].numpy().astype(np.int32))


def _unknown_name(name: str) -> UsageError:
    known = [*EMBEDDED, "folder", *tfds.list_builders()]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return UsageError(
        f"unknown data set {name!r}: {hint}accepted are 'digits' and 'synthetic', which need no "
        "download, 'folder' for images of your own, and the names of TFDS's image classification "
        "sets"
    )


def _unknown_split(name: str, split: str, splits: Iterable[str]) -> UsageError:
    return UsageError(
        f"data set {name!r} has no split {split!r}: it has {', '.join(map(repr, splits))}"
    )
