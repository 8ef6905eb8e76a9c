"""Writing of figures to picture files."""

import os
import pathlib

from matplotlib.figure import Figure

from bn_keras.errors import UsageError
from bn_keras.runs.atomic_files import writing
from bn_keras.text import first_line


def save_picture(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure in the format of the path's extension; creates missing folders.

    Raises:
      UsageError: an unknown extension, or a path at which there cannot be a file.
      StorageError: the file cannot be written.
    """
    path = pathlib.Path(path)
    extensions = [f".{name}" for name in figure.canvas.get_supported_filetypes()]
    if path.suffix.lower() not in extensions:
        raise UsageError(
            f"picture {path} cannot be written: expected an extension of {', '.join(extensions)}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"picture {path} cannot be written: {first_line(error)}") from None
    with writing(f"picture {path}"):
        figure.savefig(path, dpi=120)
