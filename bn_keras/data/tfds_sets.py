"""Image classification sets of TensorFlow Datasets (TFDS)."""

import contextlib
import difflib
import hashlib
import json
import math
import os
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from bn_keras.data.built_in import IMAGENET_TRAIN_EXAMPLES, NOT_IN_TFDS
from bn_keras.data.splits import Arrays, Description, Shards, Source, unknown_split
from bn_keras.errors import UsageError
from bn_keras.storage import is_folder, list_folder, reading, reason_of, reporting_outages
from bn_keras.text import counted, first_line, first_of

# Sets with more bytes of decoded images are read from their files during training.
MEMORY_LIMIT_BYTES = 2**30
# A split in files is rejected at the start if none of this many first records has a label.
_CHECKED_RECORDS = 16
# Timeout for connecting to the server from which a set is downloaded.
CONNECTION_SECONDS = 5

# Split sizes of the sets in configs/. TFDS knows them only after a set is prepared.
_SIZES = {
    "imagenet2012": {"train": IMAGENET_TRAIN_EXAMPLES, "validation": 50_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "mnist": {"train": 60_000, "test": 10_000},
}


def open_tfds(name: str, data_dir: str, train_split: str, validation_split: str) -> Source:
    """Opens a TFDS set, and downloads and prepares it if necessary.

    Sets of at most MEMORY_LIMIT_BYTES whose images have one size are read into memory.

    Args:
      name, data_dir, train_split, validation_split: see `open_source`.

    Raises:
      UsageError: see `open_source`.
      StorageError: data_dir is in a bucket that cannot be read.
    """
    tfds.disable_progress_bar()
    with reporting_outages(f"data set {name!r}"):
        builder = _prepare(name, data_dir)
        image, label = _find_image_and_label(name, builder.info)
        names = (train_split, validation_split)
        splits = [_find_split(name, builder.info.splits, split) for split in names]
        _check_complete(builder, splits)
        height, width, channels = builder.info.features[image].shape
        decoded_bytes = sum(split.num_examples for split in splits) * math.prod(
            (height or 0, width or 0, channels)
        )
        class_names = tuple(builder.info.features[label].names)
        if 0 < decoded_bytes <= MEMORY_LIMIT_BYTES:
            # Fails for an unreadable example; if read during training, it is named and replaced.
            with contextlib.suppress(tf.errors.InvalidArgumentError):
                arrays = [_read_arrays(builder, split, image, label) for split in splits]
                fingerprint = {"examples": _hash_examples(arrays)}
                return Source(class_names, arrays[0], arrays[1], fingerprint)
        shards = [_list_shards(builder, split, image, label) for split in splits]
        fingerprint = {"tfrecord_files": _hash_files(builder, shards)}
        return Source(class_names, shards[0], shards[1], fingerprint)


def describe_tfds(name: str, data_dir: str, train_split: str, validation_split: str) -> Description:
    """Describes a TFDS set without a download; see `sources.describe`."""
    builder = _find_builder(name, data_dir)
    image, label = _find_image_and_label(name, builder.info)
    features = builder.info.features
    known = builder.info.splits or _known_splits(builder)
    sizes = [
        _find_split(name, known, split).num_examples if known else None
        for split in (train_split, validation_split)
    ]
    return Description(features[image].shape, features[label].num_classes, *sizes)


def prepare_tfds(name: str, data_dir: str) -> None:
    """Downloads and prepares a TFDS set if necessary; see `sources.prepare`."""
    tfds.disable_progress_bar()
    with reporting_outages(f"data set {name!r}"):
        _prepare(name, data_dir)


def locate_tfds(name: str, data_dir: str) -> str:
    """Returns where a TFDS set is, or how it is obtained; see `sources.locate`."""
    builder = _find_builder(name, data_dir)
    if builder.is_prepared():
        return f"prepared in {builder.data_dir}"
    if name == "imagenet2012":
        return "not prepared; `bn-keras prepare` makes it from the official archives"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return "not prepared; TFDS makes it from archives that must be downloaded by hand"
    return f"not prepared; TFDS downloads it into {builder.data_dir} on first use"


def _find_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    if data_dir and not is_folder(data_dir):
        raise UsageError(
            f"data.data_dir={data_dir!r} is not a folder: expected the folder of prepared TFDS"
            " sets, or '' for TFDS's default"
        )
    with reporting_outages(f"data set {name!r}"):
        try:
            return tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
        except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError):
            raise _unknown_name(name) from None
        # TFDS raises many kinds of errors for damaged files.
        except Exception as error:
            raise UsageError(
                f"data set {name!r} in {data_dir or 'the default folder of TFDS'} cannot be opened"
                f" ({first_line(error)}): prepare it again"
            ) from error


def _prepare(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of a set, after preparing the set if necessary."""
    builder = _find_builder(name, data_dir)
    if builder.is_prepared():
        return builder
    if name == "imagenet2012":
        raise UsageError(
            f"data set {name!r} is not in {builder.data_dir}: set data.data_dir to the folder that"
            " holds it, or prepare it from its archives with"
            " bn-keras prepare --manual_dir=ARCHIVES --data_dir=FOLDER"
        )
    try:
        _check_reachable(builder)
        # TFDS prints its progress; standard output is for results.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    # TFDS raises many kinds of errors here.
    except Exception as error:
        # Another process may have prepared the set meanwhile, and left no place for this one's.
        prepared = _find_builder(name, data_dir)
        if prepared.is_prepared():
            return prepared
        raise UsageError(
            f"data set {name!r} is not in {builder.data_dir} and cannot be prepared there"
            f" ({first_line(error)}): set data.data_dir to a folder that holds it, or choose a"
            " config that needs no download, such as --config=digits_bn_x5"
        ) from error
    return builder


def _check_reachable(builder: tfds.core.DatasetBuilder) -> None:
    """Raises OSError if a server of the set is unreachable; TFDS would retry for minutes."""
    if urllib.request.getproxies() or builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return
    urls = [urllib.parse.urlsplit(url) for url in builder.url_infos or ()]
    ports = {"http": 80, "https": 443}
    servers = {(u.hostname, u.port or ports[u.scheme]) for u in urls if u.scheme in ports}
    for host, port in sorted(servers):
        try:
            socket.create_connection((host, port), timeout=CONNECTION_SECONDS).close()
        except OSError as error:
            raise OSError(f"no connection to {host}: {error.strerror or error}") from error


def _find_image_and_label(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Returns the names of the image feature and the label feature."""
    features = info.features
    keys = tuple(info.supervised_keys or ("image", "label"))
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if len(keys) == 2 and all(
        isinstance(key, str) and key in features and isinstance(features[key], kind)
        for key, kind in zip(keys, kinds, strict=True)
    ):
        _check_format(name, features[keys[0]])
        return keys
    raise UsageError(
        f"data set {name!r} has no image with a class label (its features: {', '.join(features)}):"
        " choose an image classification set"
    )


def _check_format(name: str, image: tfds.features.Image) -> None:
    """Raises UsageError for images that are stored in another form than the pipeline reads."""
    channels = image.shape[-1]
    if image.np_dtype != np.uint8 or channels not in (1, 3):
        raise UsageError(
            f"data set {name!r} has {np.dtype(image.np_dtype)} images with"
            f" {counted(channels, 'channel')}: expected uint8 images with 1 or 3 channels; choose"
            " another data set"
        )


def _known_splits(builder: tfds.core.DatasetBuilder) -> tfds.core.splits.SplitDict | None:
    """Returns the splits of an unprepared set, with their sizes; None if they are unknown."""
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


def _find_split(name: str, splits: tfds.core.splits.SplitDict, split: str) -> tfds.core.SplitInfo:
    try:
        found = splits[split]
    except (KeyError, ValueError):
        raise unknown_split(name, split, splits) from None
    if not found.num_examples:
        raise UsageError(f"split {split!r} of data set {name!r} is empty: choose a larger part")
    return found


def _check_complete(
    builder: tfds.core.DatasetBuilder, splits: Sequence[tfds.core.SplitInfo]
) -> None:
    """Raises UsageError if files of the splits are missing, as after an incomplete copy.

    Reading them would never end: readers skip what cannot be read.
    """
    paths = [str(file.filename) for split in splits for file in split.file_instructions]
    present = {folder: set(list_folder(folder)) for folder in set(map(os.path.dirname, paths))}
    missing = [p for p in paths if os.path.basename(p) not in present[os.path.dirname(p)]]
    if missing:
        names = [os.path.basename(path) for path in missing]
        raise UsageError(
            f"data set {builder.name!r} in {builder.data_dir} lacks {len(missing):,} of"
            f" {counted(len(paths), 'file')} ({first_of(names)}): prepare the data set again, or"
            " copy them"
        )


def _list_shards(
    builder: tfds.core.DatasetBuilder, split: tfds.core.SplitInfo, image: str, label: str
) -> Shards:
    """Returns a split as the shards of its TFRecord files."""
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise UsageError(
            f"data set {builder.name!r} is stored as {builder.info.file_format.value}, but a set"
            " that is not read into memory must be stored as tfrecord: prepare it in that format"
        )
    wanted = tfds.decode.PartialDecoding({image: True, label: True})
    features = wanted.extract_features(builder.info.features)
    classes = np.arange(builder.info.features[label].num_classes, dtype=np.int32)

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        example = features.deserialize_example(record, decoders={image: tfds.decode.SkipDecoding()})
        # On the CPU, gather fails for a label that is not a class.
        return example[image], tf.gather(classes, example[label])

    def read_labels(records: tf.Tensor) -> tf.Tensor:
        feature = tf.io.FixedLenFeature([], tf.int64)
        labels = tf.io.parse_example(records, {label: feature})[label]
        return tf.where((labels >= 0) & (labels < len(classes)), labels, -1)

    files = split.file_instructions
    shards = Shards(
        paths=tuple(file.filename for file in files),
        skips=tuple(file.skip for file in files),
        lengths=tuple(file.take for file in files),
        example_bytes=_mean_record_bytes(builder, split),
        image_shape=builder.info.features[image].shape,
        parse=parse,
        read_labels=read_labels,
    )
    _check_labelled(builder, split, _first_labels(shards) >= 0)
    return shards


def _first_labels(shards: Shards) -> np.ndarray:
    """Returns the labels of the first records; reading all records would take too long."""
    count = min(_CHECKED_RECORDS, shards.lengths[0])
    records = tf.data.TFRecordDataset(shards.paths[0]).skip(shards.skips[0]).take(count)
    # A damaged file or record is reported, or replaced, when it is used.
    damages = (tf.errors.DataLossError, tf.errors.InvalidArgumentError)
    with reading(shards.paths[0]), contextlib.suppress(*damages):
        for batch in records.batch(count):
            return shards.read_labels(batch).numpy()
    return np.zeros(count, np.int32)


def _mean_record_bytes(builder: tfds.core.DatasetBuilder, split: tfds.core.SplitInfo) -> int:
    """Returns the mean size of a record of the set, or of the split's files if it is unknown."""
    files = split.file_instructions
    num_bytes = builder.info.dataset_size
    num_records = sum(whole.num_examples for whole in builder.info.splits.values())
    if not num_bytes:
        num_bytes = sum(tf.io.gfile.stat(file.filename).length for file in files)
        num_records = sum(file.examples_in_shard for file in files)
    return max(1, num_bytes // num_records)


def _read_arrays(
    builder: tfds.core.DatasetBuilder, split: tfds.core.SplitInfo, image: str, label: str
) -> Arrays:
    """Reads a whole split into memory, in the order of its files.

    Raises:
      tf.errors.InvalidArgumentError: an image cannot be decoded, or a label is not a class.
    """
    try:
        examples = builder.as_dataset(split=split.name, shuffle_files=False, batch_size=-1)
    except tf.errors.DataLossError as error:
        raise UsageError(
            f"a file of data set {builder.name!r} in {builder.data_dir} is damaged"
            f" ({reason_of(error)}): prepare the data set again"
        ) from None
    labels = examples[label].numpy().astype(np.int32)
    is_class = (labels >= 0) & (labels < builder.info.features[label].num_classes)
    _check_labelled(builder, split, is_class)
    if not is_class.all():
        raise tf.errors.InvalidArgumentError(None, None, "a label is not a class")
    return Arrays(examples[image].numpy(), labels)


def _check_labelled(
    builder: tfds.core.DatasetBuilder, split: tfds.core.SplitInfo, is_class: np.ndarray
) -> None:
    """Raises UsageError if no label is a class: TFDS stores hidden labels as -1."""
    if not is_class.any():
        raise UsageError(
            f"split {split.name!r} of data set {builder.name!r} has no labels: set"
            " data.train_split and data.validation_split to splits with labels"
        )


def _hash_examples(splits: Sequence[Arrays]) -> str:
    """Returns a hash of all images and labels, in a fiftieth of the time for reading them."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.images.data)
        digest.update(split.labels.data)
    return digest.hexdigest()


def _hash_files(builder: tfds.core.DatasetBuilder, splits: Sequence[Shards]) -> str:
    """Returns a hash of the version and the sizes of a set, from its metadata.

    It covers all splits, because the order of the examples depends on the mean size of all records.
    """
    whole = {
        name: (split.shard_lengths, int(split.num_bytes))
        for name, split in builder.info.splits.items()
    }
    record_bytes = [split.example_bytes for split in splits]
    description = json.dumps([builder.info.full_name, whole, record_bytes], sort_keys=True)
    return hashlib.sha256(description.encode()).hexdigest()


def _unknown_name(name: str) -> UsageError:
    close = difflib.get_close_matches(name, [*NOT_IN_TFDS, *tfds.list_builders()], n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return UsageError(
        f"unknown data set {name!r}: {hint}expected 'digits' or 'synthetic' (no download),"
        " 'folder' (your own images), or the name of an image classification set in TFDS"
    )
