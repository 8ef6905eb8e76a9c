"""Files, local or in a bucket: complete writes, fresh reads, and errors on one line."""

import contextlib
import errno
import functools
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import tensorflow as tf

from bn_keras.errors import BucketUnavailableError, StorageError, UsageError
from bn_keras.text import first_line

AnyPath = str | os.PathLike

# Smaller files are read or written in one piece.
_PIECE_BYTES = 2**26
_MISSING_ERRORS = (FileNotFoundError, NotADirectoryError, tf.errors.NotFoundError)
# Errors that TensorFlow's client of a bucket raises after its own retries, which take about three
# minutes.
_TEMPORARY_ERRORS = (
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
    tf.errors.UnavailableError,
)
# The client does not retry a name that cannot be resolved, nor an object that became shorter while
# it was read.
_TEMPORARY_REASONS = ("Couldn't resolve host", "File contents are inconsistent")
# ram:// is TensorFlow's file system in memory.
_SCHEMES = ("gs", "ram")
# Characters that make TensorFlow search for files of other names, and bytes that are not UTF-8.
_PATTERN = re.compile(r"[*?\[\]\\\ud800-\udfff]")


def is_local(path: AnyPath) -> bool:
    """Returns whether a path is on a file system of this machine, not in a bucket.

    Raises:
      UsageError: the path is a URL of another kind.
    """
    scheme, separator, _ = os.fspath(path).partition("://")
    if separator and scheme not in _SCHEMES:
        raise UsageError(
            f"path {os.fspath(path)!r} is invalid: expected a path on this machine, or"
            " gs://BUCKET/PATH"
        )
    return not separator


def is_temporary(error: Exception) -> bool:
    """Returns whether an error is a bucket's and may not recur when the command is repeated."""
    return isinstance(error, tf.errors.OpError) and (
        isinstance(error, _TEMPORARY_ERRORS) or any(r in str(error) for r in _TEMPORARY_REASONS)
    )


@contextlib.contextmanager
def writing(what: str, advice: str = "") -> Iterator[None]:
    """Turns file errors of Python and TensorFlow, such as a full disk, into StorageError.

    Args:
      what: name of what the block writes.
      advice: what to do; "" for none.

    Raises:
      StorageError: "WHAT cannot be written: REASON; ADVICE".
      BucketUnavailableError: the same, if the bucket does not answer.
    """
    with _reporting(f"{what} cannot be written", advice):
        yield


@contextlib.contextmanager
def reporting_outages(what: str) -> Iterator[None]:
    """Reports a bucket that does not answer, even if a library has wrapped TensorFlow's error.

    Other errors pass unchanged.

    Args:
      what: name of what the block reads.

    Raises:
      BucketUnavailableError: "WHAT cannot be read: REASON".
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while isinstance(cause, Exception) and not is_temporary(cause):
            cause = cause.__cause__
        if not isinstance(cause, Exception):
            raise
        raise BucketUnavailableError(f"{what} cannot be read: {reason_of(cause)}") from None


@contextlib.contextmanager
def reading(what: AnyPath) -> Iterator[None]:
    """Turns file errors into StorageError: "WHAT cannot be read: REASON"; see `writing`."""
    with _reporting(f"{what} cannot be read"):
        yield


@contextlib.contextmanager
def _reporting(failure: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except StorageError:
        # A nested block has already named the file more precisely.
        raise
    except (OSError, tf.errors.OpError) as error:
        kind = BucketUnavailableError if is_temporary(error) else StorageError
        advice = advice and f"; {advice}"
        raise kind(f"{failure}: {reason_of(error)}{advice}") from None


def reason_of(error: Exception) -> str:
    """Returns the cause in the message of a file error, without the path.

    TensorFlow's messages have the form "a/temporary/file; No space left on device", or "All 10
    retry attempts failed. The last failure: REASON".
    """
    reason = first_line(error).rpartition("; ")[2]
    retried = re.match(r"All \d+ retry attempts failed. The last failure: (.*)", reason)
    return f"the bucket does not answer ({retried[1]})" if retried else reason


def read(path: AnyPath) -> bytes | None:
    """Reads a file as it is now; returns None if it does not exist.

    Raises:
      StorageError: the file cannot be read.
    """
    with reading(path):
        try:
            with _open(path, "rb") as file:
                # TensorFlow's read of a whole object ends at a size that it caches for seconds;
                # another process may have written the object since.
                return b"".join(_pieces(file))
        except _MISSING_ERRORS:
            return None


def read_text(path: AnyPath, what: str, expected: str) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark.

    Args:
      path: path of the file.
      what: name of such a file, for errors.
      expected: content of such a file, for errors.

    Raises:
      UsageError: the file does not exist or is not UTF-8.
    """
    content = read(path)
    if content is None:
        raise UsageError(f"{what} {path} does not exist: expected {expected}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{what} {path} is not UTF-8: save it in that encoding") from None


def copy(source: AnyPath, target: AnyPath) -> bool:
    """Copies a file to or from a bucket; returns whether the source exists.

    Raises:
      OSError, tf.errors.OpError: the source cannot be read, or the target cannot be written.
    """
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(_open(source, "rb"))
            pieces = _pieces(file)
            first = next(pieces, b"")
        except _MISSING_ERRORS:
            return False
        # Opened after the first read: closing a file in a bucket writes it.
        with _open(target, "wb") as copied:
            copied.write(first)
            for piece in pieces:
                copied.write(piece)
    return True


def write_atomically(path: AnyPath, content: str | bytes) -> None:
    """Writes a file; if that fails, the previous file remains."""
    content = content.encode() if isinstance(content, str) else content
    if not is_local(path):
        # An object in a bucket is replaced as a whole.
        with _open(path, "wb") as file:
            file.write(content)
        return
    unfinished = f"{os.fspath(path)}.unfinished"
    with open(unfinished, "wb") as file:
        file.write(content)
    move(unfinished, path)


def move(source: AnyPath, target: AnyPath) -> None:
    """Moves a local file, and replaces the target completely or not at all.

    A local target is in the same file system. The file is flushed to disk before it is renamed, and
    the folder before the function returns. After a loss of power, the target is the previous or the
    new file, and no later removal has reached the disk before the move.
    """
    if is_local(target):
        _flush(source, os.O_RDWR)  # Windows flushes only files that are open for writing.
        os.replace(source, target)
        if os.name != "nt":
            _flush_folder(os.path.dirname(os.path.abspath(target)))
    else:
        copy(source, target)
        os.remove(source)


@contextlib.contextmanager
def _exiting_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit in the block, unless the program handles it itself."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def replacing(output: AnyPath, folder: bool = False) -> Iterator[pathlib.Path]:
    """Yields a local path for a file or a folder, which replaces the output if the block succeeds.

    If the block or the replacement fails, or SIGTERM ends the process, a local output is as it was,
    and no temporary file remains. A folder in a bucket cannot be replaced atomically: its own
    files, such as the saved_model.pb of a SavedModel, are written after those of folders in it.

    Args:
      output: path of the output, which may exist.
      folder: whether the block writes a folder; it writes a file otherwise.

    Raises:
      UsageError: the output is a folder, and the block writes a file, or the other way round.
      StorageError: the output cannot be written.
    """
    # In a bucket, a file and a folder may have the same name.
    if is_local(output) and os.path.exists(output) and os.path.isdir(output) != folder:
        found, expected = ("file", "folder") if folder else ("folder", "file")
        raise UsageError(f"output {output} is a {found}: expected the path of a {expected}")
    name = os.path.basename(os.fspath(output))
    with contextlib.ExitStack() as cleanup:
        with writing(f"output {output}"):
            parent = None
            if is_local(output):
                # In the same folder: a move is atomic only within one file system.
                parent = os.path.dirname(os.path.abspath(output))
                os.makedirs(parent, exist_ok=True)
            temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
        cleanup.enter_context(_exiting_on_sigterm())
        cleanup.callback(shutil.rmtree, temporary, ignore_errors=True)
        unfinished = temporary / name
        yield unfinished
        with writing(f"output {output}"):
            if not is_local(output):
                _upload(unfinished, os.fspath(output))
                return
            if not os.path.isdir(output):
                os.replace(unfinished, output)
                return
            previous = temporary / "previous"
            os.rename(output, previous)
            try:
                os.replace(unfinished, output)
            except BaseException:
                os.rename(previous, output)
                raise


def _upload(source: pathlib.Path, output: str) -> None:
    """Uploads a file, or a folder; removes other files of an existing folder."""
    if source.is_file():
        copy(source, output)
        return
    files = [file for file in source.rglob("*") if file.is_file()]
    targets = {file: f"{output}/{file.relative_to(source).as_posix()}" for file in files}
    before = set(_walk(f"{output}/"))
    for file in sorted(files, key=lambda file: (-len(file.parts), file)):
        copy(file, targets[file])
    for other in before - set(targets.values()):
        remove(other)


def _walk(folder: str) -> Iterator[str]:
    """Yields the paths of all files below a folder in a bucket, whose path ends in "/"."""
    for name in list_bucket(folder):
        if name.endswith("/"):
            yield from _walk(folder + name)
        else:
            yield folder + name


@contextlib.contextmanager
def unfinished_folder(target: AnyPath) -> Iterator[pathlib.Path]:
    """Creates a local folder for files that are then moved to a folder; removes it at the end.

    Its name is always the same, so that the next call removes what an interrupted one has left.
    """
    if not is_local(target):
        with tempfile.TemporaryDirectory(prefix="bn_keras_") as name:
            yield pathlib.Path(name)
        return
    # In the folder itself: a file can be renamed only within its file system.
    folder = pathlib.Path(target) / "unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[pathlib.Path]:
    """Yields a local path of a file: its own, or that of a temporary copy of a file in a bucket.

    If the file does not exist, neither does the path that is yielded.

    Raises:
      StorageError: the file cannot be read.
    """
    if is_local(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="bn_keras_") as folder:
        copied = pathlib.Path(folder) / os.path.basename(os.fspath(path))
        with reading(path):
            copy(path, copied)
        yield copied


@contextlib.contextmanager
def local_folder(path: AnyPath) -> Iterator[pathlib.Path]:
    """Yields a local path of a folder: its own, or that of a temporary copy of one in a bucket.

    Raises:
      StorageError: a file cannot be read.
    """
    if is_local(path):
        yield pathlib.Path(path)
        return
    top = os.path.join(path, "")
    with tempfile.TemporaryDirectory(prefix="bn_keras_") as folder:

        def download(file: str) -> None:
            target = pathlib.Path(f"{folder}/{file.removeprefix(top)}")
            target.parent.mkdir(parents=True, exist_ok=True)
            copy(file, target)

        with reading(path):
            # In a bucket, ".." is a name like any other; here it would lead out of the folder.
            files = [file for file in _walk(top) if ".." not in file.split("/")]
            in_parallel(functools.partial(download, file) for file in files)
        yield pathlib.Path(folder)


@contextlib.contextmanager
def literal_path(folder: AnyPath) -> Iterator[pathlib.Path]:
    """Yields a path of a local folder that TensorFlow does not read as a pattern.

    TensorFlow's readers and writers of checkpoints and SavedModels look for files that match a
    path: "run[1]" finds "run1", but not itself. Such a folder gets a symbolic link of another name
    until the block ends.

    Args:
      folder: folder on this machine; its files are found below the path that is yielded.

    Raises:
      UsageError: the folder for temporary files has such a path, too.
      OSError: the link cannot be created.
    """
    if not _PATTERN.search(os.fspath(folder)):
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="bn_keras_") as parent:
        if _PATTERN.search(parent):
            raise UsageError(
                f"TensorFlow cannot use {os.fspath(folder)!r}, nor the folder of temporary files"
                f" {parent!r}: set TMPDIR to a path without * ? [ ] or backslashes"
            )
        link = pathlib.Path(parent) / "folder"
        link.symlink_to(os.path.abspath(folder), target_is_directory=True)
        yield link


def make_folder(path: AnyPath) -> None:
    """Creates a folder and its parents; in a bucket, folders need not be created."""
    if is_local(path):
        os.makedirs(path, exist_ok=True)


def check_writable(folder: AnyPath, what: str) -> None:
    """Checks that a local folder, which need not exist, can be written; skips one in a bucket.

    Args:
      folder: path of the folder.
      what: name of what is going to be written, for errors.

    Raises:
      UsageError: the path leads through a file.
      StorageError: permissions are missing.
    """
    if not is_local(folder):
        return
    existing = pathlib.Path(folder).absolute()
    # pathlib's `exists` raises for a folder that may not be entered.
    while not os.path.exists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"{what} is invalid: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"{what} cannot be written: no permission to write {existing}")


def join(folder: str, path: str) -> str:
    """Returns the path of a file or a folder in a folder.

    In a bucket, "." would be a name like any other; it is left out.
    """
    joined = os.path.join(folder, path)
    if is_local(joined):
        return joined
    return "/".join(name for name in joined.split("/") if name != ".")


def exists(path: AnyPath) -> bool:
    """Returns whether a file or a folder exists.

    Raises:
      UsageError: see `is_local`.
      StorageError: the path is in a bucket that does not answer, or permissions are missing.
    """
    if is_local(path):
        return os.path.exists(path)
    with reading(path):
        return tf.io.gfile.exists(os.fspath(path))


def is_folder(path: AnyPath) -> bool:
    """Returns whether a path is an existing folder; raises like `exists`."""
    if is_local(path):
        return os.path.isdir(path)
    # Not isdir, which returns False for every error. In a bucket, names of folders end in "/".
    with reading(path):
        try:
            return tf.io.gfile.stat(os.path.join(path, "")).is_directory
        except (tf.errors.NotFoundError, tf.errors.FailedPreconditionError):
            return False


def list_folder(path: AnyPath) -> list[str]:
    """Returns the sorted names in a folder as it is now; none if it does not exist.

    In a bucket, it takes a single request.
    """
    if is_local(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    pattern = re.sub(r"([*?\[\\])", r"\\\1", os.fspath(path)) + "/*"
    return sorted(os.path.basename(found) for found in tf.io.gfile.glob(pattern))


def list_bucket(folder: str) -> list[str]:
    """Returns the sorted names in a folder of a bucket; none if it does not exist.

    Names of folders end in "/". Each 1,000 names take a request.

    Raises:
      StorageError: the folder cannot be listed.
    """
    with reading(folder):
        try:
            names = tf.io.gfile.listdir(folder)
        except tf.errors.NotFoundError:
            # listdir raises this for every error; is_folder raises the actual one.
            if is_folder(folder):
                raise
            return []
    if folder.startswith("ram://"):
        # Unlike in a bucket, names of folders do not end in "/".
        names = [f"{n}/" if is_folder(os.path.join(folder, n)) else n for n in names]
    return sorted(names)


def remove(path: AnyPath) -> None:
    """Removes a file if it exists."""
    with contextlib.suppress(*_MISSING_ERRORS):
        os.remove(path) if is_local(path) else tf.io.gfile.remove(path)


def in_parallel(calls: Iterable[Callable[[], object]]) -> None:
    """Makes calls at the same time, for requests whose order does not matter.

    Raises:
      Exception: the error of the first call that failed, after all that had begun have ended.
    """
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            for future in futures:
                future.result()
        finally:
            # Each further call to a bucket that does not answer would take minutes.
            pool.shutdown(cancel_futures=True)


def _open(path: AnyPath, mode: str) -> IO[Any]:
    return open(path, mode) if is_local(path) else tf.io.gfile.GFile(os.fspath(path), mode)


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(_PIECE_BYTES), b"")


def _flush_folder(path: str) -> None:
    try:
        _flush(path, os.O_RDONLY)
    except OSError as error:
        # Some file systems, such as VirtualBox's shared folders, flush no folders.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise


def _flush(path: AnyPath, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
