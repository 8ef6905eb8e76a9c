"""The software and hardware of a run, recorded so that its results can be reproduced."""

import functools
import pathlib
import platform
import subprocess
from typing import TypedDict

import keras
import numpy as np
import tensorflow as tf

import bn_keras
from bn_keras.cores import num_usable_cores

_CHECKOUT = pathlib.Path(bn_keras.__file__).resolve().parents[1]


class Machine(TypedDict):
    """The hardware of a run."""

    platform: str
    processor: str
    cores: int
    devices: list[str]


class Environment(TypedDict):
    """The software and hardware of a run.

    "commit" is the commit of the checkout that contains the package, and "modified" whether tracked
    files differ from it. Both are None outside a checkout, or if git fails.
    """

    versions: dict[str, str]
    commit: str | None
    modified: bool | None
    machine: Machine


@functools.cache
def describe() -> Environment:
    """Returns the environment of this process."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "versions": {
            "bn_keras": bn_keras.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "commit": commit,
        "modified": None if status is None else bool(status),
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": num_usable_cores(),
            "devices": _devices(),
        },
    }


def _git(*arguments: str) -> str | None:
    """Returns the output of a git command in the checkout; None outside one or if git fails."""
    if not (_CHECKOUT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(_CHECKOUT), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _devices() -> list[str]:
    """Returns the names of the accelerators, or ["CPU"] if there are none."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name") for gpu in gpus]
    tpus = [device.device_type for device in tf.config.list_logical_devices("TPU")]
    return [name or "GPU" for name in names] or tpus or ["CPU"]
