"""Failed writes raise one-line storage errors and keep the previous file."""

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import tensorflow as tf
from etils import epath
from full_disk import files_of_at_most
from small import small_mlp
from tensorflow.python.lib.io import _pywrap_file_io

from bn_keras.data.single_image import read_image
from bn_keras.errors import BucketUnavailableError, StorageError, UsageError
from bn_keras.experiments.run_all import train_all
from bn_keras.inference.exported import load_exported
from bn_keras.runs.workdir import Workdir
from bn_keras.storage import (
    exists,
    in_parallel,
    is_folder,
    is_local,
    local_folder,
    replacing,
    reporting_outages,
    write_atomically,
    writing,
)
from bn_keras.training.config_files import load_config

TENSORFLOW = "{{node save}} a/file; No space left on device [Op:SaveV2]\nand a traceback"


def test_sigterm_leaves_no_unfinished_output(tmp_path):
    program = (
        "import signal, sys; from bn_keras.storage import replacing\n"
        "with replacing(sys.argv[1]) as file:\n"
        "    file.write_text('half'); signal.raise_signal(signal.SIGTERM)"
    )
    ended = subprocess.run([sys.executable, "-c", program, tmp_path / "file"])
    assert ended.returncode == 128 + signal.SIGTERM and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        tf.errors.UnknownError(None, None, TENSORFLOW),
    ],
    ids=["python", "tensorflow"],
)
def test_a_full_disk_is_one_line(error):
    with pytest.raises(StorageError) as caught, writing("file x", "delete old runs"):
        raise error
    assert str(caught.value) == "file x cannot be written: No space left on device; delete old runs"
    assert caught.value.status == 2


def test_a_nested_block_names_the_inner_file():
    with pytest.raises(StorageError, match="^file y cannot be written: No space left$"):
        with writing("folder x", "advice"), writing("file y"):
            raise OSError(28, "No space left")


def test_other_errors_pass_unchanged():
    with pytest.raises(UsageError, match="^mine$"), writing("file x"):
        raise UsageError("mine")


def test_a_failed_write_keeps_the_previous_file(tmp_path):
    path = epath.Path(tmp_path / "file")
    write_atomically(path, "old")
    with files_of_at_most(10), pytest.raises(OSError), writing("file"):
        write_atomically(path, "new" * 10)
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number, is_error", [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_flushes_no_folders_is_accepted(number, is_error, tmp_path, monkeypatch):
    fsync = os.fsync

    def flush_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush_files_only)
    with pytest.raises(OSError) if is_error else contextlib.nullcontext():
        write_atomically(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("previous", ["file", "folder", None])
@pytest.mark.parametrize("failure", ["nothing is written", "the block fails"])
def test_a_failed_replacement_keeps_the_previous_output(tmp_path, previous, failure):
    output = tmp_path / "output"
    if previous == "file":
        output.write_text("old")
    elif previous == "folder":
        output.mkdir()
        (output / "part").write_text("old")
    replacement = replacing(output, folder=previous == "folder")
    with pytest.raises((StorageError, ZeroDivisionError)), replacement as unfinished:
        if failure == "the block fails":
            if previous == "folder":
                unfinished.mkdir()
            else:
                unfinished.write_text("new")
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == (["output"] if previous else [])
    if previous:
        assert (output / "part" if previous == "folder" else output).read_text() == "old"


@pytest.mark.parametrize("folder", [True, False])
def test_a_file_never_replaces_a_folder_nor_a_folder_a_file(folder, tmp_path):
    output = tmp_path / "output"
    kept = output if folder else output / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("old")
    message = "is a file: expected .* a folder" if folder else "is a folder: expected .* a file"
    with pytest.raises(UsageError, match=message), replacing(output, folder):
        raise AssertionError("the block must not begin")
    assert kept.read_text() == "old"


@pytest.mark.parametrize("path", ["s3://bucket/run", "http://host/run", "file:///tmp/run"])
def test_urls_of_other_kinds_are_refused_on_one_line(path):
    for use in (is_local, Workdir, load_config, load_exported, read_image):
        with pytest.raises(UsageError, match=f"path '{path}.*' is invalid: expected .* gs://"):
            use(path)
    with pytest.raises(UsageError, match="is invalid: expected a path on this machine"):
        train_all({"a": small_mlp()}, path)
    assert not is_local("gs://bucket/run") and is_local("/tmp/a:b/c")


@pytest.mark.parametrize("ask", [exists, is_folder])
@pytest.mark.parametrize(
    "error, expected",
    [
        (tf.errors.AbortedError, BucketUnavailableError),
        (tf.errors.PermissionDeniedError, StorageError),
        (tf.errors.NotFoundError, None),
    ],
)
def test_only_a_missing_path_does_not_exist(ask, error, expected, monkeypatch):
    def fail(path):
        raise error(None, None, "refused")

    for name in ("FileExists", "IsDirectory", "Stat"):
        monkeypatch.setattr(_pywrap_file_io, name, fail)
    if not expected:
        assert not ask("gs://bucket/path")
        return
    with pytest.raises(expected, match="^gs://bucket/path cannot be read: refused$") as caught:
        ask("gs://bucket/path")
    assert type(caught.value) is expected


def test_an_outage_is_reported_whatever_wraps_it():
    outage = tf.errors.AbortedError(None, None, "All 10 retry attempts failed. The last failure: x")
    message = "^set cannot be read: the bucket does not answer \\(x\\)$"
    with pytest.raises(BucketUnavailableError, match=message), reporting_outages("set"):
        try:
            raise RuntimeError("cannot be constructed") from outage
        except RuntimeError as error:
            raise UsageError("prepare it again") from error
    with pytest.raises(UsageError, match="^mine$"), reporting_outages("set"):
        raise UsageError("mine") from OSError("another")


def test_a_failed_call_cancels_the_calls_that_have_not_begun():
    begun = []

    def fail():
        begun.append(1)
        time.sleep(0.1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_parallel([fail] * 1_000)
    assert len(begun) < 1_000


def test_a_folder_in_a_bucket_is_replaced_and_copied_as_a_whole(memory_bucket):
    output = memory_bucket / "net"
    for names in ({"a", "b"}, {"a", "c"}):
        with replacing(output, folder=True) as unfinished:
            unfinished.mkdir()
            for name in names:
                (unfinished / name).write_text(name)
        with local_folder(output) as folder:
            assert {file.name: file.read_text() for file in folder.iterdir()} == dict(
                zip(names, names, strict=True)
            )
