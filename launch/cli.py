"""What the commands have in common: quiet start-up, flags, errors on one line, exit statuses.

0: done. 1: a bug, with its traceback; from launch.check, that the network has a fault. 2: what was
asked for can't be done. 3: the training diverged. 4: a job in the cloud failed. 130: interrupted.
"""

import contextlib
import logging as std_logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

# Read by TensorFlow when it is imported, which is after this module.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import default

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
) -> flags.FlagHolder[str]:
    """Defines --workdir, which has to be given."""
    return flags.DEFINE_string("workdir", None, meaning, required=True)


def parse(kind: type, given: str, flag: str) -> int | float:
    """Reads one value of a list flag; raises UsageError if it is no number of that kind."""
    from bn_keras.errors import UsageError

    if not _is_a(given, kind):
        raise UsageError(f"{flag} takes values of type {kind.__name__}, not {given!r}")
    return kind(given)


def run(main: Callable[..., None], positional: str = "") -> None:
    """Parses the flags, runs a command's main function and exits with its status.

    Args:
      main: without arguments; or, where positional is given, taking those as a list.
      positional: what the command calls its arguments that are no flags, of which it then takes
        one or more.
    """
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    # A flag may stand behind the arguments, too.
    flags.FLAGS.set_gnu_getopt(True)
    app.run(
        lambda argv: _exit_with_status(lambda: main(argv[1:]) if positional else main()),
        flags_parser=lambda argv: _parse_flags(argv, positional),
    )


def fail(reason: object, status: int) -> NoReturn:
    """Prints an error on one line and exits with a status."""
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(status)


def _exit_with_status(main: Callable[[], None]) -> None:
    # Only now, since a flag that can't be parsed should not have to wait for TensorFlow.
    try:
        with _native_stderr_closed():
            import tensorflow as tf

            from bn_keras.errors import TrainingDivergedError, UsageError
    except ImportError as error:
        fail(error, 2)
    tf.get_logger().setLevel("ERROR")
    logging.get_absl_logger().addFilter(_is_ours)

    try:
        main()
    except UsageError as error:
        fail(error, 2)
    except TrainingDivergedError as error:
        fail(error, 3)
    except tf.errors.ResourceExhaustedError as error:
        reason = error.message.splitlines()[0]
        fail(f"out of memory ({reason}): lower train.global_batch_size or data.image_size", 2)
    except KeyboardInterrupt:
        fail("interrupted; a training goes on from its last checkpoint", 130)


def _is_ours(record: std_logging.LogRecord) -> bool:
    # TensorFlow and TFDS tell through the same logger how they go about their work.
    parents = pathlib.Path(record.pathname).resolve().parents
    return record.levelno >= std_logging.WARNING or any(folder in parents for folder in _OURS)


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


def _parse_flags(argv: list[str], positional: str) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            # A file that could not be loaded is reported at the first look at its config.
            flags.FLAGS["config"].value.seed  # noqa: B018
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        fail(_explain_override(argv) or _explain_flag(error), 2)
    if positional and len(rest) == 1:
        fail(f"{positional} is missing: see --help", 2)
    if not positional and len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}: values are given as --flag=value", 2)
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
    if isinstance(error, OSError) or "get_config" in reason:
        return f"--config can't be loaded: {reason}"
    return reason
