"""A test may go on as though it were traced for a core of a TPU."""

import pytest
import tensorflow as tf

from bn_keras import BatchNormalization, ops

pytest.register_assert_rewrite("lowering")

import lowering  # noqa: E402


@pytest.fixture
def on_a_core(monkeypatch):
    """What the package asks TensorFlow about devices and replicas is as it would be there."""
    monkeypatch.setattr(ops, "_has_accelerator", lambda: True)
    monkeypatch.setattr(tf.distribute, "get_replica_context", lowering.CoreContext)
    monkeypatch.setattr(BatchNormalization, "_replicas_may_diverge", lambda layer: not layer.synchronized)
