"""Checks the files of runs that ended at any moment."""

import tensorflow as tf

from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.metrics_log import FINISHED
from bn_keras.runs.workdir import Workdir


def without_times(lines):
    """Returns lines of metrics without the values that differ from run to run."""
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]


def check_usable(folder, expected):
    """Checks a copy of the files of a run that ended at some moment.

    Every checkpoint with an index can be read, and the metrics have all lines up to the latest
    checkpoint: a run that resumes from it does not write them again.

    Args:
      folder: the run's folder.
      expected: lines of metrics of an uninterrupted run, without times.

    Returns:
      The steps of the latest checkpoint and of the best network; 0 without one.
    """
    run = Workdir(folder)
    steps = []
    for checkpoints in (run.checkpoints, run.best):
        indexed = [int(path.stem.split("-")[1]) for path in checkpoints.glob("*.index")]
        for step in indexed:
            reader = tf.train.load_checkpoint(checkpoints / f"step-{step}")
            for name in reader.get_variable_to_shape_map():
                reader.get_tensor(name)
        latest = max(indexed, default=0)
        assert Checkpoints(checkpoints, {}).restore() == latest
        steps.append(latest)
    lines = without_times(run.read_metrics())
    # The line that marks a run as finished is written after its last checkpoint.
    due = [line for line in expected if line["step"] <= steps[0] and FINISHED not in line]
    assert lines[: len(due)] == due
    return tuple(steps)
