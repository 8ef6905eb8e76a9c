"""Parses command lines with the commands' own code, without running the commands.

Tests call `parse_all`. It runs this module as a script, which reads a JSON list of argument lists
from standard input and writes a `Parsed` for each. The first argument is the command ("train"), or
"" for any command that accepts the others. "..." stands for omitted arguments, "--config=..." for
any config.
"""

import contextlib
import datetime
import functools
import io
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
from typing import NamedTuple

from absl import app, flags

# Imported once, because it takes time: every command is parsed in a fork of this process.
import bn_keras.experiments.paper  # noqa: F401
import launch.cloud.control  # noqa: F401
from bn_keras.errors import UsageError
from bn_keras.training.config import check_config, default_config
from launch import cli, config_flag
from launch.command_error import CommandError
from launch.help import is_required
from launch.main import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
OMITTED = "..."
ANY_CONFIG = "--config=inception"
ANY_ARGUMENT = "any"


class Parsed(NamedTuple):
    """The exit status, standard error, and the config or None."""

    status: int
    error: str
    config: dict | None


def parse_all(commands):
    """Returns a Parsed for each command, all from one process."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(commands),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [Parsed(*result) for result in json.loads(done.stdout)]


def main():
    json.dump([parse(*arguments) for arguments in json.load(sys.stdin)], sys.stdout)


@functools.cache
def parse(command, *arguments):
    if not command:
        results = (parse(name, *arguments, OMITTED) for name in COMMANDS)
        found = (result for result in results if not result.error)
        return next(found, Parsed(2, "no command accepts it", None))
    if command not in COMMANDS:
        return Parsed(2, f"there is no command {command}", None)
    result = in_fork(lambda: parse_here(command, arguments))
    if OMITTED in arguments and re.match(r"error: [^-]+ is missing", result.error):
        result = in_fork(lambda: parse_here(command, [*arguments, ANY_ARGUMENT]))
    return result


def in_fork(function):
    """Calls a function in a new process, because a process can define only one command's flags."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w") as file:
            json.dump(function(), file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        result = Parsed(*json.load(file))
    os.waitpid(child, 0)
    return result


def parse_here(command, arguments):
    sys.argv = [command, *(ANY_CONFIG if a == "--config=..." else a for a in arguments)]
    app.run = parse_only
    # Otherwise a command that fails ends this process before the result is written.
    cli._ending_process = contextlib.nullcontext
    status = 0
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            runpy.run_module(f"launch.{command}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
    config = None if status else config_flag.CONFIG.config
    if config is None:
        return Parsed(status, stderr.getvalue(), None)
    try:
        # Settings that exist and have the right type may still exclude each other.
        check_config(config)
    except UsageError as error:
        return Parsed(UsageError.status, f"error: {error}", None)
    return Parsed(status, stderr.getvalue(), config.to_dict())


def parse_only(main, flags_parser):
    """Replaces absl's app.run, which is called once the flags are defined."""
    del main
    module = vars(sys.modules["__main__"])
    argv = completed(sys.argv, module) if OMITTED in sys.argv else sys.argv
    _, *positional = flags_parser(argv)
    # tpu and reproduce check these arguments only when they run.
    for name in ("_parse_subcommand", "_choose_experiments"):
        if name in module and positional != [ANY_ARGUMENT]:
            module[name](positional)
    if positional == ["submit"] and OMITTED not in sys.argv:
        module["_make_job"](datetime.datetime.now(datetime.UTC))


def completed(argv, module):
    """Replaces "..." by the missing required flags, and drops flags without a value."""
    given = [a for a in argv if a != OMITTED]
    names = {a[2:].partition("=")[0] for a in given if a.startswith("--")}
    bare = [a for a in given if re.match("--[^=]*$", a) and not a.startswith("--noconfig.")]
    for name in (flag[2:] for flag in bare):
        if name.startswith("config."):
            config_flag.find_setting(default_config(), name.removeprefix("config."))
        elif name not in flags.FLAGS:
            raise CommandError(f"unknown flag --{name}")
    # absl files the flags of a script under its name, those of a package under the package's.
    modules = (argv[0], module["__package__"])
    own = [flag for name in modules for flag in flags.FLAGS.get_key_flags_for_module(name)]
    required = {flag.name for flag in own if is_required(flag)}
    if len(given) > 1 and given[1] in (subcommands := module.get("_SUBCOMMANDS", {})):
        required |= set(subcommands[given[1]].required)
    if any(re.match(r"(no)?config\.", name) for name in names):
        required.add("config")
    others = [f"--{name}=x" for name in sorted(required - names - {"config"})]
    config = [ANY_CONFIG] if "config" in required - names else []
    return [given[0], *config, *(a for a in given[1:] if a not in bare), *others]


if __name__ == "__main__":
    main()
