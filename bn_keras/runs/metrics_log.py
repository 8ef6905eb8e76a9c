"""Reads the state of a run from the lines of its metrics.jsonl."""

import json
from typing import Any

from bn_keras.errors import UsageError
from bn_keras.text import first_line

# One line of metrics.jsonl.
MetricsLine = dict[str, float | str | None]

# Key of the validation accuracy in the line of an evaluation.
ACCURACY = "validation/accuracy"
# Key in the last line of a finished run: a hash over all of its variables.
FINISHED = "variables_sha256"
# Key in the line of the step at which a run's loss or a variable was no longer finite.
DIVERGED = "diverged"
# Key in the line of the step that a diverged run was rolled back to: number of the retry.
RETRY = "retry"


class MetricsLog(list[dict[str, Any]]):
    """The lines of metrics.jsonl, in order."""

    @classmethod
    def parse(cls, content: bytes, path: str) -> "MetricsLog":
        """Parses the content of metrics.jsonl; an incomplete last line is left out.

        Args:
          content: content of the file.
          path: path of the file, for errors.

        Raises:
          UsageError: a line is damaged.
        """
        try:
            *lines, _ = content.decode().split("\n")
        except ValueError as error:
            raise UsageError(f"{path} cannot be read: {first_line(error)}") from None
        log = cls()
        for number, line in enumerate(lines, 1):
            values = _parse_line(line)
            if values is None:
                raise UsageError(
                    f"line {number} of {path} is damaged: fix or delete it, or use a new workdir"
                )
            log.append(values)
        return log

    @property
    def last_step(self) -> int:
        """The last step; 0 without lines."""
        return max((line["step"] for line in self), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended normally: at its last step, or by an early stop."""
        return any(FINISHED in line for line in self[-1:])

    @property
    def has_diverged(self) -> bool:
        """Whether the run diverged and has not been rolled back since."""
        return any(DIVERGED in line for line in self[-1:])

    @property
    def diverged_at(self) -> int | None:
        """First step at which the loss or a variable became non-finite; None without one."""
        return next((line["step"] for line in self if DIVERGED in line), None)

    @property
    def num_retries(self) -> int:
        """How many times the run has been rolled back after it diverged."""
        return max((line.get(RETRY, 0) for line in self), default=0)

    def up_to(self, step: int) -> "MetricsLog":
        """Returns the lines up to a step."""
        return MetricsLog(line for line in self if line["step"] <= step)

    def curve(self, key: str) -> dict[int, float]:
        """Returns a metric by step, at the steps where it was written."""
        return {line["step"]: line[key] for line in self if line.get(key) is not None}

    @property
    def best_accuracy(self) -> float:
        """Highest validation accuracy; 0 before the first evaluation."""
        return max((line.get(ACCURACY, 0.0) for line in self), default=0.0)

    @property
    def evaluations_since_best(self) -> int:
        """How many evaluations follow the first one of highest accuracy.

        An accuracy of 0 is never the highest, so that all evaluations count if there is no other.
        """
        accuracies: dict[int, float] = {}
        for line in self:
            if ACCURACY in line:
                accuracies.setdefault(line["step"], line[ACCURACY])
        values = [0.0, *accuracies.values()]
        return len(values) - 1 - values.index(max(values))

    def evaluations(self, step: int) -> list[dict[str, Any]]:
        """Returns the lines of the evaluations at a step; the last step may have two."""
        return [line for line in self if line["step"] == step and ACCURACY in line]


def _parse_line(line: str) -> dict[str, Any] | None:
    """Returns the metrics of a line, or None if it lacks what the readers rely on."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return None
    return values if isinstance(values.get(ACCURACY, 0.0), int | float) else None
