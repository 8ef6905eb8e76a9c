"""Failed writes raise one-line storage errors and keep the previous file."""

import os

import pytest
import tensorflow as tf
from etils import epath
from full_disk import files_of_at_most
from small import small_mlp

from bn_keras.data.single_image import read_image
from bn_keras.errors import StorageError, UsageError
from bn_keras.experiments.run_all import train_all
from bn_keras.inference.exported import load_exported
from bn_keras.runs.workdir import Workdir
from bn_keras.storage import is_local, replacing, write_atomically, writing
from bn_keras.training.config_files import load_config

TENSORFLOW = "{{node save}} a/file; No space left on device [Op:SaveV2]\nand a traceback"


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


@pytest.mark.parametrize("previous", ["file", "folder", None])
@pytest.mark.parametrize("failure", ["nothing is written", "the block fails"])
def test_a_failed_replacement_keeps_the_previous_output(tmp_path, previous, failure):
    output = tmp_path / "output"
    if previous == "file":
        output.write_text("old")
    elif previous == "folder":
        output.mkdir()
        (output / "part").write_text("old")
    with pytest.raises((StorageError, ZeroDivisionError)), replacing(output) as unfinished:
        if failure == "the block fails":
            unfinished.write_text("new")
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == (["output"] if previous else [])
    if previous:
        assert (output / "part" if previous == "folder" else output).read_text() == "old"


@pytest.mark.parametrize("path", ["s3://bucket/run", "http://host/run", "file:///tmp/run"])
def test_urls_of_other_kinds_are_refused_on_one_line(path):
    for use in (is_local, Workdir, load_config, load_exported, read_image):
        with pytest.raises(UsageError, match=f"path '{path}.*' is invalid: expected .* gs://"):
            use(path)
    with pytest.raises(UsageError, match="is invalid: expected a path on this machine"):
        train_all({"a": small_mlp()}, path)
    assert not is_local("gs://bucket/run") and is_local("/tmp/a:b/c")
