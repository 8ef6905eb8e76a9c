"""Config files: a name, the path of a Python file, or the config.json of a run."""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import pathlib
import sys
import zlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from etils import epath
from ml_collections import ConfigDict

import bn_keras
from bn_keras.errors import UsageError
from bn_keras.runs.saved_config import SavedConfig
from bn_keras.runs.settings import flatten
from bn_keras.runs.workdir import Workdir
from bn_keras.storage import is_local
from bn_keras.text import first_line
from bn_keras.training.config import check_keys, default_config

# Name of the package of configs, installed or in a checkout.
PACKAGE = "bn_keras_configs"
# In a checkout, its files are in configs/, beside bn_keras/.
_ROOT = pathlib.Path(bn_keras.__file__).resolve().parents[1]
FOLDER = _ROOT / "configs" if (_ROOT / "setup.cfg").exists() else _ROOT / PACKAGE


def config_names() -> list[str]:
    """Returns the names of the configs that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("[a-z]*.py"))


def load_config(source: str) -> ConfigDict:
    """Loads a config, locked.

    Args:
      source: one of
        - the name of a config of the package ("bn_x5"), or the path of a Python file with a
          function get_config(); ":ARGUMENT" after either is passed to that function;
        - the path of a run's folder or of its config.json.

    Raises:
      UsageError: the config does not exist or does not follow the schema.
    """
    in_bucket = not is_local(source)
    if (run := find_run(source)) is not None:
        return _apply_to_schema(Workdir(run).read_config(), str(run / "config.json"))
    if in_bucket:
        raise UsageError(f"no run in {source!r}: expected the folder of a run or its config.json")
    name, colon, argument = source.partition(":")
    get_config = getattr(_import_file(_find(name)), "get_config", None)
    if get_config is None:
        raise UsageError(
            f"config {name!r} has no function get_config(): define one that returns a ConfigDict"
        )
    arguments = [argument] if colon else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if colon:
            reason = f"config {name!r} does not accept the argument {argument!r}"
        else:
            reason = f"config {name!r} needs an argument: expected {name}:ARGUMENT"
        raise UsageError(reason) from None
    with _loading(pathlib.Path(name)):
        config = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        raise UsageError(
            f"get_config() of config {name!r} returns an object of type {type(config).__name__}:"
            " expected a ConfigDict"
        )
    return _apply_to_schema(config, source)


def find_run(source: str) -> epath.Path | None:
    """Returns the folder of the run that a source of `load_config` names; None for a config."""
    path = epath.Path(source)
    if path.name == "config.json":
        return path.parent
    # A name of the package has precedence over a run's folder.
    is_run = source not in config_names() and (path / "config.json").exists()
    return path if is_run else None


def read_run_config(run: Workdir) -> SavedConfig:
    """Reads the config of a run and checks the types of its settings.

    An older version may have saved it: a missing setting raises UsageError when it is asked for.

    Raises:
      UsageError: there is no run in the folder, or its config cannot be read.
    """
    config = run.read_config()
    schema = default_config()
    known = flatten(schema)
    for name, section in schema.items():
        if isinstance(section, ConfigDict) != isinstance(config.get(name, section), ConfigDict):
            kind = "a section" if isinstance(section, ConfigDict) else "a single value"
            raise UsageError(
                f"config {run.path} has an invalid {name}={config[name]!r}: expected {kind}"
            )
    _apply_types({k: v for k, v in flatten(config).items() if k in known}, str(run.path))
    return config


def _apply_to_schema(config: ConfigDict, origin: str) -> ConfigDict:
    """Returns a config with the types of the schema, locked.

    Only the schema knows the type of a setting that is None or was read from JSON.
    """
    check_keys(config, f"config {origin}")
    return _apply_types(flatten(config), origin)


def _apply_types(settings: Mapping[str, Any], origin: str) -> ConfigDict:
    """Returns the schema's defaults, locked, with other values for settings such as "train.l2"."""
    typed = default_config()
    defaults = flatten(typed)
    for key, value in settings.items():
        try:
            if value is None and defaults[key] is not None:
                raise TypeError  # ConfigDict accepts None for any type.
            typed.update_from_flattened_dict({key: value})
        except (TypeError, ValueError):
            section, _, name = key.rpartition(".")
            kind = (typed[section] if section else typed).get_type(name)
            raise UsageError(
                f"config {origin} has an invalid {key}={value!r}: expected {kind.__name__}"
            ) from None
    return typed


def _find(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    # "configs/bn_x5.py" names the same config from any folder.
    if path.suffix in ("", ".py") and str(path.parent) in (".", "configs"):
        if path.stem in config_names():
            return FOLDER / f"{path.stem}.py"
    nearest = difflib.get_close_matches(path.stem, config_names(), n=1)
    guess = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise UsageError(
        f"no config {name!r}{guess}: expected a name, a Python file, a run or its config.json; the"
        f" names are {', '.join(config_names())}"
    )


def _import_file(file: pathlib.Path) -> ModuleType:
    """Imports a config file, as part of a package if its folder is one."""
    # Lets a config in any folder import those of the package.
    _import_package(PACKAGE, FOLDER)
    folder = file.parent
    if not (folder / "__init__.py").is_file():
        return _execute(importlib.util.spec_from_file_location(file.stem, file), file)
    package = PACKAGE
    if folder.resolve() != FOLDER.resolve():
        package = f"{PACKAGE}_{zlib.crc32(str(folder).encode()):x}"
        _import_package(package, folder)
    with _loading(file):
        return importlib.import_module(f"{package}.{file.stem}")


def _import_package(name: str, folder: pathlib.Path) -> None:
    """Imports a folder as a package of a given name."""
    if name not in sys.modules:
        file = folder / "__init__.py"
        spec = importlib.util.spec_from_file_location(
            name, file, submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = _execute(spec, file)


def _execute(spec: Any, file: pathlib.Path) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    with _loading(file):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _loading(file: pathlib.Path) -> Iterator[None]:
    """Reports an error in a config's code, which may be of any kind, on one line."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"config {file} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
