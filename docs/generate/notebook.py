"""Writes a notebook from its script: runs all cells and keeps their output.

python docs/generate/notebook.py examples/tour.py
"""

import pathlib
import sys

import jupytext
import nbformat
from nbclient import NotebookClient


def main(script: str) -> None:
    """Writes SCRIPT with the extension .ipynb beside it; an error in a cell is raised."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number}"  # otherwise random
    NotebookClient(notebook, timeout=1800, record_timing=False).execute()
    for cell in notebook.cells:
        if "outputs" in cell:
            # TensorFlow logs to standard error whatever its log level.
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    del notebook.metadata["jupytext"]
    nbformat.write(notebook, pathlib.Path(script).with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1])
