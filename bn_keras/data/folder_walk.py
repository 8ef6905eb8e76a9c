"""Lists the images below the class folders of a split; visits each real folder once."""

import collections
import os
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from bn_keras.storage import is_local

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")

# Folders that operating systems and archives add; they hold copies and thumbnails.
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
# Files of a run: such a folder is not a class, and its pictures are not examples.
_RUN_FILES = {"config.json", "metrics.jsonl"}


class Image(NamedTuple):
    """An image file.

    Attributes:
      path: path of the file.
      real_path: path without symbolic links, the same for all links to a file.
      size: size in bytes; -1 if unknown, as in a bucket.
    """

    path: str
    real_path: str
    size: int


class ClassFolder:
    """The contents of a class folder and of the folders below it.

    Attributes:
      images: image files.
      others: paths of other visible files.
      repeated: paths of links to folders that are listed elsewhere.
      runs: paths of folders of runs, which are not entered.
    """

    def __init__(self) -> None:
        self.images: list[Image] = []
        self.others: list[str] = []
        self.repeated: list[str] = []
        self.runs: list[str] = []


def is_hidden(name: str) -> bool:
    """Returns whether a file or a folder is hidden, or a system's own."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def walk_classes(folder: str, names: Sequence[str]) -> dict[str, ClassFolder]:
    """Lists class folders, each with all folders below it.

    Links are followed after all real folders, so that a link never takes images away from the class
    that they are in. A link to a folder that is listed elsewhere, or that contains the class
    folders, is not followed.

    Args:
      folder: folder of the class folders, in any file system that TensorFlow supports.
      names: names of the class folders.

    Returns:
      The contents by name, with images and others sorted by path.
    """
    found = {name: ClassFolder() for name in names}
    (_walk_local if is_local(folder) else _walk_bucket)(folder, found)
    for contents in found.values():
        contents.images.sort()
        contents.others.sort()
    return found


def _walk_local(folder: str, found: dict[str, ClassFolder]) -> None:
    real = os.path.realpath(folder)
    visited = {real}
    while real != os.path.dirname(real):
        real = os.path.dirname(real)
        visited.add(real)
    queue: collections.deque[tuple[str, str]] = collections.deque()
    for name in sorted(found, key=lambda name: os.path.islink(os.path.join(folder, name))):
        queue.append((name, os.path.join(folder, name)))
    while queue:
        name, path = queue.popleft()
        real = os.path.realpath(path)
        if real in visited:
            found[name].repeated.append(path)
            continue
        visited.add(real)
        with os.scandir(path) as opened:
            entries = [entry for entry in opened if not is_hidden(entry.name)]
        if {entry.name for entry in entries} >= _RUN_FILES:
            found[name].runs.append(path)
            continue
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.is_dir():
                _add_file(found[name], entry, real)
            elif entry.is_symlink():
                queue.append((name, entry.path))
            else:
                queue.appendleft((name, entry.path))


def _add_file(contents: ClassFolder, entry: os.DirEntry, real_folder: str) -> None:
    """Adds a file, or a link to one; a broken link counts as an unreadable image."""
    is_file = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    if not (is_file and is_image(entry.name)):
        contents.others.append(entry.path)
        return
    real_path = os.path.join(real_folder, entry.name)
    if entry.is_symlink():
        real_path = os.path.realpath(real_path)
    size = entry.stat().st_size if entry.is_file() else -1
    contents.images.append(Image(entry.path, real_path, size))


def _walk_bucket(folder: str, found: dict[str, ClassFolder]) -> None:
    for name, contents in found.items():
        top = os.path.join(folder, name)
        for parent, _, files in tf.io.gfile.walk(top):
            if any(map(is_hidden, parent[len(top) :].split("/"))):
                continue
            is_in_run = any(f"{parent}/".startswith(f"{run.rstrip('/')}/") for run in contents.runs)
            if is_in_run or _RUN_FILES <= set(files):
                contents.runs.append(parent)
                continue
            for file in files:
                path = os.path.join(parent, file)
                if is_hidden(file):
                    continue
                if is_image(file):
                    contents.images.append(Image(path, path, -1))
                else:
                    contents.others.append(path)


def is_image(name: str) -> bool:
    """Returns whether a file has the extension of an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS
