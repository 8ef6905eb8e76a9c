"""Lists the images below the class folders of a split; visits each real folder once."""

import collections
import functools
import itertools
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from absl import logging

from bn_keras.storage import in_parallel, is_local, list_bucket
from bn_keras.text import counted, quoted

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp")

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
    real = pathlib.Path(os.path.realpath(folder))
    _walk({os.path.join(folder, name): found[name] for name in names}, (real, *real.parents))
    return found


def walk_folder(folder: str) -> ClassFolder:
    """Lists a folder with all folders below it; see `walk_classes`."""
    contents = ClassFolder()
    _walk({folder: contents}, pathlib.Path(os.path.realpath(folder)).parents)
    return contents


def log_ignored(folder: str, contents: Iterable[ClassFolder]) -> None:
    """Warns of what the listing of a folder has left out."""
    contents = list(contents)
    extensions = ", ".join(EXTENSIONS)
    for noun, reason, paths in (
        ("file", f"with extensions other than {extensions}", [c.others for c in contents]),
        ("folder", "(runs)", [c.runs for c in contents]),
        ("link", "(folders listed elsewhere)", [c.repeated for c in contents]),
    ):
        ignored = list(itertools.chain(*paths))
        if ignored:
            what = counted(len(ignored), noun)
            logging.warning("ignoring %s in %s %s: %s", what, folder, reason, quoted(ignored))


def _walk(found: Mapping[str, ClassFolder], containing: Iterable[pathlib.Path]) -> None:
    """Lists folders of one file system.

    Args:
      found: receives the contents, by path.
      containing: real paths of the local folders that contain them; ignored in a bucket.
    """
    if all(map(is_local, found)):
        _walk_local(found, set(map(str, containing)))
    else:
        in_parallel(
            functools.partial(_walk_bucket, os.path.join(top, ""), contents)
            for top, contents in found.items()
        )
    for contents in found.values():
        contents.images.sort()
        contents.others.sort()


def _walk_local(found: Mapping[str, ClassFolder], visited: set[str]) -> None:
    """Lists local folders; does not enter a folder whose real path is in `visited`."""
    queue = collections.deque((found[top], top) for top in sorted(found, key=os.path.islink))
    while queue:
        contents, path = queue.popleft()
        real = os.path.realpath(path)
        if real in visited:
            contents.repeated.append(path)
            continue
        visited.add(real)
        with os.scandir(path) as opened:
            entries = [entry for entry in opened if not is_hidden(entry.name)]
        if {entry.name for entry in entries} >= _RUN_FILES:
            contents.runs.append(path)
            continue
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.is_dir():
                _add_file(contents, entry, real)
            elif entry.is_symlink():
                queue.append((contents, entry.path))
            else:
                queue.appendleft((contents, entry.path))


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


def _walk_bucket(folder: str, contents: ClassFolder) -> None:
    """Lists a folder of a bucket, whose path ends in "/"."""
    names = [name for name in list_bucket(folder) if not is_hidden(name.rstrip("/"))]
    if _RUN_FILES <= set(names):
        contents.runs.append(folder)
        return
    for name in names:
        path = folder + name
        if name.endswith("/"):
            _walk_bucket(path, contents)
        elif is_image(name):
            # Listings have no sizes; asking for them would take a request per image.
            contents.images.append(Image(path, path, -1))
        else:
            contents.others.append(path)


def is_image(name: str) -> bool:
    """Returns whether a file has the extension of an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS
