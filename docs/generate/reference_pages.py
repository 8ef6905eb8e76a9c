"""The generated parts of the reference, from the code: configs, settings, commands and statuses."""

import html
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from bn_keras import errors
from bn_keras.training import config as schema
from bn_keras.training import config_files
from launch import cli
from launch.main import COMMANDS

_ROOT = Path(__file__).resolve().parents[2]
_ASSIGNMENT = re.compile(r" *config\.((?:\w+\.)?\w+) = (.*)")


class Setting(NamedTuple):
    """A setting of the config schema: its key, its default and its comment in the schema."""

    key: str
    default: object
    meaning: str


def settings() -> str:
    """Returns a section with a table for each section of the config schema."""
    by_section: dict[str, list[Setting]] = {}
    for setting in read_settings():
        section = setting.key.rpartition(".")[0]
        by_section.setdefault(section, []).append(setting)
    parts = []
    for section, rows in by_section.items():
        parts.append(f"## {section or 'seed'}\n")
        parts.append("| setting | default | meaning |\n|---|---|---|")
        for key, default, meaning in rows:
            shown = "`None`" if default is None else f"`{_quoted(default)}`"
            parts.append(f"| `{key}` | {shown} | {_cell(meaning)} |")
        parts.append("")
    return "\n".join(parts)


def read_settings() -> Iterator[Setting]:
    """Yields all settings in the order of the schema.

    The comment of a setting is in the lines right above it.
    """
    config = schema.default_config()
    comment: list[str] = []
    for line in inspect.getsource(schema.default_config).splitlines():
        if (text := line.strip()).startswith("#"):
            comment.append(text[1:].strip())
            continue
        if (found := _ASSIGNMENT.match(line)) and found[2] != "ConfigDict()":
            yield Setting(found[1], _value(config, found[1]), " ".join(comment))
        comment = []


def configs() -> str:
    """Returns a table of the package's configs: name, first line of the docstring, and length."""
    rows = []
    for name in config_files.config_names():
        module = importlib.import_module(f"configs.{name}")
        has_members = bool(inspect.signature(module.get_config).parameters)
        shown = f"`{name}:1` to `:6`" if has_members else f"`{name}`"
        title = (module.__doc__ or "").partition("\n")[0]
        meaning = re.sub(r"; see \w+\.py\.$", ".", title)
        train = module.get_config().train
        length = f"{train.epochs:g} epochs" if train.epochs else f"{train.steps:,} steps"
        rows.append(f"| {shown} | {_cell(meaning)} | {length} |")
    return "\n".join(["| `--config=` | trains | length |", "|---|---|---|", *rows])


def commands() -> str:
    """Returns a section with the help of each command and of its subcommands."""
    with ThreadPoolExecutor() as pool:
        texts = dict(zip(COMMANDS, pool.map(_help, COMMANDS), strict=True))
    parts = []
    for name, text in texts.items():
        parts.append(f"### bn-keras {name}\n\n```text\n{text}```\n")
        for subcommand in _subcommands(text):
            line = f"{name} {subcommand}"
            parts.append(f"#### bn-keras {line}\n\n```text\n{_help(line)}```\n")
    return "\n".join(parts)


def exit_statuses() -> str:
    """Returns a table of the exit statuses, with the errors that have them."""
    rows = ["| status | meaning | error |", "|---|---|---|"]
    for statuses, meaning in read_statuses():
        found = ", ".join(
            f"`{name}`" for name, status in _statuses_of_errors().items() if status in statuses
        )
        rows.append(f"| {', '.join(map(str, statuses))} | {_cell(_sentence(meaning))} | {found} |")
    return "\n".join(rows)


def read_statuses() -> list[tuple[list[int], str]]:
    """Returns the exit statuses that launch/cli.py lists, in groups with one meaning."""
    text = (cli.__doc__ or "").partition("Exit statuses:\n")[2]
    found = re.findall(r"^  ([\d, ]+): (.*(?:\n    .*)*)", text, flags=re.MULTILINE)
    return [
        ([int(status) for status in statuses.split(",")], " ".join(meaning.split()))
        for statuses, meaning in found
    ]


def changelog() -> str:
    """Returns the changelog without its title."""
    return (_ROOT / "CHANGELOG.md").read_text().partition("\n")[2]


def _statuses_of_errors() -> dict[str, int]:
    """Returns the exit status of each error class that has a fixed one."""
    return {
        name: member.status
        for name, member in vars(errors).items()
        if inspect.isclass(member)
        and issubclass(member, errors.ReportedError)
        and isinstance(member.status, int)
    }


def _help(command: str) -> str:
    # Each command needs a process of its own, because all define their flags in one registry.
    done = subprocess.run(
        [sys.executable, "-m", "launch.main", *command.split(), "--help"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"bn-keras {command} --help failed: {done.stderr}")
    return done.stdout


def _subcommands(text: str) -> list[str]:
    """Returns the names of the subcommands that a help lists."""
    block = text.partition("Subcommands:\n")[2].partition("\n\n")[0]
    return re.findall(r"^  (\w+)", block, flags=re.MULTILINE)


def _value(config: ConfigDict, key: str) -> object:
    for name in key.split("."):
        config = config[name]
    return config


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value}"


def _cell(text: str) -> str:
    """Returns a text for a cell of a Markdown table."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*")
