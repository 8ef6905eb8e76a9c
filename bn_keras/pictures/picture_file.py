"""Saves figures as picture files."""

import os
import pathlib

from matplotlib.figure import Figure

from bn_keras.errors import UsageError
from bn_keras.runs.storage import writing
from bn_keras.text import first_line


def save_picture(figure: Figure, path: str | os.PathLike) -> None:
    """Saves a figure in the format given by the path's extension; creates missing folders.

    Raises:
      UsageError: the extension is unknown, or a parent of the path is not a folder.
      StorageError: the file cannot be written.
    """
    path = pathlib.Path(path)
    extensions = [f".{name}" for name in figure.canvas.get_supported_filetypes()]
    if path.suffix.lower() not in extensions:
        raise UsageError(
            f"picture {path} cannot be written: expected one of the extensions"
            f" {', '.join(extensions)}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"picture {path} cannot be written: {first_line(error)}") from None
    with writing(f"picture {path}"):
        figure.savefig(path, dpi=120)
