"""What the commands share: quiet start-up, flags, errors on one line, exit statuses.

Statuses: 0, done; 1, a bug with its traceback, or a fault found by `check`; 2, a request that cannot
be carried out; 3, the training diverged; 4, a cloud job failed; 5, another worker was lost; 130, 143
and 141, ended by SIGINT (Ctrl-C), by SIGTERM, and by a broken pipe. docs/launching.md documents them.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import logging as std_logging
import multiprocessing
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

# Read by TensorFlow when it is imported, which is after this module.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from .command_error import CommandError
from .help import format_help, is_required

# Flags defined in this module belong to the command that asks for them: --help shows them there.
flags.disclaim_key_flags()

_LAUNCH = pathlib.Path(__file__).resolve().parent
_OVERRIDE = re.compile(r"--?(?:no)?config\.")
_Number = TypeVar("_Number", int, float)


@dataclasses.dataclass
class ConfigFlag:
    """--config and its overrides --config.KEY=VALUE, as `define_config` defines them.

    Attributes:
      value: the config with its overrides, locked; None if --config was not given.
      given: what --config was given; "" if nothing.
      overrides: the values given by --config.KEY=VALUE.
    """

    value: ConfigDict | None = None
    given: str = ""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Returns what was given, for the log."""
        overrides = ", ".join(f"{key}={value}" for key, value in self.overrides.items())
        return (self.given or "none") + (overrides and f" with {overrides}")

    def load(self, given: str | None, overrides: Sequence[str]) -> None:
        """Loads a config and applies overrides to it.

        Args:
          given: what --config was given.
          overrides: arguments --config.KEY=VALUE.

        Raises:
          CommandError: no such config, or an override that it does not accept.
        """
        if not given:
            if overrides:
                raise CommandError(f"{overrides[0]} is given without --config: see --help")
            return
        with _bn_keras_errors():
            from bn_keras.training.config_files import load_config

            self.given, self.value = given, load_config(given)
        # Locked, a config would not accept values for settings that are None.
        own = flags.FlagValues()
        try:
            config_flags.DEFINE_config_dict(
                "config", self.value, flag_values=own, sys_argv=["", *overrides]
            )
            own(["", *overrides])
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
            reason = _explain_override(self.value, overrides) or _last_line(error)
            raise CommandError(reason) from None
        self.value = own["config"].value
        self.overrides = config_flags.get_override_values(own["config"])


# The flag of the command that runs in this process, if it has one.
_config_flag = ConfigFlag()


def define_config(required: bool = True) -> ConfigFlag:
    """Defines --config and its overrides --config.KEY=VALUE."""
    flags.DEFINE_string(
        "config",
        None,
        "A name such as bn_x5, a Python file with get_config(), or a run's config.json."
        " --config.KEY=VALUE overrides a setting.",
        required=required,
    )
    return _config_flag


def define_workdir(
    meaning: str = "Folder of the run: its config, metrics and checkpoints.",
    required: bool = True,
) -> flags.FlagHolder[str]:
    """Defines --workdir."""
    return flags.DEFINE_string("workdir", None, meaning, required=required)


def define_parallel() -> flags.FlagHolder[int]:
    """Defines --parallel."""
    return flags.DEFINE_integer(
        "parallel",
        0,
        "Runs trained at the same time; 0: as many as the devices allow.",
        lower_bound=0,
    )


def parse(kind: type[_Number], given: str, flag: str) -> _Number:
    """Reads one value of a list flag; raises CommandError if it is not a number of that kind."""
    if not _is_a(given, kind):
        raise CommandError(f"{flag} takes values of type {kind.__name__}, not {given!r}")
    return kind(given)


def log_lines(lines: Mapping[str, str]) -> None:
    """Logs what a command is about to do, or where things are: a name and a text on each line."""
    for name, text in lines.items():
        logging.info("%-9s %s", name, text)


def command_line(command: str) -> list[str]:
    """Returns the words that start another command, in the way that this one was started."""
    if sys.argv[0].startswith("bn-keras"):
        return ["bn-keras", command]
    return ["python", "-m", f"{__package__}.{command}"]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command; `run` is what its module does as a script, and what `bn-keras` calls.

    Args:
      module: `__name__` of the module that defines the flags; its docstring is the help.
      main: without arguments; or, with `positional`, of the list of positional arguments.
      positional: name of the positional arguments, of which one or more are then expected.
      optional: whether none of them is accepted as well.
      needs_tensorflow: whether `main` needs TensorFlow.
      make_help: returns the text of --help from the arguments; None formats docstring and flags.
    """

    module: str
    main: Callable[..., None]
    positional: str = ""
    optional: bool = False
    needs_tensorflow: bool = True
    make_help: Callable[[list[str]], str] | None = None

    def run(self) -> None:
        """Parses the flags, runs the command and exits with its status."""
        _begin_logging()
        # A flag may come after the positional arguments, too.
        flags.FLAGS.set_gnu_getopt(True)
        app.run(self._act, flags_parser=self._parse_flags)

    @property
    def flags(self) -> list[flags.Flag]:
        """The command's own flags."""
        # absl files the flags of a script under the script's name.
        name = sys.argv[0] if self.module == "__main__" else self.module
        return flags.FLAGS.get_key_flags_for_module(name)

    def _act(self, argv: list[str]) -> None:
        main = functools.partial(self.main, argv[1:]) if self.positional else self.main
        with _exiting_with_status():
            if self.needs_tensorflow:
                with _bn_keras_errors():
                    main()
            else:
                main()
            sys.stdout.flush()

    def _parse_flags(self, argv: list[str]) -> list[str]:
        with _exiting_with_status():
            if {"--help", "-help", "-h", "-?"} & set(argv):
                print(self._help(argv))
                sys.stdout.flush()
                sys.exit(0)
            overrides, others = _split_overrides([_expand_home(given) for given in argv])
            rest = self._parse_own_flags(others)
            if "config" in flags.FLAGS:
                _config_flag.load(flags.FLAGS["config"].value, overrides)
            elif overrides:
                raise CommandError(f"unknown flag {overrides[0]}: this command has no --config")
            return rest
        raise AssertionError  # Not reached: the block above returns or exits.

    def _parse_own_flags(self, argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, ValueError) as error:
            raise CommandError(_explain_flag(error)) from None
        for flag in self.flags:
            if flag.value == "" and is_required(flag):
                raise CommandError(f"--{flag.name} is empty: see --help")
        if self.positional and not self.optional and len(rest) == 1:
            raise CommandError(f"{self.positional} is missing: see --help")
        if not self.positional and len(rest) > 1:
            raise CommandError(f"unexpected argument {rest[1]!r}: values are given as --flag=value")
        return rest

    def _help(self, argv: list[str]) -> str:
        if self.make_help:
            return self.make_help(argv)
        return format_help(sys.modules[self.module].__doc__ or "", self.flags)


def import_quietly() -> None:
    """Imports bn_keras without what its libraries print when they are loaded."""
    with _native_stderr_closed():
        importlib.import_module("bn_keras")


def begin_process() -> None:
    """Sets up logging in a process that was started to train beside others."""
    flags.FLAGS.mark_as_parsed()
    _begin_logging()
    _drop_foreign_logs()


# A process that trains beside others imports the command's module before anything else.
if multiprocessing.parent_process() is not None:
    import_quietly()


def fail(reason: object, status: int) -> NoReturn:
    """Prints an error on one line and exits with a status."""
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(status)


def _begin_logging() -> None:
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(
        std_logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%m-%d %H:%M:%S")
    )


@contextlib.contextmanager
def _exiting_with_status() -> Iterator[None]:
    """Turns the errors that end a command into a line and an exit status."""
    try:
        yield
    except CommandError as error:
        fail(error, error.status)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:
        # What is left in the buffer must not be written again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def _bn_keras_errors() -> Iterator[None]:
    """Imports bn_keras and turns its errors, and some of TensorFlow's, into CommandErrors."""
    try:
        with _native_stderr_closed():
            import tensorflow as tf

            from bn_keras.errors import ReportedError, TrainingStoppedError
    except ImportError as error:
        raise CommandError(str(error)) from None
    _drop_foreign_logs()

    try:
        yield
    except (ReportedError, TrainingStoppedError) as error:
        raise CommandError(str(error), error.status) from None
    except tf.errors.ResourceExhaustedError as error:
        reason = error.message.splitlines()[0]
        raise CommandError(
            f"out of memory ({reason}): raise train.micro_batches, or lower"
            " train.global_batch_size or data.image_size"
        ) from None
    except tf.errors.OpError as error:
        if "gs://" not in error.message:
            raise
        raise CommandError(
            f"the bucket cannot be reached ({error.message}): check that it exists, and log in with"
            " `gcloud auth application-default login`"
        ) from None


def _drop_foreign_logs() -> None:
    std_logging.getLogger("tensorflow").setLevel(std_logging.ERROR)
    logging.get_absl_logger().addFilter(_is_ours)


@functools.cache
def _own_folders() -> list[pathlib.Path]:
    spec = importlib.util.find_spec("bn_keras")
    locations = spec.submodule_search_locations if spec else None
    return [_LAUNCH, *(pathlib.Path(place).resolve() for place in locations or ())]


def _is_ours(record: std_logging.LogRecord) -> bool:
    # TFDS and others log their progress and their own deprecations through the same logger.
    parents = pathlib.Path(record.pathname).resolve().parents
    return record.levelno >= std_logging.ERROR or any(f in parents for f in _own_folders())


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Drops what TensorFlow's libraries print when loaded, before their log levels apply."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _expand_home(argument: str) -> str:
    # Most shells leave the "~" of --workdir=~/runs alone.
    home = os.path.expanduser("~")
    return re.sub(r"^(--?[\w.]+=)~(?=/|$)", lambda match: match[1] + home, argument)


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separates --config.KEY=VALUE, or --config.KEY VALUE, from the other arguments."""
    overrides: list[str] = []
    others: list[str] = []
    waiting = iter(argv)
    for argument in waiting:
        if not _OVERRIDE.match(argument):
            others.append(argument)
        elif "=" in argument or argument.lstrip("-").startswith("no"):
            overrides.append(argument)
        else:
            value = next(waiting, None)
            overrides += [argument] if value is None else [f"{argument}={value}"]
    return overrides, others


def _explain_override(config: ConfigDict, overrides: Sequence[str]) -> str | None:
    """Returns what is wrong with the first override that the config does not accept."""
    for argument in overrides:
        name, _, given = argument.lstrip("-").partition("=")
        key = name.partition(".")[2]
        node: Any = config
        parent, path = config, key.split(".")
        for i, part in enumerate(path):
            if not isinstance(node, ConfigDict) or part not in node:
                section = ".".join(path[:i])
                keys = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "no keys"
                return f"unknown config key {key!r}: {section or 'the config'} has {keys}"
            parent, node = node, node[part]
        if isinstance(node, ConfigDict):
            return f"--config.{key} is a section: override one of {', '.join(sorted(node))}"
        kind = parent.get_type(path[-1])
        if not _is_a(given, kind):
            return f"--config.{key} takes a value of type {kind.__name__}, not {given!r}"
    return None


def _is_a(given: str, kind: type) -> bool:
    if kind is bool:
        return given.lower() in ("true", "false", "1", "0", "")
    try:
        kind(given)
    except ValueError:
        return False
    return True


def _last_line(error: Exception) -> str:
    return str(error.args[0] if error.args else error).strip().splitlines()[-1].strip()


def _explain_flag(error: Exception) -> str:
    reason = _last_line(error)
    if "must have a value other than None" in reason:
        return f"--{reason.split('--')[1].split('=')[0]} is missing: see --help"
    # Python's own reasons, from within absl.
    untyped = re.match(r"flag --(\w+)=(.*): (\('Non-bool|invalid literal|could not conv)", reason)
    if untyped:
        name, given, _ = untyped.groups()
        return f"--{name} takes a value of type {flags.FLAGS[name].flag_type()}, not {given!r}"
    return reason.removeprefix("ValueError: ")
