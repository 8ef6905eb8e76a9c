"""Writes the metrics of a run: lines of metrics.jsonl, and TensorBoard events."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from typing import IO, Any

import tensorflow as tf

from bn_keras.errors import StorageError
from bn_keras.runs.atomic_files import writing
from bn_keras.runs.workdir import Metrics, Workdir

__all__ = ["Metrics", "MetricsWriter"]


class MetricsWriter:
    """Appends metrics to a run's metrics.jsonl and to its TensorBoard events.

    Args:
      workdir: folder of the run, already created.
      global_batch_size: examples per step.

    Raises:
      StorageError: the files cannot be written; every method can raise it.
    """

    def __init__(self, workdir: Workdir, global_batch_size: int) -> None:
        self._workdir = workdir
        self._global_batch_size = global_batch_size
        self._lines: IO[str]
        with self._writing():
            if workdir.writes:
                self._events = tf.summary.create_file_writer(os.fspath(workdir.path))
                self._lines = workdir.metrics.open("a")
            else:
                self._events = tf.summary.create_noop_writer()
                self._lines = open(os.devnull, "a")

    def write(self, step: int, values: Mapping[str, float | str | None]) -> Metrics:
        """Writes one line and returns it: "step", "examples", and the values by name."""
        line: Metrics = {"step": step, "examples": step * self._global_batch_size}
        # JSON has no NaN or infinity.
        line |= {k: None if _is_infinite_or_nan(v) else v for k, v in values.items()}
        with self._writing(f" of step {step}"):
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")
            self._lines.flush()
            with self._events.as_default(step=step):
                for name, value in values.items():
                    if isinstance(value, int | float):
                        tf.summary.scalar(name, value)
        return line

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        # A failed close must not mask the original error.
        ignored = (StorageError,) if kind else ()
        with contextlib.suppress(*ignored), self._writing():
            try:
                self._lines.close()
            finally:
                self._events.close()

    def _writing(self, which: str = "") -> contextlib.AbstractContextManager[None]:
        return writing(
            f"the metrics{which} in {self._workdir.path}",
            "everything written and saved before is intact; fix the cause and start again",
        )


def _is_infinite_or_nan(value: float | str | None) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
