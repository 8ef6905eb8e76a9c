"""What the commands have in common: quiet start-up, flags, errors on one line, exit statuses.

The statuses are 0: done; 1: a bug, with its traceback, or from launch.check a fault of the network;
2: what was asked for can't be done; 3: the training diverged; 4: a job in the cloud failed; 5:
another worker of a training was lost; 130, 143 and 141: ended by SIGINT (Ctrl-C), by SIGTERM, and
because whoever read the output has gone. docs/launching.md tells users of them.
"""

import contextlib
import difflib
import functools
import importlib
import logging as std_logging
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

# Read by TensorFlow when it is imported, which is after this module.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import default
from launch.errors import CommandError
from launch.help import format_help, is_required

# The flags defined in here are those of the command that asks for them: --help shows them there.
flags.disclaim_key_flags()

_OURS = [pathlib.Path(__file__).resolve().parents[1] / name for name in ("bn_keras", "launch")]
_OVERRIDE = "--config."


def define_config(required: bool = True) -> flags.FlagHolder[ConfigDict]:
    """Defines --config and its overrides --config.KEY=VALUE."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Python file with get_config(), such as configs/bn_x5.py. --config.KEY=VALUE overrides one"
        " of its values; configs/default.py says what each means.",
        lock_config=True,
    )
    if required:
        flags.mark_flag_as_required("config")
    return holder


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
        "How many runs go side by side at most; 0: as many as the devices allow.",
        lower_bound=0,
    )


def parse(kind: type, given: str, flag: str) -> int | float:
    """Reads one value of a list flag; raises CommandError if it is no number of that kind."""
    if not _is_a(given, kind):
        raise CommandError(f"{flag} takes values of type {kind.__name__}, not {given!r}")
    return kind(given)


def tell(lines: Mapping[str, str]) -> None:
    """Logs what a command is about to do, or where things lie: a name and a text on each line."""
    for name, text in lines.items():
        logging.info("%-9s %s", name, text)


def describe_config() -> str:
    """Names the file of --config, if there is one, and what overrides it."""
    config = flags.FLAGS["config"]
    if not config.present:
        return "none"
    overrides = config_flags.get_override_values(config)
    given = ", ".join(f"{key}={value}" for key, value in overrides.items())
    return config_flags.get_config_filename(config) + (given and f" with {given}")


def run(
    main: Callable[..., None],
    positional: str = "",
    optional: bool = False,
    needs_tensorflow: bool = True,
    make_help: Callable[[list[str]], str] | None = None,
) -> None:
    """Parses the flags, runs a command's main function and exits with its status.

    Args:
      main: without arguments; or, where positional is given, taking those as a list.
      positional: what the command calls its arguments that are no flags, of which it then takes
        one or more.
      optional: whether it takes none of them, too.
      needs_tensorflow: whether it has to wait for TensorFlow to be imported.
      make_help: gives what --help prints, from the arguments; else that is the command's docstring
        and its flags.
    """
    _begin_logging()
    # A flag may stand behind the arguments, too.
    flags.FLAGS.set_gnu_getopt(True)

    def act(argv: list[str]) -> None:
        command = functools.partial(main, argv[1:]) if positional else main
        try:
            _on_tensorflow(command) if needs_tensorflow else command()
            sys.stdout.flush()
        except CommandError as error:
            fail(error, error.status)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except BrokenPipeError:
            # Whoever read the result has had enough. What is left must not be tried again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)

    def parse_flags(argv: list[str]) -> list[str]:
        rest = _parse_flags(argv, make_help or _help)
        if positional and not optional and len(rest) == 1:
            fail(f"{positional} is missing: see --help", 2)
        if not positional and len(rest) > 1:
            fail(f"unexpected argument {rest[1]!r}: values are given as --flag=value", 2)
        return rest

    app.run(act, flags_parser=parse_flags)


def import_quietly() -> None:
    """Imports what tells of itself as it is loaded, in a process that is about to import it."""
    with _native_stderr_closed():
        importlib.import_module("bn_keras")


def begin_process() -> None:
    """Makes a process that was started to train beside others tell of it as this one does."""
    flags.FLAGS.mark_as_parsed()
    _begin_logging()
    _leave_out_others()


def _begin_logging() -> None:
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(
        std_logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%m-%d %H:%M:%S")
    )


def fail(reason: object, status: int) -> NoReturn:
    """Prints an error on one line and exits with a status."""
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(status)


def _on_tensorflow(main: Callable[[], None]) -> None:
    """Runs main with TensorFlow imported, and gives its errors the statuses of a command."""
    # Only now, since a flag that can't be parsed should not have to wait for TensorFlow.
    try:
        with _native_stderr_closed():
            import tensorflow as tf

            from bn_keras.errors import (
                TrainingDivergedError,
                TrainingStoppedError,
                UsageError,
                WorkerLostError,
            )
    except ImportError as error:
        raise CommandError(str(error)) from None
    _leave_out_others()

    try:
        main()
    except UsageError as error:
        raise CommandError(str(error)) from None
    except TrainingDivergedError as error:
        raise CommandError(str(error), 3) from None
    except TrainingStoppedError as error:
        raise CommandError(str(error), 128 + error.signum) from None
    except WorkerLostError as error:
        raise CommandError(str(error), 5) from None
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
            f"the bucket can't be reached ({error.message}): see whether it is there, and log in by"
            " `gcloud auth application-default login`"
        ) from None


def _leave_out_others() -> None:
    std_logging.getLogger("tensorflow").setLevel(std_logging.ERROR)
    logging.get_absl_logger().addFilter(_is_ours)


def _is_ours(record: std_logging.LogRecord) -> bool:
    # TFDS and others tell through the same logger how they go about their work, and warn of what
    # is deprecated within it.
    parents = pathlib.Path(record.pathname).resolve().parents
    return record.levelno >= std_logging.ERROR or any(folder in parents for folder in _OURS)


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Drops what TensorFlow's libraries print when loaded, before their log levels hold."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _help(argv: list[str]) -> str:
    # Under this name absl has the flags of the module that is run.
    return format_help(
        sys.modules["__main__"].__doc__, flags.FLAGS.get_key_flags_for_module(argv[0])
    )


def _parse_flags(argv: list[str], make_help: Callable[[list[str]], str]) -> list[str]:
    if {"--help", "-help", "-h", "-?"} & set(argv):
        print(make_help(argv))
        sys.exit(0)
    # Most shells leave "~" alone in there, and nobody means a folder of that name.
    home = os.path.expanduser("~")
    argv = [re.sub(r"^(--?[\w.]+=)~(?=/|$)", lambda m: m[1] + home, given) for given in argv]
    try:
        rest = flags.FLAGS(argv)
        for flag in flags.FLAGS.get_key_flags_for_module(argv[0]):
            if flag.value == "" and is_required(flag):
                raise flags.ValidationError(f"--{flag.name} is empty: see --help")
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            # A file that could not be loaded is reported at the first look at its config.
            flags.FLAGS["config"].value.seed  # noqa: B018
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        fail(_explain_override(argv) or _explain_flag(error), 2)
    return rest


def _explain_override(argv: list[str]) -> str | None:
    """Says what is wrong with the first --config.KEY=VALUE that names no key of the schema."""
    for argument in argv:
        if not argument.startswith(_OVERRIDE):
            continue
        key, _, given = argument.removeprefix(_OVERRIDE).partition("=")
        node = default.get_config()
        for i, part in enumerate(path := key.split(".")):
            if not isinstance(node, ConfigDict) or part not in node:
                section = ".".join(path[:i])
                keys = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "no keys"
                return f"unknown config key {key!r}: {section or 'the config'} has {keys}"
            node = node[part]
        if isinstance(node, ConfigDict):
            return f"{_OVERRIDE}{key} is a section: override one of {', '.join(sorted(node))}"
        if not _is_a(given, type(node)):
            return f"{_OVERRIDE}{key} takes a value of type {type(node).__name__}, not {given!r}"
    return None


def _is_a(given: str, kind: type) -> bool:
    if kind is bool:
        return given.lower() in ("true", "false", "1", "0", "")
    try:
        kind(given)
    except ValueError:
        return False
    return True


def _explain_flag(error: Exception) -> str:
    # What config_flags says of a file is several lines, of which the last has the reason.
    reason = str(error.args[0] if error.args else error).strip().splitlines()[-1].strip()
    if "must have a value other than None" in reason:
        return f"--{reason.split('--')[1].split('=')[0]} is missing: see --help"
    # Each --config defines its overrides.
    if isinstance(error, flags.DuplicateFlagError):
        return "--config is given twice: give it once"
    # Python's own reasons, from within absl.
    untyped = re.match(r"flag --(\w+)=(.*): (\('Non-bool|invalid literal|could not conv)", reason)
    if untyped:
        name, given, _ = untyped.groups()
        return f"--{name} takes a value of type {flags.FLAGS[name].flag_type()}, not {given!r}"
    missing = re.search("No such file or directory: '(.*)'", reason)
    if missing:
        return f"--config can't be loaded: there is no {missing[1]!r}{_suggest_config(missing[1])}"
    if isinstance(error, OSError) or "get_config" in reason:
        return f"--config can't be loaded: {reason}"
    return reason.removeprefix("ValueError: ")


def _suggest_config(given: str) -> str:
    stems = [file.stem for file in pathlib.Path(default.__file__).parent.glob("*.py")]
    nearest = difflib.get_close_matches(pathlib.Path(given).stem, stems, n=1)
    return f" (did you mean 'configs/{nearest[0]}.py'?)" if nearest else ""
