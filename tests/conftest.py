"""Every test sees two logical CPU devices, so that two replicas can be tried anywhere."""

import gc
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import keras
import pytest
import tensorflow as tf

from bn_keras.distribute.strategy import make_strategy

NUM_REPLICAS = 2

# What a shell starts in the background ignores SIGINT, and so would the commands that tests
# interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * NUM_REPLICAS,
)


def pytest_collection_finish():
    """Takes all that is imported out of the garbage collector's sight.

    To go through it takes a quarter of a second, and keras.utils.clear_session does so.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Fixed weights, and no graph or policy left over from the test before."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


@pytest.fixture
def two_replicas():
    """A MirroredStrategy over two CPU replicas."""
    return make_strategy("mirrored", NUM_REPLICAS)
