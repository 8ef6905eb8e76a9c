"""Devices and clusters.

Only this package names a strategy class or reads the variables that describe a cluster.
"""

from bn_keras.distribute.detection import is_evaluator, join_cluster
from bn_keras.distribute.devices import describe_devices
from bn_keras.distribute.strategy import (
    STRATEGIES,
    check_strategy,
    gather_from_workers,
    is_chief,
    make_strategy,
    reporting_lost_workers,
    without_other_workers,
)

__all__ = [
    "STRATEGIES",
    "check_strategy",
    "describe_devices",
    "gather_from_workers",
    "is_chief",
    "is_evaluator",
    "join_cluster",
    "make_strategy",
    "reporting_lost_workers",
    "without_other_workers",
]
