"""Labels of images from a CSV file."""

import contextlib
import csv
import functools
import io
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator

from bn_keras import storage
from bn_keras.data.folder_walk import Image
from bn_keras.errors import UsageError
from bn_keras.storage import is_local
from bn_keras.text import first_of

_DELIMITERS = ",;\t"
# Rows from which the delimiter is recognized.
_NUM_EXAMINED_ROWS = 1_000
# First row of a file that names its columns.
_HEADERS = (
    ("path", "file", "filename", "file_name", "image"),
    ("label", "class", "category", "target"),
)


def read_labels(root: str, file: str) -> dict[str, list[Image]]:
    """Reads the images of each class from a CSV file with rows PATH,LABEL.

    The columns are separated by commas, semicolons or tabs; a first row such as "path,label" is
    skipped. Labels are class names, even if they look like numbers.

    Args:
      root: folder that relative paths start from.
      file: path of the CSV file, in UTF-8.

    Returns:
      The images by label, each list sorted by path.

    Raises:
      UsageError: the file is missing, is not UTF-8, or has a row that is not a path and a label, or
        an image that does not exist or has two labels.
    """
    text = storage.read_text(file, "labels file", "a CSV file with rows PATH,LABEL")
    delimiter = max(_DELIMITERS, key=functools.partial(_count_pairs, text))
    labels: dict[str, str] = {}
    # The path as it is written, the path and the label of each row.
    rows: list[tuple[str, str, str]] = []
    is_first = True
    for number, row in _read_rows(text, delimiter, file):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        may_be_header, is_first = is_first, False
        if may_be_header and _is_header(cells):
            continue
        if len(cells) != 2 or not all(cells):
            raise UsageError(
                f"line {number} of {file} is invalid ({delimiter.join(row)!r}): expected a path and"
                " a label"
            )
        path, label = storage.join(root, cells[0]), unicodedata.normalize("NFC", cells[1])
        if is_local(path):
            # "./a.png" is the same file as "a.png".
            path = os.path.normpath(path)
        if labels.setdefault(path, label) != label:
            raise UsageError(
                f"{cells[0]!r} has the labels {labels[path]!r} and {label!r} in {file}: remove one"
                " of its rows"
            )
        rows.append((cells[0], path, label))
    files = _find_files(labels)
    missing = [repr(written) for written, path, _ in rows if path not in files]
    if missing:
        raise UsageError(
            f"{len(missing):,} of the images in {file} do not exist below {root}:"
            f" {first_of(missing)}; correct the paths, or remove their rows"
        )
    if not rows:
        raise UsageError(f"labels file {file} is empty: expected rows PATH,LABEL")
    classes: dict[str, list[Image]] = {}
    for _, path, label in rows:
        classes.setdefault(label, []).append(files[path])
    return {label: sorted(images) for label, images in classes.items()}


def _count_pairs(text: str, delimiter: str) -> int:
    """Returns how many of the first rows are a path and a label if a delimiter separates them."""
    count = 0
    with contextlib.suppress(UsageError):
        for _, row in itertools.islice(_read_rows(text, delimiter, ""), _NUM_EXAMINED_ROWS):
            count += len(row) == 2 and all(cell.strip() for cell in row)
    return count


def _find_files(paths: Iterable[str]) -> dict[str, Image]:
    """Returns the files among paths, by path.

    In a bucket, their folders are listed: a request per file would take hours for large sets.
    """
    found: dict[str, Image] = {}
    folders: dict[str, set[str]] = {}
    for path in paths:
        if not is_local(path):
            folder, _, name = path.rpartition("/")
            folders.setdefault(f"{folder}/", set()).add(name)
        elif os.path.isfile(path):
            found[path] = Image(path, os.path.realpath(path), os.path.getsize(path))

    def add_files(folder: str, names: set[str]) -> None:
        for name in names.intersection(storage.list_bucket(folder)):
            found[folder + name] = Image(folder + name, folder + name, -1)

    storage.in_parallel(functools.partial(add_files, *item) for item in folders.items())
    return found


def _read_rows(text: str, delimiter: str, file: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of a line and its cells."""
    # newline="": a quoted name may contain newlines. strict: by default, a quotation mark that is
    # never closed swallows all further lines. skipinitialspace: a space before a quotation mark
    # does not make the mark a part of the name.
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(
            f"line {reader.line_num} of {file} is invalid ({error}): check its quotation marks"
        ) from None


def _is_header(cells: list[str]) -> bool:
    names = [cell.lower() for cell in cells]
    return len(names) == 2 and all(n in known for n, known in zip(names, _HEADERS, strict=True))
