"""The CPU cores that this process may use."""

import math
import os

from bn_keras.cgroups import cpu_quotas


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
    return max(1, min([len(usable_cores()), *map(math.ceil, cpu_quotas())]))
