"""Saves figures as picture files."""

import os
import warnings

from matplotlib.figure import Figure

from bn_keras.errors import UsageError
from bn_keras.storage import is_local, make_folder, replacing, writing
from bn_keras.text import first_line


def save_picture(figure: Figure, path: str | os.PathLike) -> None:
    """Saves a figure in the format given by the path's extension; creates missing folders.

    The path may be in a bucket.

    Raises:
      UsageError: the extension is unknown, or a parent of the path is not a folder.
      StorageError: the file cannot be written.
    """
    extension = os.path.splitext(path)[1]
    extensions = [f".{name}" for name in figure.canvas.get_supported_filetypes()]
    if extension.lower() not in extensions:
        raise UsageError(
            f"picture {path} cannot be written: expected one of the extensions"
            f" {', '.join(extensions)}"
        )
    try:
        make_folder(os.path.dirname(os.path.abspath(path)) if is_local(path) else path)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"picture {path} cannot be written: {first_line(error)}") from None
    with (
        replacing(path) as unfinished,
        writing(f"picture {path}"),
        warnings.catch_warnings(),
    ):
        # Characters without a glyph, such as those of Chinese names, are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(unfinished, dpi=120)
