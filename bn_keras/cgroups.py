"""The limits of the control groups that contain this process, such as those of its container."""

import pathlib

_ROOT = pathlib.Path("/sys/fs/cgroup")


def cpu_quotas() -> list[float]:
    """Returns the limits of the CPU time, in cores."""
    limits = [text.split() for text in _read("cpu.max")]
    quotas, periods = _read("cpu.cfs_quota_us", "cpu"), _read("cpu.cfs_period_us", "cpu")
    limits += [list(limit) for limit in zip(quotas, periods, strict=True)]
    # "max" and -1 stand for no limit.
    limits = [limit for limit in limits if len(limit) == 2 and all(map(str.isdecimal, limit))]
    return [int(quota) / int(period) for quota, period in limits]


def memory_limits() -> list[int]:
    """Returns the limits of the memory in bytes."""
    texts = _read("memory.max") + _read("memory.limit_in_bytes", "memory")
    return [int(text) for text in texts if text.isdecimal()]


def _read(name: str, controller: str = "") -> list[str]:
    """Returns the contents of a file in all groups that have it.

    Args:
      name: name of the file.
      controller: controller of version 1 that the file belongs to; "" for version 2.
    """
    try:
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    root = _ROOT / controller
    folder = root
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder = root / path.removeprefix("/")
    groups = [group for group in (folder, *folder.parents) if group.is_relative_to(root)]
    return [(g / name).read_text().strip() for g in groups if (g / name).is_file()]
