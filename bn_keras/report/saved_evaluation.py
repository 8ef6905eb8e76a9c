"""Evaluations that a report makes itself, saved until their runs change."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from bn_keras.storage import make_folder, read, write_atomically, writing


def evaluate_once(
    file: str | os.PathLike, made_of: Mapping[str, Any], evaluate: Callable[[], list[Any]]
) -> list[Any]:
    """Returns the rows of an evaluation, from a file if it was made of the same runs.

    Args:
      file: JSON file that the rows are saved in.
      made_of: identifies what is evaluated, and how; JSON values.
      evaluate: function that computes the rows, JSON values.

    Raises:
      StorageError: the file cannot be written.
    """
    path = epath.Path(file)
    saved = _read(path)
    if saved.get("made_of") == made_of:
        return saved["rows"]
    rows = evaluate()
    with writing(f"{path}"):
        make_folder(path.parent)
        text = json.dumps({"made_of": made_of, "rows": rows}, indent=2) + "\n"
        write_atomically(path, text)
    return rows


def _read(file: epath.Path) -> dict[str, Any]:
    try:
        saved = json.loads(read(file) or b"")
    except ValueError:
        return {}
    return saved if isinstance(saved, dict) and "rows" in saved else {}
