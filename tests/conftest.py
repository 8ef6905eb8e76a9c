"""Splits the CPU into two logical devices, so that every test can use two replicas."""

import gc
import os
import signal
import uuid
from collections.abc import Iterator
from typing import IO, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import keras
import pytest
import tensorflow as tf
from etils import epath
from etils.epath import gpath, register

from bn_keras import storage
from bn_keras.distribute import make_strategy
from bn_keras.ops import choice

NUM_REPLICAS = 2

# A process that a shell starts in the background ignores SIGINT, and its children inherit that.
# Some tests interrupt commands by SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * NUM_REPLICAS,
)


def pytest_collection_finish() -> None:
    """Excludes everything imported so far from garbage collection, which then takes less time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Seeds the random generators and removes the graph and dtype policy of the previous test."""
    # A collection after each test would take a quarter of all time; Python collects often enough.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


@pytest.fixture
def fuse_small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes small inputs use the fused kernels, which by default only large ones do."""
    monkeypatch.setattr(choice, "MIN_SIZE_TO_FUSE_TRAINING", 0)
    monkeypatch.setattr(choice, "MIN_SIZE_TO_FUSE_INFERENCE", 0)
    monkeypatch.setattr(choice, "MIN_CHANNELS_TO_FUSE", 1)


@pytest.fixture
def two_replicas() -> tf.distribute.Strategy:
    """Returns a MirroredStrategy over two CPU replicas."""
    return make_strategy("mirrored", NUM_REPLICAS)


@pytest.fixture
def memory_bucket(monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    """Returns TensorFlow's file system in memory, which Python cannot open, like a bucket."""
    monkeypatch.setattr(gpath, "_URI_PREFIXES", (*gpath._URI_PREFIXES, "ram://"))
    monkeypatch.setattr(gpath, "_URI_SCHEMES", frozenset({*gpath._URI_SCHEMES, "ram"}))
    monkeypatch.setitem(gpath._URI_MAP_ROOT, "ram://", "/ram/")
    monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, "ram://", gpath.PosixGPath)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "ram", gpath.backend_lib.tf_backend)
    opened = storage._open

    def open_empty(path: str | os.PathLike, mode: str) -> IO[Any]:
        # This file system appends to a file that exists.
        if mode == "wb" and not storage.is_local(path):
            storage.remove(path)
        return opened(path, mode)

    monkeypatch.setattr(storage, "_open", open_empty)
    folder = epath.Path(f"ram://{uuid.uuid4().hex}")
    folder.mkdir()
    return folder
