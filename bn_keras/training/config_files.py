"""Config files: a name, the path of a Python file, or the config.json of a run."""

import difflib
import importlib
import importlib.util
import inspect
import pathlib
import sys
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

import bn_keras
from bn_keras.errors import UsageError
from bn_keras.runs.workdir import Workdir
from bn_keras.text import first_line, first_of
from bn_keras.training.config import default_config

# Under this name the package's configs are installed, and imported from a checkout too.
PACKAGE = "bn_keras_configs"
# In a checkout they are in configs/, beside bn_keras/.
_ROOT = pathlib.Path(bn_keras.__file__).resolve().parents[1]
FOLDER = _ROOT / "configs" if (_ROOT / "setup.cfg").exists() else _ROOT / PACKAGE


def config_names() -> list[str]:
    """Returns the names of the configs that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("[a-z]*.py"))


def load_config(given: str) -> ConfigDict:
    """Loads a config, locked.

    Args:
      given: name of a config that comes with the package ("bn_x5"), or path of a Python file with
        a function get_config(); ":ARGUMENT" behind either is passed to that function. Or path of a
        run's config.json, or of the run's folder.

    Raises:
      UsageError: no such config, or one that does not follow the schema.
    """
    path = pathlib.Path(given)
    if path.suffix == ".json" or (path / "config.json").is_file():
        return _from_run(path.parent if path.suffix == ".json" else path)
    name, colon, argument = given.partition(":")
    get_config = getattr(_import_file(_find(name)), "get_config", None)
    if get_config is None:
        raise UsageError(f"config {name!r} has no function get_config()")
    arguments = [argument] if colon else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        given_what = f"the argument {argument!r}" if colon else "no argument"
        raise UsageError(f"config {name!r} does not accept {given_what}") from None
    config = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        raise UsageError(f"get_config() of config {name!r} returns no ConfigDict")
    return _checked(config, given).lock()


def flatten(config: ConfigDict, section: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the settings of a config as ("train.steps", 3000)."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def _from_run(workdir: pathlib.Path) -> ConfigDict:
    """Returns a run's config with the types of the schema, so that it can be overridden."""
    saved = _checked(Workdir(workdir).read_config(), str(workdir / "config.json"))
    config = default_config().copy_and_resolve_references()
    config.update_from_flattened_dict(dict(flatten(saved)))
    return config.lock()


def _checked(config: ConfigDict, origin: str) -> ConfigDict:
    keys = {key for key, _ in flatten(config)}
    accepted = {key for key, _ in flatten(default_config())}
    if missing := sorted(accepted - keys):
        raise UsageError(
            f"config {origin} has no {first_of(missing)}: start from"
            " bn_keras.training.config.default_config()"
        )
    if unknown := sorted(keys - accepted):
        raise UsageError(f"config {origin} has unknown keys: {first_of(unknown)}")
    return config


def _find(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    # "configs/bn_x5.py" names the same config from any folder.
    if path.suffix in ("", ".py") and path.parent.name in ("", "configs"):
        bundled = FOLDER / f"{path.stem}.py"
        if bundled.is_file() and path.stem in config_names():
            return bundled
    nearest = difflib.get_close_matches(path.stem, config_names(), n=1)
    guess = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise UsageError(f"no config {name!r}{guess}: expected a name, a Python file or a config.json")


def _import_file(file: pathlib.Path) -> ModuleType:
    """Imports a config file, as part of a package where its folder is one."""
    folder = file.parent
    if not (folder / "__init__.py").is_file():
        return _execute(importlib.util.spec_from_file_location(file.stem, file), file)
    package = PACKAGE
    if folder.resolve() != FOLDER.resolve():
        package = f"{PACKAGE}_{zlib.crc32(str(folder).encode()):x}"
    if package not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[package] = _execute(spec, file)
    try:
        return importlib.import_module(f"{package}.{file.stem}")
    except (SyntaxError, ImportError, AttributeError, TypeError, NameError) as error:
        raise _broken(file, error) from error


def _execute(spec: Any, file: pathlib.Path) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, AttributeError, TypeError, NameError) as error:
        raise _broken(file, error) from error
    return module


def _broken(file: pathlib.Path, error: Exception) -> UsageError:
    return UsageError(
        f"config {file} cannot be loaded: {type(error).__name__}: {first_line(error)}"
    )
