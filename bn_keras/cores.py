"""The CPU cores that this process may use."""

import math
import os

from bn_keras.cgroups import read_limits


def usable_cores() -> list[int]:
    """Returns the ids of the cores that this process may run on, in ascending order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def num_usable_cores() -> int:
    """Returns how many cores this process may use at the same time, at least 1.

    A container with a CPU quota, such as `docker run --cpus=2`, may run on all cores, but not on
    all of them at once.
    """
    quotas = [math.ceil(int(quota) / int(period)) for quota, period in _quotas()]
    return max(1, min([len(usable_cores()), *quotas]))


def _quotas() -> list[list[str]]:
    """Returns each limit as CPU time and the period for which it is granted."""
    limits = [text.split() for text in read_limits("cpu.max")]
    return [limit for limit in limits if len(limit) == 2 and all(map(str.isdecimal, limit))]
