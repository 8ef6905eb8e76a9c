"""Length of a run: its number of steps, the examples of each, and the reasons to stop earlier."""

import math

from ml_collections import ConfigDict

from bn_keras.runs.settings import replaced
from bn_keras.runs.workdir import Workdir
from bn_keras.text import counted


def num_steps(config: ConfigDict, num_train_examples: int) -> int:
    """Returns the last step of a run: train.epochs in steps, rounded up, or train.steps."""
    if not config.train.epochs:
        return config.train.steps
    return _to_steps(config.train.epochs, config, num_train_examples)


def with_steps(config: ConfigDict, num_train_examples: int) -> ConfigDict:
    """Returns a config whose steps have the values that follow from its epochs.

    These are train.steps, and evaluation.every_steps.
    """
    values = {}
    if config.train.epochs:
        values["train.steps"] = num_steps(config, num_train_examples)
    if period := config.evaluation.every_epochs:
        values["evaluation.every_steps"] = _to_steps(period, config, num_train_examples)
    return replaced(config, values) if values else config


def _to_steps(epochs: float, config: ConfigDict, num_train_examples: int) -> int:
    steps = epochs * num_train_examples / config.train.global_batch_size
    # 3 epochs of 0.1 * 10 examples must not be one step longer because of rounding.
    return max(1, math.ceil(steps - 1e-6))


def global_micro_batch_size(config: ConfigDict) -> int:
    """Returns the number of examples of one micro-batch, over all replicas.

    BN normalizes each replica's part of it, or all of it if synchronized.
    """
    return config.train.global_batch_size // config.train.micro_batches


def early_stop_reason(best_accuracy: float, evaluations_since_best: int, config: ConfigDict) -> str:
    """Returns why a run ends before its last step; "" if it continues.

    Args:
      best_accuracy: highest validation accuracy so far, a fraction.
      evaluations_since_best: evaluations after the first one with that accuracy.
      config: config of the run.
    """
    target, patience = config.train.until_accuracy, config.train.patience
    if target and best_accuracy >= target:
        return f"an accuracy of {best_accuracy:.4f} reached train.until_accuracy={target:g}"
    if patience and evaluations_since_best >= patience:
        evaluations = counted(evaluations_since_best, "evaluation")
        return f"no accuracy above {best_accuracy:.4f} in {evaluations} (train.patience={patience})"
    return ""


def finish_reason(run: Workdir, config: ConfigDict) -> str:
    """Returns why nothing is left to train in a run; "" if there is.

    A finished run is extended by a larger train.steps or train.epochs, or by other settings of the
    early stop.

    Args:
      run: folder of the run; its config may differ in such settings.
      config: config of this start.
    """
    metrics = run.read_metrics()
    if not metrics.is_finished:
        return ""
    step, saved = metrics.last_step, run.read_config()
    if config.train.epochs:
        steps = saved.train.steps
        has_last_step = config.train.epochs == saved.train.epochs and step >= steps
    else:
        has_last_step = step >= config.train.steps
    if has_last_step:
        return f"finished at step {step:,}"
    reason = early_stop_reason(metrics.best_accuracy, metrics.evaluations_since_best, config)
    return f"finished at step {step:,}: {reason}" if reason else ""
