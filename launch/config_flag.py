"""The flag --config and its overrides --config.KEY=VALUE."""

import ast
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from .command_error import CommandError

# Flags defined in this module belong to the command that calls it: --help lists them there.
flags.disclaim_key_flags()

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(=?)(.*)", re.DOTALL)


@dataclasses.dataclass
class ConfigFlag:
    """The config of a command, loaded once all flags are parsed.

    Attributes:
      config: with its overrides, locked; None without --config.
      source: the argument of --config: a name or a path; "" without --config.
      overrides: the overridden settings, such as {"train.steps": 60}.
    """

    config: ConfigDict | None = None
    source: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Returns the config's source and its overrides, for the log."""
        overrides = ", ".join(f"{key}={value}" for key, value in self.overrides.items())
        return (self.source or "none") + (overrides and f" with {overrides}")

    @property
    def value(self) -> ConfigDict:
        """The config; raises CommandError without one."""
        if self.config is None:
            raise CommandError("--config is missing: see --help")
        return self.config

    def load(self, source: str, overrides: Sequence[str]) -> None:
        """Loads a config and applies overrides to it; imports TensorFlow.

        Args:
          source: the argument of --config.
          overrides: arguments --config.KEY=VALUE.

        Raises:
          UsageError: the config does not exist, does not follow the schema or has an invalid value.
          CommandError: an override is invalid.
        """
        from bn_keras.training.config import check_config, default_config
        from bn_keras.training.config_files import load_config

        config, defaults = load_config(source), default_config()
        self.overrides = dict(_override(config, defaults, argument) for argument in overrides)
        self.overrides |= _replace_epochs(config, self.overrides)
        check_config(config)
        self.config, self.source = config, source


# The flag of the command that runs in this process.
CONFIG = ConfigFlag()


def define_config(required: bool = True) -> ConfigFlag:
    """Defines --config and its overrides --config.KEY=VALUE."""
    flags.DEFINE_string(
        "config",
        None,
        "A name such as bn_x5, a Python file with get_config(), or a run's config.json."
        " --config.KEY=VALUE overrides a setting.",
        required=required,
        allow_overwrite=False,
    )
    return CONFIG


def split_overrides(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Separates the overrides from the other arguments.

    Like other flags, an override is written in one word, --config.KEY=VALUE, or in two.

    Returns:
      The overrides in one word each, and the other arguments.
    """
    overrides: list[str] = []
    others: list[str] = []
    value_may_follow = False
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if match:
            overrides.append(argument)
        elif value_may_follow and not argument.startswith("--"):
            overrides[-1] += f"={argument}"
        else:
            others.append(argument)
        value_may_follow = bool(match and not match[1] and not match[3])
    return overrides, others


def parse_value(kind: type, text: str) -> Any:
    """Parses a value of type bool, int, float, str or tuple.

    Raises:
      ValueError: the text is not a value of that type; the message is what is expected.
    """
    parse, expected = _PARSERS[kind]
    try:
        return parse(text)
    except (ValueError, SyntaxError):
        raise ValueError(expected) from None


def _override(config: ConfigDict, defaults: ConfigDict, argument: str) -> tuple[str, Any]:
    """Sets one setting of a config, and returns its key and its new value.

    A setting whose default is None accepts None.
    """
    match = _OVERRIDE.fullmatch(argument)
    assert match is not None
    no, key, equals, text = match.groups()
    section, name = find_setting(config, key)
    default_section, _ = find_setting(defaults, key)
    kind, is_optional = section.get_type(name), default_section[name] is None
    if kind is bool and not equals:
        text = "false" if no else "true"
    elif no:
        raise CommandError(f"{argument} is invalid: only boolean settings have a --noconfig form")
    try:
        is_none = is_optional and text == "None"
        value: Any = None if is_none else parse_value(kind, text)
        if kind is tuple and _are_numbers(section[name]) and not _are_numbers(value):
            raise ValueError("numbers separated by commas")
        section[name] = value
    except ValueError as error:
        also = " or None" if is_optional else ""
        raise CommandError(f"{argument} is invalid: expected {error}{also}") from None
    return key, section[name]


# Settings in steps, and those in epochs that would replace them.
_STEPS_AND_EPOCHS = {
    "train.steps": "train.epochs",
    "evaluation.every_steps": "evaluation.every_epochs",
}


def _replace_epochs(config: ConfigDict, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Makes overridden steps replace the epochs of a config.

    Returns:
      The settings that this changes.
    """
    replaced = {}
    for steps, epochs in _STEPS_AND_EPOCHS.items():
        section, name = find_setting(config, epochs)
        if steps not in overrides or not section[name]:
            continue
        if epochs in overrides:
            raise CommandError(
                f"{steps}={overrides[steps]} and {epochs}={overrides[epochs]:g} are both given:"
                " expected one of them"
            )
        section[name] = replaced[epochs] = 0.0
    return replaced


def find_setting(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """Returns the section that holds a setting, and the setting's name in it.

    Raises:
      CommandError: no such setting, or a section.
    """
    section, node = config, config
    names = key.split(".")
    for i, name in enumerate(names):
        if not isinstance(node, ConfigDict) or name not in node:
            where = ".".join(names[:i]) or "the config"
            keys = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "no keys"
            raise CommandError(f"unknown config key {key!r}: {where} has {keys}")
        section, node = node, node[name]
    if isinstance(node, ConfigDict):
        settings = ", ".join(sorted(node))
        raise CommandError(f"--config.{key} is a section: override one of {settings}")
    return section, names[-1]


def _parse_tuple(text: str) -> tuple:
    if not text or text == "None":
        raise ValueError
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # Names without quotation marks.
        return tuple(part.strip() for part in text.split(","))
    return value if isinstance(value, tuple) else (value,)


def _are_numbers(values: Sequence) -> bool:
    return bool(values) and all(isinstance(v, int | float) for v in values)


_PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (flags.BooleanParser().parse, "true or false"),
    int: (int, "an integer"),
    float: (float, "a number"),
    str: (str, "text"),
    tuple: (_parse_tuple, "values separated by commas, or () for none"),
}
