"""Run by test_docs: parses command lines as the commands themselves do, and runs none of them.

Reads from standard input a JSON list of argument lists, each with its command in front
("launch.train"), or with "" where it is of any command that takes it. An argument "..." stands for
others that are left out, and "--config=..." for any config. Writes for each what is wrong, "" if
nothing is, and its config, null if it has none.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import runpy
import sys

from absl import app, flags

import launch.cloud.control  # noqa: F401  (what takes time is imported before the forks)
from bn_keras.experiments import paper as experiments
from launch import cli
from launch.help import is_required

LAUNCH = pathlib.Path(cli.__file__).parent
# The one first that most flags are of.
COMMANDS = [
    f"launch.{p.stem}" for p in sorted(LAUNCH.glob("*.py")) if "cli.Command(" in p.read_text()
]
COMMANDS.sort(key=lambda name: name != "launch.train")
LEFT_OUT = "..."
ANY_CONFIG = "--config=inception"
ANY_ARGUMENT = "any"


def main():
    json.dump([parse(*arguments) for arguments in json.load(sys.stdin)], sys.stdout)


@functools.cache
def parse(command, *arguments):
    if not command:
        found = (parse(name, *arguments, LEFT_OUT) for name in COMMANDS)
        return next((f for f in found if not f[0]), ["no command takes it", None])
    if command not in COMMANDS:
        return [f"there is no {command}", None]
    result = in_fork(lambda: parse_here(command, arguments))
    if LEFT_OUT in arguments and re.match(r"error: [^-]+ is missing", result[0]):
        result = in_fork(lambda: parse_here(command, [*arguments, ANY_ARGUMENT]))
    return result


def in_fork(function):
    """Gives what it gives in a process of its own: one can define the flags of one command."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w") as file:
            json.dump(function(), file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        result = json.load(file)
    os.waitpid(child, 0)
    return result


def parse_here(command, arguments):
    sys.argv = [command, *(ANY_CONFIG if a == "--config=..." else a for a in arguments)]
    app.run = parse_only
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.suppress(SystemExit):
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    error = stderr.getvalue().strip()
    config = None if error else cli._config_flag.value
    return [error, config and config.to_dict()]


def parse_only(act, flags_parser):
    """In the place of absl's app.run, when the command has defined its flags."""
    del act
    module = vars(sys.modules["__main__"])
    argv = completed(sys.argv, module) if LEFT_OUT in sys.argv else sys.argv
    _, *positional = flags_parser(argv)
    # What these two look at only when they run.
    if "_subcommand" in module and positional != [ANY_ARGUMENT]:
        module["_subcommand"](positional)
    if "_make_sections" in module and (unknown := set(positional) - set(experiments.EXPERIMENTS)):
        cli.fail(f"unknown experiments {unknown}", 2)


def completed(argv, module):
    """With what is required and was left out, and without flags that were left without a value."""
    given = [a for a in argv if a != LEFT_OUT]
    names = {a[2:].partition("=")[0] for a in given if a.startswith("--")}
    bare = [a for a in given if a.startswith("--") and "=" not in a]
    if unknown := [a for a in bare if a[2:] not in flags.FLAGS]:
        cli.fail(f"unknown flag {unknown[0]}", 2)
    required = {f.name for f in flags.FLAGS.get_key_flags_for_module(argv[0]) if is_required(f)}
    if len(given) > 1:
        required |= {*module.get("_REQUIRED", {}).get(given[1], ())}
    if any(name.startswith("config.") for name in names):
        required.add("config")
    others = [f"--{name}=x" for name in sorted(required - names - {"config"})]
    config = [ANY_CONFIG] if "config" in required - names else []
    return [given[0], *config, *(a for a in given[1:] if a not in bare), *others]


if __name__ == "__main__":
    main()
