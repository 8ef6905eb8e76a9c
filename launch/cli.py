"""Start-up, flags, one-line errors and exit statuses of all commands.

Exit statuses:
  0: success.
  1: a bug, with its traceback; or `bn-keras check` found a fault in the network.
  2: the request cannot be carried out; one line says what was given, what is accepted and what to
    do.
  3: the training diverged.
  4: a cloud job failed, or `bn-keras tpu watch` gave up on it.
  75: a bucket does not answer, even after TensorFlow's own retries of about three minutes per
    request; the same command resumes later (EX_TEMPFAIL of `sysexits.h`).
  130, 143: ended by SIGINT (Ctrl-C) or SIGTERM; a training run saves first, and the same
    command resumes it.
  138: another worker was lost in a run on several machines; start all of them again to resume.
  141: broken pipe, as in `... | head`.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib
import importlib.util
import io
import logging as std_logging
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, TypeVar

# TensorFlow and Keras read these when they are imported, later.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow caches whether an object exists; another process may have written or deleted it since.
os.environ.setdefault("GCS_STAT_CACHE_MAX_AGE", "0")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from absl import app, flags, logging

from . import config_flag
from .command_error import CommandError, did_you_mean
from .config_flag import define_config as define_config
from .help import HELP_FLAGS, format_help, is_required

# Flags defined in this module belong to the command that calls it: --help lists them there.
flags.disclaim_key_flags()

# Statuses of errors that would recur if the command were repeated: an invalid request, divergence.
_RECURRING = (2, 3)
# Environment variable with a file that receives these statuses; see slurm/train.sbatch.
_STATUS_FILE = "BN_KERAS_STATUS_FILE"

_LAUNCH = pathlib.Path(__file__).resolve().parent
_Number = TypeVar("_Number", int, float)


def define_workdir(
    meaning: str = "Folder of the run: its config, metrics and checkpoints.",
    required: bool = True,
) -> flags.FlagHolder[str]:
    """Defines --workdir; its default is "" if it is not required."""
    if required:
        return flags.DEFINE_string("workdir", None, meaning, required=True)
    return flags.DEFINE_string("workdir", "", meaning)


def define_parallel() -> flags.FlagHolder[int]:
    """Defines --parallel."""
    return flags.DEFINE_integer(
        "parallel",
        0,
        "Runs trained at the same time; 0: as many as the devices allow.",
        lower_bound=0,
    )


def parse_item(kind: type[_Number], text: str, flag: str) -> _Number:
    """Parses one item of a list flag; raises CommandError if it is not a number of that type."""
    try:
        return config_flag.parse_value(kind, text)
    except ValueError as error:
        raise CommandError(f"{text!r} in {flag} is invalid: expected {error}") from None


def log_lines(lines: Mapping[str, str]) -> None:
    """Logs the plan of a command, or its results, as one line per name and text."""
    for name, text in lines.items():
        logging.info("%-9s %s", name, text)


def command_line(command: str) -> list[str]:
    """Returns the words that run a command: `bn-keras COMMAND`, or as this process was started."""
    if sys.argv[0].startswith("bn-keras"):
        return ["bn-keras", command]
    return ["python", "-m", f"{__package__}.{command}"]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, run by `bn-keras NAME` or as a script by its module.

    Args:
      module: `__name__` of the module that defines the flags; its docstring is the help.
      main: the function to run; with `positional`, it takes the list of positional arguments.
      positional: name of the positional arguments for messages; "" accepts none.
      optional: accept zero positional arguments; by default at least one is required.
      needs_tensorflow: whether `main` needs TensorFlow.
      make_help: returns the text of --help, given the arguments; None formats the docstring and
        the flags.
    """

    module: str
    main: Callable[..., None]
    positional: str = ""
    optional: bool = False
    needs_tensorflow: bool = True
    make_help: Callable[[list[str]], str] | None = None

    def run(self) -> None:
        """Parses the flags, runs the command and exits with its status."""
        _replace_closed_streams()
        _escape_unknown_characters()
        _begin_logging()
        _accept_sigterm()
        # Flags are accepted after positional arguments, too.
        flags.FLAGS.set_gnu_getopt(True)
        with _ending_process(), exiting_on_error():
            app.run(self._run_main, flags_parser=self._parse)

    @property
    def key_flags(self) -> list[flags.Flag]:
        """The command's own flags."""
        # absl files the flags of a script under the script's name.
        name = sys.argv[0] if self.module == "__main__" else self.module
        return flags.FLAGS.get_key_flags_for_module(name)

    def _parse(self, argv: list[str]) -> list[str]:
        """Parses the flags and loads the config; returns the script and the positional arguments.

        TensorFlow is imported last, so that a mistyped flag is reported immediately.
        """
        if HELP_FLAGS & set(argv):
            print(self._format_help(argv), flush=True)
            sys.exit(0)
        overrides, others = config_flag.split_overrides(_expand_home(word) for word in argv)
        positional = self._parse_flags(others)
        if overrides and "config" not in flags.FLAGS:
            raise CommandError(f"unknown flag {overrides[0]}: this command has no --config")
        source = "config" in flags.FLAGS and flags.FLAGS["config"].value
        if overrides and not source and "workdir" in flags.FLAGS:
            # A command that evaluates runs applies the overrides to the config of the first run.
            source = _config_of_first_run()
        if source:
            with _reported_errors():
                config_flag.CONFIG.load(source, overrides)
        elif overrides:
            raise CommandError(f"{overrides[0]} is invalid without --config: see --help")
        return positional

    def _parse_flags(self, argv: list[str]) -> list[str]:
        try:
            positional = flags.FLAGS(argv)
        except (flags.Error, ValueError) as error:
            raise CommandError(_explain(error)) from None
        for flag in self.key_flags:
            if flag.value == "" and is_required(flag):
                raise CommandError(f"--{flag.name} is empty: see --help")
        if self.positional and not self.optional and len(positional) == 1:
            raise CommandError(f"{self.positional} is missing: see --help")
        if not self.positional and len(positional) > 1:
            raise CommandError(
                f"unexpected argument {positional[1]!r}: flags are written as --flag=value"
            )
        return positional

    def _format_help(self, argv: list[str]) -> str:
        if self.make_help:
            return self.make_help(argv)
        return format_help(sys.modules[self.module].__doc__ or "", self.key_flags)

    def _run_main(self, argv: list[str]) -> None:
        main = functools.partial(self.main, argv[1:]) if self.positional else self.main
        with _reported_errors() if self.needs_tensorflow else contextlib.nullcontext():
            main()
        sys.stdout.flush()


def import_quietly() -> None:
    """Imports bn_keras and drops the messages that its libraries print when they are loaded."""
    with _silenced_stderr():
        importlib.import_module("bn_keras")


def begin_child_process() -> None:
    """Sets up logging in a child process, which trains one of several runs."""
    _escape_unknown_characters()
    flags.FLAGS.mark_as_parsed()
    _begin_logging()
    _drop_foreign_logs()


# A child process imports the command's module, and thereby this one, before anything else.
if multiprocessing.parent_process() is not None:
    import_quietly()


@contextlib.contextmanager
def exiting_on_error() -> Iterator[None]:
    """Turns an error that ends a command into one line and an exit status."""
    try:
        yield
        sys.stdout.flush()
    except CommandError as error:
        _fail(error, error.status)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        _discard_stdout()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        # Errors of files have a name or are reported as StorageErrors.
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _discard_stdout()
        _fail(f"standard output cannot be written: {error.strerror}", 2)


def _discard_stdout() -> None:
    """Redirects standard output, which Python flushes once more at exit, where it must not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _ending_process() -> Iterator[None]:
    """Ends the process of a failed command, even if its threads or child processes still run.

    Python's own exit waits for them, and for TensorFlow's iterators and collectives, which may wait
    for each other: the process would hang and keep its devices.
    """
    try:
        yield
        return
    except SystemExit as end:
        if not end.code:
            raise
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    for child in multiprocessing.active_children():
        # A run that is killed resumes from its last checkpoint.
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _fail(reason: object, status: int) -> NoReturn:
    """Prints an error on one line and exits with a status."""
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    if status in _RECURRING and _STATUS_FILE in os.environ:
        with contextlib.suppress(OSError), open(os.environ[_STATUS_FILE], "a") as file:
            file.write(f"{status}\n")
    sys.exit(status)


@contextlib.contextmanager
def _reported_errors() -> Iterator[None]:
    """Imports bn_keras and TensorFlow, and turns their expected errors into CommandErrors."""
    try:
        with _silenced_stderr():
            import tensorflow as tf

            from bn_keras.errors import BucketUnavailableError, ReportedError, TrainingStoppedError
            from bn_keras.storage import is_temporary, reason_of
    except ImportError as error:
        raise CommandError(str(error)) from None
    _drop_foreign_logs()

    try:
        yield
    except (ReportedError, TrainingStoppedError) as error:
        raise CommandError(str(error), error.status) from None
    except (tf.errors.ResourceExhaustedError, MemoryError) as error:
        reason = (str(error) or "no memory is left").splitlines()[0]
        raise CommandError(
            f"out of memory ({reason}): in training, raise train.micro_batches or lower"
            " train.global_batch_size; in an evaluation, lower evaluation.global_batch_size;"
            " otherwise lower data.image_size or use fewer crops"
        ) from None
    except tf.errors.OpError as error:
        if "gs://" not in error.message:
            raise
        if is_temporary(error):
            raise CommandError(
                f"{reason_of(error)}: start the same command again later",
                BucketUnavailableError.status,
            ) from None
        raise CommandError(
            f"the bucket cannot be used ({error.message}): check that it exists, and log in with"
            " `gcloud auth application-default login`"
        ) from None


def _replace_closed_streams() -> None:
    """Discards what is printed to a stream that the shell has closed, as in `... >&-`."""
    # The files stay open until the process ends.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


def _escape_unknown_characters() -> None:
    """Prints characters that the terminal's encoding lacks, such as é in ASCII, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _begin_logging() -> None:
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(
        std_logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%m-%d %H:%M:%S")
    )


def _accept_sigterm() -> None:
    """Ends the first process of a container on SIGTERM, which it ignores by default."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _drop_foreign_logs() -> None:
    std_logging.getLogger("tensorflow").setLevel(std_logging.ERROR)
    logging.get_absl_logger().addFilter(_is_own_record)


def _is_own_record(record: std_logging.LogRecord) -> bool:
    # TFDS and others log progress and deprecations through the same logger.
    parents = pathlib.Path(record.pathname).resolve().parents
    return record.levelno >= std_logging.ERROR or any(f in parents for f in _own_folders())


@functools.cache
def _own_folders() -> list[pathlib.Path]:
    spec = importlib.util.find_spec("bn_keras")
    folders = (spec.submodule_search_locations if spec else None) or ()
    return [_LAUNCH, *(pathlib.Path(folder).resolve() for folder in folders)]


@contextlib.contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Drops what TensorFlow's libraries print when loaded, before their log levels apply."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _config_of_first_run() -> str:
    """Returns the path of the config of the first --workdir; "" without one."""
    workdirs = flags.FLAGS["workdir"].value
    return (
        f"{workdirs[0].rstrip('/')}/config.json" if isinstance(workdirs, list) and workdirs else ""
    )


def _expand_home(argument: str) -> str:
    # Most shells do not expand the "~" of --workdir=~/runs.
    home = os.path.expanduser("~")
    return re.sub(r"^(--?[\w.]+=)~(?=/|$)", lambda match: match[1] + home, argument)


def _explain(error: Exception) -> str:
    """Rewords absl's error about the flags."""
    reason = str(error).strip().splitlines()[-1].strip()
    if missing := re.search(r"--(\w+)=None.* must have a value other than None", reason):
        return f"--{missing[1]} is missing: see --help"
    if without_value := re.match(r"Missing value for flag (--?\w+)", reason):
        return f"{without_value[1]} has no value: expected {without_value[1]}=VALUE"
    if isinstance(error, flags.UnrecognizedFlagError):
        flag = f"--{error.flagname}"
        return f"unknown flag {flag}{did_you_mean(flag, map('--{}'.format, flags.FLAGS))}"
    if invalid := re.match(r"flag --(\w+)=(.*?): (.*)", reason):
        name, text, reason = invalid.groups()
        if reason.startswith("already defined"):
            return f"--{name} is repeated: expected one value"
        return f"--{name}={text} is invalid: expected {_expected_value(flags.FLAGS[name], reason)}"
    return reason


def _expected_value(flag: flags.Flag, reason: str) -> str:
    if any(reason == validator.message for validator in flag.validators):
        return reason
    if flag.boolean:
        return "true or false"
    if values := getattr(flag.parser, "enum_values", None):
        return "one of " + ", ".join(values)
    return flag.parser.syntactic_help
