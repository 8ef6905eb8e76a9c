"""A user's own images: a folder for each split, in it one for each class."""

import hashlib
import os
import re
from collections.abc import Sequence

import tensorflow as tf
from absl import logging

from bn_keras.errors import UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")

_SPLIT = re.compile(r"(?P<folder>[^\[\]]+)(\[((?P<begin>\d+)%)?:((?P<end>\d+)%)?\])?")


class Files:
    """A split of single files, read as training goes on: like one shard, whose records are numbers.

    So all its records are at hand at once, to be permuted and to be started at anywhere.

    Args:
      paths: of the files.
      labels: of each of them.
    """

    image_shape = (None, None, 3)
    # Of a record, roughly.
    example_bytes = 32

    def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.lengths = (len(paths),)
        self.num_examples = len(paths)
        # Outside of any graph, which a million paths would make a large one.
        with tf.device("CPU:0"):
            self._paths = tf.constant(paths)
            self._labels = tf.constant(labels, tf.int32)

    def read(self, shards: tf.Tensor) -> tf.Tensor:
        """As Shards.read; there is only shard 0."""
        del shards
        return tf.as_string(tf.range(self.num_examples))

    def read_one(self, shard: int, index: int) -> tuple[str, bytes]:
        """As Shards.read_one."""
        del shard
        return self._paths[index].numpy().decode(), str(index).encode()

    def parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """As Shards.parse."""
        index = tf.strings.to_number(record, tf.int32)
        return tf.io.read_file(tf.gather(self._paths, index)), tf.gather(self._labels, index)


def open_folder(
    root: str, train_split: str, validation_split: str
) -> tuple[tuple[str, ...], Files, Files]:
    """Lists images that lie in ROOT/SPLIT/CLASS, however deep below it.

    Decisions:
      - The classes are the sorted names of their folders, the same ones in both splits.
      - A split is the name of a folder in ROOT, or a part of one in percent: "train[:90%]". It is
        taken of each class by itself, in an order that follows from the files' names alone. "." is
        ROOT itself, so that ".[:90%]" and ".[90%:]" split ROOT/CLASS.
      - Files of other extensions are left out with a warning, hidden ones without.

    Args:
      root: the folder, of any file system that TensorFlow knows.
      train_split, validation_split: as above.

    Returns:
      The names of the classes, and the two splits.

    Raises:
      UsageError: a folder isn't there or has no classes, a class has no images to train on, or
        the classes of the splits differ.
    """
    if not root or not tf.io.gfile.isdir(root):
        raise UsageError(
            f"data.data_dir {root!r} is not a folder: give the one that holds your images as"
            f" {train_split}/CLASS/IMAGE and {validation_split}/CLASS/IMAGE"
        )
    train, validation = (_list_images(root, split) for split in (train_split, validation_split))
    if train.keys() != validation.keys():
        only = [_some(sorted(a.keys() - b)) for a, b in ((train, validation), (validation, train))]
        raise UsageError(
            f"the class folders of {train_split!r} and {validation_split!r} in {root} differ: the"
            f" first alone has {only[0]}, the second alone {only[1]}"
        )
    empty = [name for name, paths in train.items() if not paths]
    if empty:
        raise UsageError(
            f"no image to train on in class folder {_some(empty)} of {train_split!r} in {root}: add"
            f" some ({', '.join(EXTENSIONS)}), or remove the folder from both splits"
        )
    if not any(validation.values()):
        raise UsageError(f"{validation_split!r} in {root} has no image: add some, or take more")
    return tuple(train), _files(train), _files(validation)


def _files(images: dict[str, list[str]]) -> Files:
    labelled = [(path, label) for label, paths in enumerate(images.values()) for path in paths]
    return Files(*zip(*labelled, strict=True))


def _list_images(root: str, split: str) -> dict[str, list[str]]:
    """The paths of a split's images by class, all sorted."""
    parts = _SPLIT.fullmatch(split)
    if not parts:
        raise UsageError(
            f"split {split!r} can't be read: for 'folder' it is the name of a folder in {root}, or"
            " a part of one in percent, such as 'train[:90%]'"
        )
    folder = os.path.join(root, parts["folder"])
    if not tf.io.gfile.isdir(folder):
        raise UsageError(
            f"no folder {parts['folder']!r} in {root}, which holds {_some(_folders(root))}: images"
            f" are expected as {parts['folder']}/CLASS/IMAGE; if {root} holds the class folders"
            " themselves, set data.train_split='.[:90%]' and data.validation_split='.[90%:]'"
        )
    names = _folders(folder)
    if not names:
        raise UsageError(
            f"{folder} holds no class folders: images are expected as CLASS/IMAGE in it"
        )
    found, others = {}, []
    for name in names:
        images, more = _walk(os.path.join(folder, name))
        others += more
        found[name] = _part(images, parts["begin"], parts["end"])
    if others:
        logging.warning(
            "%d file(s) in %s are left out, being no %s: %s",
            len(others),
            folder,
            ", ".join(EXTENSIONS),
            _some(others),
        )
    return found


def _folders(folder: str) -> list[str]:
    """The names of the folders in a folder, sorted."""
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(folder))
    return sorted(
        name
        for name in names
        if not name.startswith(".") and tf.io.gfile.isdir(os.path.join(folder, name))
    )


def _walk(folder: str) -> tuple[list[str], list[str]]:
    """The paths of all images below a folder, and of what else is there."""
    images, others = [], []
    for parent, _, names in tf.io.gfile.walk(folder):
        for name in names:
            if not name.startswith("."):
                is_image = os.path.splitext(name)[1].lower() in EXTENSIONS
                (images if is_image else others).append(os.path.join(parent, name))
    return sorted(images), sorted(others)


def _part(paths: list[str], begin: str | None, end: str | None) -> list[str]:
    """From `begin` to `end` percent of a class, where no neighbours by name stay together."""
    shuffled = sorted(
        paths, key=lambda path: hashlib.sha256(os.path.basename(path).encode()).digest()
    )
    first, last = (round(len(paths) * int(part) / 100) for part in (begin or 0, end or 100))
    return sorted(shuffled[first:last])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "nothing"
