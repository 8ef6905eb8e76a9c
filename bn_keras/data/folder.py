"""A user's own images: one folder per split and class, or a CSV file of paths and labels."""

import filecmp
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence

from absl import logging

from bn_keras import storage
from bn_keras.data.folder_walk import (
    EXTENSIONS,
    Image,
    is_hidden,
    is_image,
    log_ignored,
    walk_classes,
)
from bn_keras.data.labels_file import read_labels
from bn_keras.data.splits import Files, Source
from bn_keras.errors import UsageError
from bn_keras.storage import is_local
from bn_keras.text import counted, quoted

_SPLIT = re.compile(r"(?P<folder>[^\[\]]+)(\[((?P<begin>\d+)%)?:((?P<end>\d+)%)?\])?")
# Names of folders that hold class folders.
_SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing", "eval")

# Files of equal name and size in both splits that are compared byte by byte, at most.
_MAX_COMPARED = 100
# Training images that one of them is compared with, at most.
_MAX_NAMESAKES = 10

# The images of each class.
Classes = dict[str, list[Image]]


def open_folder(root: str, train_split: str, validation_split: str) -> Source:
    """Lists the images in ROOT/SPLIT/CLASS and the folders below it, or those of a CSV file.

    Decisions:
      - The classes are the sorted names of the class folders, which must be equal in both splits.
        Different Unicode spellings of a name are one name.
      - A split is the name of a folder in ROOT, or a percentage of it: "train[:90%]". Percentages
        apply to each class separately, in an order that depends only on the file names. "." is
        ROOT itself, so that ".[:90%]" and ".[90%:]" split ROOT/CLASS.
      - A split may also be a CSV file in ROOT, "labels.csv" or "labels.csv[:90%]"; see
        `read_labels`.
      - Files with an extension that is not in EXTENSIONS are ignored with a warning, as are links
        to folders that are listed anyway and folders of runs; hidden files and folders without one.

    Args:
      root: folder in any file system that TensorFlow supports.
      train_split, validation_split: see above.

    Returns:
      The classes, the two splits and the fingerprint of their files.

    Raises:
      UsageError: a split is invalid, its folder is missing or has no classes, a class folder has no
        images, the validation split is empty, the splits differ in their classes, or a class name
        is not UTF-8 or has two spellings.
      StorageError: a folder cannot be listed.
    """
    if not storage.is_folder(root):
        layouts = dict.fromkeys(_layout(root, split) for split in (train_split, validation_split))
        raise UsageError(
            f"data.data_dir={root!r} is not a folder: expected one that holds images as"
            f" {' and '.join(layouts)}"
        )
    with storage.reading(root):
        train, validation = _list_splits(root, (train_split, validation_split))
    if train.keys() != validation.keys():
        extra = [
            f"only {split!r} has {quoted(sorted(own.keys() - others.keys()))}"
            for split, own, others in (
                (train_split, train, validation),
                (validation_split, validation, train),
            )
            if own.keys() - others.keys()
        ]
        raise UsageError(
            f"the classes of {train_split!r} and {validation_split!r} in {root} differ:"
            f" {'; '.join(extra)}: add the missing class folders, or remove the others"
        )
    # Where only validation images are needed, they take the place of the training images.
    is_trained = train_split != validation_split
    empty = [name for name, images in train.items() if not images]
    if empty and is_trained:
        raise UsageError(
            f"no training image in class folder {quoted(empty)} of {train_split!r} in {root}: add"
            f" images ({', '.join(EXTENSIONS)}), or remove the folder from both splits"
        )
    if not any(validation.values()):
        raise UsageError(
            f"{validation_split!r} in {root} has no image: add images, or choose a larger part"
        )
    _check_validation(root, validation_split, validation)
    if is_trained:
        _warn_of_overlap(train_split, train, validation_split, validation)
        _warn_of_repetitions(train_split, train)
    _warn_of_repetitions(validation_split, validation)
    fingerprint = _fingerprint(root, (train, validation))
    return Source(tuple(train), _label_files(train), _label_files(validation), fingerprint)


def _check_validation(root: str, split: str, validation: Classes) -> None:
    """Warns of classes without validation images, or raises UsageError for an empty folder."""
    absent = [name for name, images in validation.items() if not images]
    if not absent:
        return
    if _parse_split(root, split)["begin"] or _parse_split(root, split)["end"]:
        logging.warning(
            "%s leaves no validation image for %s: their accuracy is not measured",
            split,
            quoted(absent),
        )
        return
    raise UsageError(
        f"no validation image in class folder {quoted(absent)} of {split!r} in {root}: add images,"
        " or remove the folder from both splits"
    )


def _warn_of_overlap(
    train_split: str, train: Classes, validation_split: str, validation: Classes
) -> None:
    """Warns of validation images that are also training images, or copies of some."""
    trained = {image.real_path for images in train.values() for image in images}
    common = [i.path for images in validation.values() for i in images if i.real_path in trained]
    if common:
        logging.warning(
            "%s of %r %s also in %r, such as %r: validation accuracy will be higher than accuracy"
            " on new images",
            counted(len(common), "image"),
            validation_split,
            "is" if len(common) == 1 else "are",
            train_split,
            common[0],
        )
    else:
        _warn_of_copies(train_split, train, validation_split, validation)


def _warn_of_repetitions(split: str, classes: Classes) -> None:
    """Warns of files that a split lists twice, such as in two classes."""
    images = [image.real_path for image in itertools.chain(*classes.values())]
    repeated = len(images) - len(set(images))
    if repeated:
        logging.warning(
            "%r lists %s twice or more; each listing counts: remove the other copies or links",
            split,
            counted(repeated, "image"),
        )


def _warn_of_copies(
    train_split: str, train: Classes, validation_split: str, validation: Classes
) -> None:
    """Warns of validation images that are copies of training images.

    Only files of equal name and size are compared, and at most _MAX_COMPARED of them. Copying some
    training images is the usual mistake, and comparing all files would read all of them.
    """
    by_name: dict[tuple[str, int], list[Image]] = {}
    for image in itertools.chain(*train.values()):
        by_name.setdefault((os.path.basename(image.path), image.size), []).append(image)
    candidates = (
        (image, by_name[key])
        for image in itertools.chain(*validation.values())
        if image.size > 0 and (key := (os.path.basename(image.path), image.size)) in by_name
    )
    compared = list(itertools.islice(candidates, _MAX_COMPARED))
    copies = [
        image.path
        for image, others in compared
        if any(_have_equal_content(image, other) for other in others[:_MAX_NAMESAKES])
    ]
    if copies:
        logging.warning(
            "%d of %s with equal names and sizes in %r and %r are copies, such as %r: validation"
            " accuracy will be higher than accuracy on new images",
            len(copies),
            counted(len(compared), "file"),
            train_split,
            validation_split,
            copies[0],
        )


def _have_equal_content(image: Image, other: Image) -> bool:
    try:
        return filecmp.cmp(image.path, other.path, shallow=False)
    except OSError:
        # Reported when the image is used.
        return False


def _fingerprint(root: str, splits: Sequence[Classes]) -> dict[str, str]:
    """Returns hashes of the names and the sizes of all files, in order and by class.

    The sizes distinguish folders whose files have equal names. In a bucket they are unknown.
    """
    names, sizes = hashlib.sha256(), hashlib.sha256()
    are_known = True
    for split in splits:
        for label, images in enumerate(split.values()):
            for image in images:
                name = os.fsencode(os.path.relpath(image.path, root))
                names.update(b"%d %s\0" % (label, name))
                sizes.update(b"%d\0" % image.size)
                are_known &= image.size >= 0
        names.update(b"\0")
    known = {"file_names": names.hexdigest()}
    return known | {"file_sizes": sizes.hexdigest()} if are_known else known


def check_apart(root: str, splits: Iterable[str], folder: str) -> None:
    """Raises UsageError if a folder for other files, such as a workdir, holds images of a split.

    Args:
      root, splits: see `open_folder`.
      folder: path of the folder, which need not exist.
    """
    real = _real_path(folder)
    for split in splits:
        images = _real_path(storage.join(root, _parse_split(root, split)["folder"]))
        if real == images or (os.path.dirname(real) == images and _has_images(real)):
            raise UsageError(
                f"workdir {folder} is a folder of the images of {split!r}: use another, because a"
                " run's own files would be read as images"
            )


def _real_path(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path)) if is_local(path) else path.rstrip("/")


def _has_images(folder: str) -> bool:
    if is_local(folder):
        return os.path.isdir(folder) and any(map(is_image, os.listdir(folder)))
    return any(map(is_image, storage.list_bucket(folder)))


def _label_files(classes: Classes) -> Files:
    labelled = [
        (os.fsencode(image.path), label)
        for label, images in enumerate(classes.values())
        for image in images
    ]
    return Files(*zip(*labelled, strict=True))


def _parse_split(root: str, split: str) -> re.Match[str]:
    match = _SPLIT.fullmatch(split)
    if not match:
        raise UsageError(
            f"split {split!r} is invalid: expected the name of a folder in {root}, or a percentage"
            " of it, such as 'train[:90%]'"
        )
    begin, end = int(match["begin"] or 0), int(match["end"] or 100)
    if not begin < end <= 100:
        raise UsageError(
            f"split {split!r} is invalid: expected percentages from 0 to 100, the first below the"
            " second"
        )
    return match


def _layout(root: str, split: str) -> str:
    """Returns where the images of a split are in a folder, such as "train/CLASS/IMAGE"."""
    folder = _parse_split(root, split)["folder"]
    if folder.lower().endswith(".csv"):
        return f"the file {folder} lists them"
    return os.path.normpath(os.path.join(folder, "CLASS", "IMAGE"))


def _list_splits(root: str, splits: Sequence[str]) -> list[Classes]:
    """Returns the sorted images of each split by class, in the order of the class names."""
    # A folder is listed once, even if the splits are two parts of it.
    listed: dict[str, Classes] = {}
    parts = []
    for split in splits:
        match = _parse_split(root, split)
        folder = storage.join(root, match["folder"])
        if folder not in listed:
            listed[folder] = _list_images(root, split, folder)
        classes = listed[folder]
        parts.append(
            {
                name: _select_part(classes[name], match["begin"], match["end"])
                for name in sorted(classes)
            }
        )
    return parts


def _list_images(root: str, split: str, folder: str) -> Classes:
    """Returns the images by class in the folder, or in the CSV file, that a split names."""
    if folder.lower().endswith(".csv"):
        return read_labels(root, folder)
    return _list_classes(root, split, folder)


def _list_classes(root: str, split: str, folder: str) -> Classes:
    if not storage.is_folder(folder):
        folders = _list_folders(root)
        name = os.path.relpath(folder, root)
        raise UsageError(
            f"no folder {name!r} in {root}, which has"
            f" {quoted(folders) if folders else 'no folders'}:"
            f" expected images as {name}/CLASS/IMAGE; if {root} holds the class folders"
            " themselves, set data.train_split='.[:90%]' and data.validation_split='.[90%:]'"
        )
    names = _list_folders(folder)
    if not names:
        raise UsageError(f"{folder} has no class folders: expected images as CLASS/IMAGE in it")
    found = walk_classes(folder, names)
    classes: Classes = {}
    for name, contents in found.items():
        if contents.images or not contents.runs:
            spelling = _normalize(name, folder)
            if spelling in classes:
                raise UsageError(
                    f"{folder} has two class folders called {spelling!r} in different Unicode"
                    " spellings (NFC and NFD): merge them"
                )
            classes[spelling] = contents.images
    _check_no_splits(split, folder, classes, names)
    log_ignored(folder, found.values())
    repeated = [path for contents in found.values() for path in contents.repeated]
    same = [path for path in repeated if os.path.dirname(path) == folder.rstrip("/")]
    if same:
        raise UsageError(
            f"class folder {same[0]!r} is a link to another class folder or to a folder that"
            " contains it: remove the link"
        )
    return classes


def _check_no_splits(split: str, folder: str, classes: Iterable[str], names: Sequence[str]) -> None:
    """Raises UsageError if the class folders are splits: train, validation."""
    splits = [name for name in classes if name.lower() in _SPLIT_NAMES]
    if not splits or (len(splits) < 2 and len(names) > 1):
        return
    if all(_list_folders(os.path.join(folder, name)) for name in splits):
        raise UsageError(
            f"{folder} holds the splits {quoted(splits)}, not class folders, so {split!r} would"
            " make them the classes: set data.train_split and data.validation_split to their names"
        )


def _normalize(name: str, folder: str) -> str:
    """Returns the one spelling of a class name; raises UsageError if it is not UTF-8."""
    try:
        return unicodedata.normalize("NFC", os.fsencode(name).decode())
    except UnicodeDecodeError:
        raise UsageError(
            f"the name of class folder {name!r} in {folder} is not UTF-8: rename it"
        ) from None


def _list_folders(folder: str) -> list[str]:
    """Returns the sorted names of the visible folders in a folder."""
    if is_local(folder):
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))
    names = [name.rstrip("/") for name in storage.list_bucket(folder) if name.endswith("/")]
    return sorted(name for name in names if name and not is_hidden(name))


def _select_part(images: list[Image], begin: str | None, end: str | None) -> list[Image]:
    """Returns the part of a class between two percentages, sorted.

    The percentages refer to the order of the file names' hashes, so that a part does not consist of
    neighbouring names.
    """
    shuffled = sorted(
        images,
        key=lambda image: hashlib.sha256(os.fsencode(os.path.basename(image.path))).digest(),
    )
    first, last = (round(len(images) * int(percent) / 100) for percent in (begin or 0, end or 100))
    return sorted(shuffled[first:last])
