"""The values that the section `data` of a config accepts."""

import math
from collections.abc import Collection

from ml_collections import ConfigDict

from bn_keras.errors import UsageError

_CHOICES = {
    "crop": ("inception", "shift", "none"),
    "shuffle": ("examples", "shards"),
    "balance": ("none", "weights", "sampling"),
}
_FRACTIONS = ("distortion", "random_augment")
_NOT_NEGATIVE = ("image_size", "mixup", "cutmix", "max_bad_examples")


def check_settings(settings: ConfigDict) -> None:
    """Raises UsageError for an unknown choice, or a number outside its range.

    The name of the data set, its folder and its splits are checked when it is opened.

    Args:
      settings: section `data` of a config; see bn_keras/training/config.py.
    """
    for key, accepted in _CHOICES.items():
        _check_choice(key, getattr(settings, key), accepted)
    for key in _FRACTIONS:
        _check_range(key, getattr(settings, key), 1)
    for key in _NOT_NEGATIVE:
        _check_range(key, getattr(settings, key), math.inf)


def _check_choice(key: str, value: str, accepted: Collection[str]) -> None:
    if value not in accepted:
        raise UsageError(f"unknown data.{key} {value!r}: expected one of {', '.join(accepted)}")


def _check_range(key: str, value: float, high: float) -> None:
    if not 0 <= value <= high or math.isinf(value):
        expected = "0 or more" if math.isinf(high) else f"a number in [0, {high}]"
        raise UsageError(f"data.{key}={value} is invalid: expected {expected}")
