"""Progress bars on a terminal, and the progress of a run as a bar or as lines in a log."""

import multiprocessing
import shutil
import sys
import time

from absl import logging
from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


def log(line: str) -> None:
    """Logs a line about a run, or prints it where absl's log is silent.

    In a notebook or a script, nobody has set the level of the log.
    """
    if logging.get_verbosity() >= logging.INFO:
        logging.info("%s", line)
    else:
        print(line, file=sys.stderr, flush=True)


def progress_bar(
    label: str, total: int, *, unit: str = "", initial: int = 0, is_shown: bool = True
) -> tqdm:
    """Returns a bar for the terminal; without one, nothing is shown.

    Args:
      label: text before the bar.
      total: count at the end.
      unit: text after the counts, such as " images".
      initial: count at the start.
      is_shown: whether the bar is shown if there is a terminal.
    """
    return tqdm(
        desc=label,
        initial=initial,
        total=total,
        disable=not (is_shown and _is_on_terminal()),
        # On a narrow terminal, the bar shrinks before the text is cut.
        ncols=min(110, shutil.get_terminal_size().columns),
        bar_format=f"{{desc}}|{{bar}}|{{n_fmt}}/{{total_fmt}}{unit}, {{remaining}} left{{postfix}}",
    )


def _is_on_terminal() -> bool:
    # The bars of parallel processes would overwrite each other.
    return sys.stderr.isatty() and multiprocessing.parent_process() is None


class Progress:
    """A bar with step, loss, accuracy, images/s and time left; without a terminal, log lines.

    Args:
      label: name of the run.
      step: step at which the run starts or resumes.
      steps: last step.
    """

    def __init__(self, label: str, step: int, steps: int) -> None:
        self._label = label
        self._steps = steps
        self._validation = ""
        self._first_step = step
        self._began = self._last_line = 0.0
        self._on_terminal = _is_on_terminal()
        self._bar = progress_bar(label, steps, initial=step)

    def show_building(self) -> None:
        """Shows that the graph is being built."""
        self._bar.set_postfix_str("building the graph")
        if not self._on_terminal:
            log(f"{self._label}: building the graph")

    def start(self) -> None:
        """Starts the clock that the time left is estimated from."""
        self._bar.unpause()
        self._bar.start_t = self._bar.last_print_t = time.time()
        self._began = self._last_line = time.monotonic()

    def update(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Shows a step, with the means over the steps since the last update."""
        # Validation accuracy comes last: a narrow terminal cuts the end of the line.
        text = f"loss {loss:.4f}, accuracy {accuracy:.3f}, {images_per_second:.0f} images/s"
        text += self._validation
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        self._log(step, text)

    def set_validation_accuracy(self, accuracy: float) -> None:
        """Sets the validation accuracy that is shown from the next update on."""
        self._validation = f" (validation {accuracy:.3f})"

    def _log(self, step: int, text: str) -> None:
        now = time.monotonic()
        if self._on_terminal or (
            now - self._last_line < _SECONDS_BETWEEN_LINES and step < self._steps
        ):
            return
        self._last_line = now
        seconds_per_step = (now - self._began) / max(1, step - self._first_step)
        left = tqdm.format_interval(seconds_per_step * (self._steps - step))
        log(f"{self._label}: step {step}/{self._steps}, {left} left, {text}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
