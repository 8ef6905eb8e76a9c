"""Saves figures as picture files."""

import os
import warnings

from matplotlib.figure import Figure

from bn_keras.errors import UsageError
from bn_keras.storage import check_writable, replacing, writing


def save_picture(figure: Figure, path: str | os.PathLike) -> None:
    """Saves a figure in the format given by the path's extension; creates missing folders.

    The path may be in a bucket.

    Raises:
      UsageError: the extension is unknown, or a parent of the path is not a folder.
      StorageError: the file cannot be written.
    """
    check_picture(path)
    with (
        replacing(path) as unfinished,
        writing(f"picture {path}"),
        warnings.catch_warnings(),
    ):
        # Characters without a glyph, such as those of Chinese names, are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(unfinished, dpi=120)


def check_picture(path: str | os.PathLike) -> None:
    """Checks the path of a picture before any time is spent.

    Raises:
      UsageError: the extension names no format, or the path leads through a file.
      StorageError: permissions are missing.
    """
    extensions = [f".{name}" for name in Figure().canvas.get_supported_filetypes()]
    if os.path.splitext(path)[1].lower() not in extensions:
        raise UsageError(
            f"picture {path} is invalid: expected one of the extensions {', '.join(extensions)}"
        )
    check_writable(os.path.dirname(path), f"picture {path}")
