"""A config as a run saved it, possibly with an older schema."""

from collections.abc import Mapping
from typing import Any, Self

from etils import epath
from ml_collections import ConfigDict

from bn_keras.errors import UsageError

# Settings that older versions lacked, with the values that describe what those versions did.
_LATER_SETTINGS: dict[str, dict[str, Any]] = {
    "batch_norm": {"virtual_batch_size": 0},
    "data": {"balance": "none"},
    "model": {"freeze": "none", "modules": ()},
}


class SavedConfig(ConfigDict):
    """A config read from a file. Access to a missing key raises an error that names the file.

    Settings that an older version lacked, but whose effect is known, are added. For others, only
    the code that reads a key knows whether it is needed: the error is raised then, not before.

    Args:
      values: values by key; a mapping is a section.
      file: file that they were read from; None raises AttributeError instead.
      section: section of the values, with a dot at its end; "" is the whole config.

    Raises:
      UsageError: on access to an attribute, the file lacks this key.
    """

    def __init__(
        self,
        values: Mapping[str, Any] | None = None,
        file: epath.Path | None = None,
        section: str = "",
    ) -> None:
        super().__init__()
        # A plain assignment would add a key to the config.
        object.__setattr__(self, "_file", file)
        object.__setattr__(self, "_section", section)
        later = _LATER_SETTINGS.get(section.removesuffix("."), {}) if file else {}
        for key, value in (later | dict(values or {})).items():
            if isinstance(value, Mapping):
                value = SavedConfig(value, file, f"{section}{key}.")
            # JSON has no tuples, and the schema no lists.
            self[key] = tuple(value) if isinstance(value, list) else value

    def __getattr__(self, key: str) -> Any:
        # Python and IPython probe any object for names that start with an underscore.
        if self._file is None or key in self or key.startswith("_"):
            return super().__getattr__(key)
        raise missing_keys_error(self._file, f"{self._section}{key}")

    def copy_and_resolve_references(self, visit_map: dict[int, Any] | None = None) -> Self:
        """Copies the config; the copy, too, names the file of a missing key."""
        copy = super().copy_and_resolve_references(visit_map)
        object.__setattr__(copy, "_file", self._file)
        object.__setattr__(copy, "_section", self._section)
        return copy

    def __eq__(self, other: object) -> bool:
        # ConfigDict.__eq__ returns False for instances of other classes.
        return self.eq_as_configdict(other)

    __hash__ = None  # type: ignore[assignment]


def missing_keys_error(config: epath.Path, keys: str) -> UsageError:
    """Returns the error for a config file that lacks keys."""
    return UsageError(
        f"{config} has no {keys}: an older version of bn_keras wrote it; start training in a new"
        " workdir"
    )
