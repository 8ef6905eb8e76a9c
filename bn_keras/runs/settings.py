"""Settings of a config by key, such as "train.l2"."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def flatten(config: ConfigDict, section: str = "") -> dict[str, Any]:
    """Returns the settings of a config by key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{section}{key}.")
        else:
            flat[section + key] = value
    return flat


def replaced(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of a config, locked, with other values for the given keys."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(values)
    return config.lock()
