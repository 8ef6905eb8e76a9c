"""Checkpoints of TF-Slim's inception_v2 give the same logits (make test-peers installs TF-Slim)."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import ops

from bn_keras import convert

slim = pytest.importorskip("tf_slim", reason="tf-slim is not installed: make test-peers")
inception = pytest.importorskip("tf_slim.nets.inception")

tf1 = tf.compat.v1

pytestmark = pytest.mark.filterwarnings("ignore:`layer.apply` is deprecated:UserWarning")


@pytest.fixture(autouse=True)
def restore_name_that_tensorflow_removed(monkeypatch):
    monkeypatch.setattr(ops, "Tensor", tf.Tensor, raising=False)


def _inception_v2(images, classes, scale):
    """Builds inception_v2 with the arguments of inception_v2_arg_scope.

    updates_collections differs: its default selects the BN layer of Keras 2. Inference has no
    updates.
    """
    batch_norm = dict(decay=0.9997, epsilon=0.001, scale=scale, updates_collections=None)
    with slim.arg_scope(
        [slim.conv2d],
        weights_initializer=slim.variance_scaling_initializer(),
        activation_fn=tf.nn.relu,
        normalizer_fn=slim.batch_norm,
        normalizer_params=batch_norm,
    ):
        logits, _ = inception.inception_v2(images, classes, is_training=False)
    return logits


def _randomized(variable):
    """Assigns random values, so that no variable stays at 0 or 1, not even in the stem."""
    random = tf1.random_normal(variable.shape, stddev=0.3, seed=1)
    if variable.op.name.endswith(("moving_variance", "gamma")):
        random = tf1.random_uniform(variable.shape, 0.5, 1.5, seed=1)
    return variable.assign(random)


@pytest.mark.parametrize("side, version, scale", [(224, 2, False), (96, 2, True), (201, 1, False)])
def test_converted_checkpoints_give_the_same_logits(side, version, scale, tmp_path):
    """Covers both checkpoint formats, networks with and without gamma, and odd image sizes."""
    images = np.random.default_rng(side).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    with tf.Graph().as_default():
        tf1.set_random_seed(0)
        logits = _inception_v2(tf.constant(images), 1001, scale)
        variables = slim.get_model_variables()
        # Checkpoints of a run contain these averages too.
        averages = tf1.train.ExponentialMovingAverage(0.5).apply(variables)
        step = tf1.train.create_global_step()
        with tf1.Session() as session:
            session.run(tf1.global_variables_initializer())
            session.run([_randomized(v) for v in variables if not v.op.name.endswith("/weights")])
            session.run([averages, step.assign(7)])
            expected = session.run(logits)
            saver = tf1.train.Saver(write_version=version)
            path = saver.save(session, str(tmp_path / "model.ckpt"), global_step=step)
    assert expected.std() > 0.1
    model = convert.from_slim(path, input_shape=(side, side, 3))
    np.testing.assert_allclose(model(images), expected, rtol=0, atol=1e-4)
