"""Describes what a run is going to do, before it starts."""

import os

from ml_collections import ConfigDict

from bn_keras.data import sources
from bn_keras.data.folder import check_apart
from bn_keras.distribute import describe_devices
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.settings import replaced
from bn_keras.runs.workdir import Workdir
from bn_keras.storage import check_writable
from bn_keras.text import counted
from bn_keras.training.build import build_schedule
from bn_keras.training.config import check_config
from bn_keras.training.length import finish_reason, global_micro_batch_size


def describe_training(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, str]:
    """Describes what `train_and_evaluate` would do with the same arguments; changes nothing.

    Args:
      config: see `default_config`.
      workdir: folder of the run.

    Returns:
      One line each for "data", "devices" and "workdir".

    Raises:
      UsageError: an invalid value in the config, a workdir of another run, or no such data set.
      StorageError: the workdir cannot be written.
    """
    check_config(config)
    run = Workdir(workdir)
    check_startable(run, config)
    check_writable(run.path, f"workdir {run.path}")
    progress = describe_progress(run, config)
    return describe_input(config) | {"workdir": f"{run.path}: {progress}"}


def check_startable(run: Workdir, config: ConfigDict) -> None:
    """Raises UsageError if a config cannot be trained in a workdir; see `Workdir.check`."""
    run.check(config)
    data = config.data
    if data.name == "folder":
        check_apart(data.data_dir, (data.train_split, data.validation_split), os.fspath(run.path))


def describe_input(config: ConfigDict) -> dict[str, str]:
    """Returns one line each for the "data" and the "devices" of a config.

    Raises:
      UsageError: there is no such data set.
    """
    name, data_dir = config.data.name, config.data.data_dir
    return {
        "data": f"{name}: {sources.locate(name, data_dir)}",
        "devices": f"{config.distribution.strategy}: {describe_devices(**config.distribution)}",
    }


def prepare_input(config: ConfigDict) -> None:
    """Downloads and prepares the data set of a config if necessary; see `sources.prepare`."""
    sources.prepare(config.data.name, config.data.data_dir)


def describe_length(config: ConfigDict) -> str:
    """Describes the length of a run: "40 epochs", or "60 steps" if the config sets no epochs."""
    if epochs := config.train.epochs:
        return "1 epoch" if epochs == 1 else f"{epochs:g} epochs"
    return counted(config.train.steps, "step")


def describe_progress(run: Workdir, config: ConfigDict) -> str:
    """Describes how far a run is, and from which step this config would train it."""
    if reason := finish_reason(run, config):
        return f"{reason}, nothing to do"
    end = describe_length(config) if config.train.epochs else f"step {config.train.steps:,}"
    step = Checkpoints(run.checkpoints, {}).latest_step
    if not step:
        return f"new, to {end}"
    extending = "extending" if run.read_metrics().is_finished else "resuming"
    return f"{extending} from step {step:,} to {end.removeprefix('step ')}"


def describe_changes(
    run: Workdir, config: ConfigDict, num_train_examples: int, step: int
) -> list[str]:
    """Returns lines about settings that differ from the last start, and the rate that follows."""
    changes = run.changes(config)
    if not changes:
        return []
    values = ", ".join(f"{key}={new!r} (was {old!r})" for key, (old, new) in changes.items())
    before = replaced(config, {key: old for key, (old, _) in changes.items()})
    old_rate, new_rate = (
        float(build_schedule(c, num_train_examples)(step)) for c in (before, config)
    )
    lines = [f"changed since the last start: {values}"]
    if old_rate != new_rate:
        lines.append(
            f"the cosine has another length: the learning rate at step {step:,} is {new_rate:.2g}"
            f" (was {old_rate:.2g}); schedule.cosine_steps="
            f"{before.schedule.cosine_steps or before.train.steps} keeps the earlier cosine"
        )
    return lines


def describe_replicas(run: Workdir, config: ConfigDict, replicas: int) -> list[str]:
    """Returns a line about BN if the run was trained by another number of replicas before."""
    before = next(
        (s["replicas"] for s in run.read_environment()[::-1] if "replicas" in s), replicas
    )
    if before == replicas:
        return []
    size = global_micro_batch_size(config)
    if config.batch_norm.synchronized:
        effect = "synchronized BN computes the same numbers, up to rounding"
    elif ghost_batch_size := config.batch_norm.virtual_batch_size:
        effect = f"BN still normalizes {counted(ghost_batch_size, 'example')} together"
    else:
        effect = (
            f"BN now normalizes {size // replicas} examples per replica instead of"
            f" {size // before}; batch_norm.synchronized=True would make it independent of that"
        )
    return [f"{counted(replicas, 'replica')} instead of {before}: {effect}"]
