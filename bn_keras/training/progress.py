"""The progress of a run: a bar on a terminal, lines in a log."""

import multiprocessing
import shutil
import sys
import time

from absl import logging
from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar with step, loss, accuracy, images/s and time left; without a terminal, log lines.

    Args:
      label: name of the run.
      step: first step.
      steps: last step.
    """

    def __init__(self, label: str, step: int, steps: int) -> None:
        self._label = label
        self._steps = steps
        self._validation = ""
        self._first_step = step
        self._began = self._last_line = 0.0
        # The bars of processes side by side would overwrite each other.
        self._terminal = sys.stderr.isatty() and multiprocessing.parent_process() is None
        self._bar = tqdm(
            desc=label,
            initial=step,
            total=steps,
            disable=not self._terminal,
            # The bar fills what the text leaves, so that a narrow terminal loses the bar first.
            ncols=min(110, shutil.get_terminal_size().columns),
            bar_format="{desc}|{bar}|{n_fmt}/{total_fmt}, {remaining} left{postfix}",
        )

    def building(self) -> None:
        """Shows that the graph is being built."""
        self._bar.set_postfix_str("building the graph")
        if not self._terminal:
            logging.info("%s: building the graph", self._label)

    def start(self) -> None:
        """Starts the clock that the time left is estimated from."""
        self._bar.unpause()
        self._bar.start_t = self._bar.last_print_t = time.time()
        self._began = self._last_line = time.monotonic()

    def update(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Shows a step, with the means over the steps since the last update."""
        # The validation comes last: a narrow terminal cuts the end of the line.
        text = f"loss {loss:.4f}, accuracy {accuracy:.3f}, {images_per_second:.0f} images/s"
        text += self._validation
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        self._log(step, text)

    def evaluated(self, accuracy: float) -> None:
        """Shows the accuracy of the last evaluation from the next update on."""
        self._validation = f" (validation {accuracy:.3f})"

    def _log(self, step: int, text: str) -> None:
        now = time.monotonic()
        if self._terminal or (
            now - self._last_line < _SECONDS_BETWEEN_LINES and step < self._steps
        ):
            return
        self._last_line = now
        pace = (now - self._began) / max(1, step - self._first_step)
        left = tqdm.format_interval(pace * (self._steps - step))
        logging.info("%s: step %d/%d, %s left, %s", self._label, step, self._steps, left, text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
