"""The text of --help: at most 80 columns and 40 lines, so that it fits a screen."""

import inspect
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping

from absl import flags

HELP_FLAGS = frozenset({"--help", "-help", "-h", "-?"})

_WIDTH = 80
# Longer names get a line of their own.
_MAX_NAME = 24


def format_help(
    doc: str,
    options: Iterable[flags.Flag],
    required: Collection[str] = (),
    subcommands: Mapping[str, str] | None = None,
) -> str:
    """Formats the description, the flags and the examples of a command.

    Args:
      doc: paragraphs of description, which are wrapped; then a block that begins with "Example:" or
        "Examples:" and is kept as is.
      options: the flags.
      required: names of required flags, in addition to those that absl requires.
      subcommands: description of each, by name.
    """
    *paragraphs, examples = inspect.cleandoc(doc).split("\n\n")
    sections = [textwrap.fill(paragraph, _WIDTH) for paragraph in paragraphs]
    if subcommands:
        sections.append("Subcommands:\n" + _format_table(subcommands))
    rows = {_usage(flag): _describe(flag, flag.name in required) for flag in options}
    sections.append("Flags:\n" + _format_table(rows))
    return "\n\n".join([*sections, examples])


def format_commands(commands: Mapping[str, str]) -> str:
    """Formats the list of commands.

    Args:
      commands: description of each, by name.
    """
    return "\n\n".join(
        [
            "Usage: bn-keras COMMAND [--flag=value ...]",
            "Commands:\n" + _format_table(commands),
            "`bn-keras COMMAND --help` shows the flags and examples of a command.",
        ]
    )


def is_required(flag: flags.Flag) -> bool:
    """Returns whether a flag is required; absl marks such flags by a validator."""
    return any("other than None" in validator.message for validator in flag.validators)


def _usage(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--{flag.name}"
    match flag.flag_type():
        case "int":
            value = "N"
        case "float":
            value = "X"
        case "comma separated list of strings":
            value = "A,B,..."
        case "string enum":
            value = "|".join(getattr(flag.parser, "enum_values", ()))
        case _:
            value = "..."
    return f"--{flag.name}={value}"


def _describe(flag: flags.Flag, required: bool) -> str:
    # absl prepends the values of an enum, and appends a note to a flag that may be repeated.
    text = re.sub(r"^<[^>]*>: |;\n *repeat this option.*", "", flag.help)
    if required or is_required(flag):
        return f"{text} Required."
    if not flag.default:
        return text
    default = flag.default_as_str or ""
    return f"{text} Default: {default.strip(chr(39))}."


def _format_table(rows: Mapping[str, str]) -> str:
    width = 2 + max(len(name) for name in rows if len(name) <= _MAX_NAME)
    lines = []
    for name, text in rows.items():
        first, *more = textwrap.wrap(text, _WIDTH - 2 - width)
        if len(name) <= _MAX_NAME:
            lines.append(f"  {name:{width}}{first}")
        else:
            lines += [f"  {name}", " " * (2 + width) + first]
        lines += [" " * (2 + width) + line for line in more]
    return "\n".join(lines)
