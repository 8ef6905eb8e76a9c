"""Compares the layer with PyTorch's step by step (make test-peers installs PyTorch)."""

import numpy as np
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-peers")

KINDS = {
    2: (torch.nn.BatchNorm1d, (16, 3)),
    3: (torch.nn.BatchNorm1d, (6, 3, 5)),
    4: (torch.nn.BatchNorm2d, (4, 3, 5, 6)),
    5: (torch.nn.BatchNorm3d, (3, 3, 2, 4, 3)),
}


@pytest.mark.parametrize("rank", KINDS)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_outputs_gradients_and_running_statistics_equal_pytorch(rank, axis, momentum):
    """Runs four steps of SGD, then inference. PyTorch's momentum is the fraction not kept."""
    cls, shape = KINDS[rank]
    rng = np.random.default_rng(rank)
    theirs = cls(3, eps=1e-3, momentum=momentum)
    ours = BatchNormalization(
        axis=axis, momentum=None if momentum is None else 1 - momentum, epsilon=1e-3
    )
    ours.build(shape if axis == 1 else _channels_last(np.zeros(shape)).shape)
    gamma, beta = rng.uniform(0.5, 2, 3), rng.normal(size=3)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(gamma))
        theirs.bias.copy_(torch.tensor(beta))
    ours.gamma.assign(gamma)
    ours.beta.assign(beta)
    permute = (lambda a: a) if axis == 1 else _channels_last
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for _ in range(4):
        x, weights = (rng.normal(1, 2, shape).astype(np.float32) for _ in range(2))
        inputs = torch.tensor(x, requires_grad=True)
        y = theirs(inputs)
        optimizer.zero_grad()
        loss = (torch.sin(y) * torch.tensor(weights)).mean()
        loss.backward()
        with tf.GradientTape() as tape:
            ours_inputs = tf.constant(permute(x))
            tape.watch(ours_inputs)
            outputs = ours(ours_inputs, training=True)
            loss = tf.reduce_mean(tf.sin(outputs) * permute(weights))
        variables = [ours.gamma.value, ours.beta.value]
        dx, dgamma, dbeta = tape.gradient(loss, [ours_inputs, *variables])
        _assert_close(outputs, permute(y.detach().numpy()))
        _assert_close(dx, permute(inputs.grad.numpy()))
        _assert_close(dgamma, theirs.weight.grad.numpy())
        _assert_close(dbeta, theirs.bias.grad.numpy())
        optimizer.step()
        for variable, gradient in zip(variables, (dgamma, dbeta), strict=True):
            variable.assign_sub(0.1 * gradient)
        _assert_close(ours.moving_mean, theirs.running_mean.numpy())
        # Both use the unbiased variance here and normalize by the biased one.
        _assert_close(ours.moving_variance, theirs.running_var.numpy())
    theirs.eval()
    x = rng.normal(1, 2, shape).astype(np.float32)
    _assert_close(ours(permute(x)), permute(theirs(torch.tensor(x)).detach().numpy()))


def test_second_order_gradients_equal_pytorch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    theirs, ours = torch.nn.BatchNorm1d(3, eps=1e-3), BatchNormalization()
    inputs = torch.tensor(x, requires_grad=True)
    (first,) = torch.autograd.grad((theirs(inputs) ** 3).sum(), inputs, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), inputs)
    with tf.GradientTape() as outer:
        tensor = tf.constant(x)
        outer.watch(tensor)
        with tf.GradientTape() as inner:
            inner.watch(tensor)
            loss = tf.reduce_sum(ours(tensor, training=True) ** 3)
        norm = tf.reduce_sum(inner.gradient(loss, tensor) ** 2)
    _assert_close(outer.gradient(norm, tensor), second.numpy(), 1e-4)


def _channels_last(array):
    return np.moveaxis(array, 1, -1)


def _assert_close(actual, expected, tolerance=2e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, rtol=0, atol=tolerance)
