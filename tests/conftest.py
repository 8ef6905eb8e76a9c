"""Splits the CPU into two logical devices, so that every test can use two replicas."""

import gc
import os
import signal
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import keras
import pytest
import tensorflow as tf

from bn_keras.distribute import make_strategy

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
def two_replicas() -> tf.distribute.Strategy:
    """Returns a MirroredStrategy over two CPU replicas."""
    return make_strategy("mirrored", NUM_REPLICAS)
