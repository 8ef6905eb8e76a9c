"""What --help prints: at most 80 columns and 40 lines, so that it fits a screen."""

import inspect
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping

from absl import flags

_WIDTH = 80
# A longer name has a line of its own.
_MAX_NAME = 24


def format_help(
    doc: str,
    options: Iterable[flags.Flag],
    required: Collection[str] = (),
    subcommands: Mapping[str, str] | None = None,
) -> str:
    """Formats what a command does, its flags and its examples.

    Args:
      doc: paragraphs on what it does; the last begins with a line "Example:" or "Examples:" and
        stays as it is.
      options: the flags.
      required: names of those that have to be given, beyond what absl knows.
      subcommands: by name, what they do.
    """
    *paragraphs, examples = inspect.cleandoc(doc).split("\n\n")
    sections = [textwrap.fill(paragraph, _WIDTH) for paragraph in paragraphs]
    if subcommands:
        sections.append(_table(subcommands))
    rows = {_name(flag): _meaning(flag, flag.name in required) for flag in options}
    sections.append(_table(rows))
    return "\n\n".join([*sections, examples])


def format_commands(commands: Mapping[str, str]) -> str:
    """Formats the list of commands that `bn-keras` prints on its own.

    Args:
      commands: what each does, by name.
    """
    return "\n\n".join(
        [
            "Usage: bn-keras COMMAND [--flag=value ...]",
            _table(commands),
            "bn-keras COMMAND --help shows the flags and examples of a command.",
        ]
    )


def is_required(flag: flags.Flag) -> bool:
    """Tells whether a command can't do without a flag, which absl marks by a validator."""
    return any("other than None" in validator.message for validator in flag.validators)


def _name(flag: flags.Flag) -> str:
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
            value = "|".join(flag.parser.enum_values)
        case _:
            value = "..."
    return f"--{flag.name}={value}"


def _meaning(flag: flags.Flag, required: bool) -> str:
    # What absl adds to the help of an enum and of a flag that may be repeated.
    text = re.sub(r"^<[^>]*>: |;\n *repeat this option.*", "", flag.help)
    if required or is_required(flag):
        return f"{text} Required."
    return f"{text} Default: {flag.default_as_str.strip(chr(39))}." if flag.default else text


def _table(rows: Mapping[str, str]) -> str:
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
