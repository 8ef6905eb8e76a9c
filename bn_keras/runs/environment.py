"""With what, and where, a run is made: what its reader needs in order to believe it."""

import functools
import os
import pathlib
import platform
import subprocess

import keras
import numpy as np
import tensorflow as tf

import bn_keras

_ROOT = pathlib.Path(__file__).resolve().parents[1]


@functools.cache
def describe() -> dict[str, object]:
    """Gives "versions", "commit", "modified" and "machine".

    "commit" is that of the checkout which the package lies in, and "modified" whether files of it
    differ from that; both are None where it lies in none.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "versions": {
            "bn_keras": bn_keras.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "commit": commit,
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": len(cores()),
            "devices": _devices(),
        },
    }


def _git(*arguments: str) -> str | None:
    if not (_ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10
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


def cores() -> list[int]:
    """Numbers of the CPU's cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _devices() -> list[str]:
    """The accelerators by their names, else the kinds of TensorFlow's devices."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name") for gpu in gpus]
    tpus = [device.device_type for device in tf.config.list_logical_devices("TPU")]
    return [name or "GPU" for name in names] or tpus or ["CPU"]
