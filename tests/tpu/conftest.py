"""Traces a test as on one core of a TPU."""

import pytest
import tensorflow as tf

from bn_keras import BatchNormalization
from bn_keras.ops import choice

pytest.register_assert_rewrite("lowering")

import lowering  # noqa: E402


@pytest.fixture
def on_a_core(monkeypatch):
    """Answers the package's questions about devices and replicas as on a TPU core."""
    monkeypatch.setattr(choice, "is_on_accelerator", lambda: True)
    monkeypatch.setattr(tf.distribute, "get_replica_context", lowering.CoreContext)
    monkeypatch.setattr(
        BatchNormalization, "_replicas_may_diverge", lambda layer: not layer.synchronized
    )
