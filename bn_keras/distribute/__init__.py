"""Devices and clusters: the only package that names a strategy class or reads TF_CONFIG."""

from bn_keras.distribute.strategy import (
    STRATEGIES,
    check_strategy,
    from_all_workers,
    is_chief,
    make_strategy,
    reporting_lost_workers,
)

__all__ = [
    "STRATEGIES",
    "check_strategy",
    "from_all_workers",
    "is_chief",
    "make_strategy",
    "reporting_lost_workers",
]
