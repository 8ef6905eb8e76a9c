"""A user's own images, in one folder per split and class."""

import hashlib
import os
import re
from collections.abc import Sequence

import tensorflow as tf
from absl import logging

from bn_keras.data.splits import Files, Source
from bn_keras.errors import UsageError
from bn_keras.text import counted, first_of

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")

_SPLIT = re.compile(r"(?P<folder>[^\[\]]+)(\[((?P<begin>\d+)%)?:((?P<end>\d+)%)?\])?")


def open_folder(root: str, train_split: str, validation_split: str) -> Source:
    """Lists the images in ROOT/SPLIT/CLASS and the folders below it.

    Decisions:
      - The classes are the sorted names of the class folders, which must be equal in both splits.
      - A split is the name of a folder in ROOT, or a percentage of it: "train[:90%]". Percentages
        apply to each class separately, in an order that depends only on the file names. "." is
        ROOT itself, so that ".[:90%]" and ".[90%:]" split ROOT/CLASS.
      - Files with an extension that is not in EXTENSIONS are ignored with a warning, hidden files
        without one.

    Args:
      root: folder in any file system that TensorFlow supports.
      train_split, validation_split: see above.

    Returns:
      The classes and the two splits.

    Raises:
      UsageError: a split is invalid, its folder is missing or has no classes, a class has no
        training images, the validation split is empty, or the splits differ in their classes.
    """
    if not root or not tf.io.gfile.isdir(root):
        raise UsageError(
            f"data.data_dir={root!r} is not a folder: expected one that holds images as"
            f" {train_split}/CLASS/IMAGE and {validation_split}/CLASS/IMAGE"
        )
    train, validation = (_list_images(root, split) for split in (train_split, validation_split))
    if train.keys() != validation.keys():
        only_train, only_validation = (
            _quote(sorted(a.keys() - b)) for a, b in ((train, validation), (validation, train))
        )
        raise UsageError(
            f"the class folders of {train_split!r} and {validation_split!r} in {root} differ: only"
            f" the first has {only_train}; only the second has {only_validation}"
        )
    empty = [name for name, paths in train.items() if not paths]
    if empty:
        raise UsageError(
            f"no training image in class folder {_quote(empty)} of {train_split!r} in {root}: add"
            f" images ({', '.join(EXTENSIONS)}), or remove the folder from both splits"
        )
    if not any(validation.values()):
        raise UsageError(
            f"{validation_split!r} in {root} has no image: add images, or choose a larger part"
        )
    return Source(tuple(train), _label_files(train), _label_files(validation))


def _label_files(images: dict[str, list[str]]) -> Files:
    labelled = [(path, label) for label, paths in enumerate(images.values()) for path in paths]
    return Files(*zip(*labelled, strict=True))


def _list_images(root: str, split: str) -> dict[str, list[str]]:
    """Returns the sorted paths of a split's images for each class."""
    match = _SPLIT.fullmatch(split)
    if not match:
        raise UsageError(
            f"split {split!r} is invalid: expected the name of a folder in {root}, or a percentage"
            " of it, such as 'train[:90%]'"
        )
    folder = os.path.join(root, match["folder"])
    if not tf.io.gfile.isdir(folder):
        folders = _list_folders(root)
        raise UsageError(
            f"no folder {match['folder']!r} in {root}, which has"
            f" {_quote(folders) if folders else 'no folders'}:"
            f" expected images as {match['folder']}/CLASS/IMAGE; if {root} holds the class folders"
            " themselves, set data.train_split='.[:90%]' and data.validation_split='.[90%:]'"
        )
    names = _list_folders(folder)
    if not names:
        raise UsageError(f"{folder} has no class folders: expected images as CLASS/IMAGE in it")
    images: dict[str, list[str]] = {}
    others: list[str] = []
    for name in names:
        paths, other_paths = _walk(os.path.join(folder, name))
        others += other_paths
        images[name] = _select_part(paths, match["begin"], match["end"])
    if others:
        logging.warning(
            "ignoring %s in %s with extensions other than %s: %s",
            counted(len(others), "file"),
            folder,
            ", ".join(EXTENSIONS),
            _quote(others),
        )
    return images


def _list_folders(folder: str) -> list[str]:
    """Returns the sorted names of the visible folders in a folder."""
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(folder))
    return sorted(
        name
        for name in names
        if not name.startswith(".") and tf.io.gfile.isdir(os.path.join(folder, name))
    )


def _walk(folder: str) -> tuple[list[str], list[str]]:
    """Returns the sorted paths of all images below a folder, and of all other visible files."""
    images: list[str] = []
    others: list[str] = []
    for parent, _, names in tf.io.gfile.walk(folder):
        for name in names:
            if not name.startswith("."):
                is_image = os.path.splitext(name)[1].lower() in EXTENSIONS
                (images if is_image else others).append(os.path.join(parent, name))
    return sorted(images), sorted(others)


def _select_part(paths: list[str], begin: str | None, end: str | None) -> list[str]:
    """Returns the part of a class between two percentages, sorted.

    The percentages refer to the order of the file names' hashes, so that a part does not consist of
    neighbouring names.
    """
    shuffled = sorted(
        paths, key=lambda path: hashlib.sha256(os.path.basename(path).encode()).digest()
    )
    first, last = (round(len(paths) * int(percent) / 100) for percent in (begin or 0, end or 100))
    return sorted(shuffled[first:last])


def _quote(names: Sequence[str]) -> str:
    return first_of([repr(name) for name in names], limit=5) or "none"
