"""The paper in float64 NumPy, which the tests compare with."""

import numpy as np


def batch_normalize(x, gamma, beta, epsilon, axis=-1, mask=None):
    """Computes Algorithm 1 over all axes except `axis`.

    Args:
      mask: broadcastable to x; only values where it is nonzero enter the statistics.

    Returns:
      y, mean, biased variance and count; the last three have the shape of `axis`.
    """
    x, keep = np.asarray(x, np.float64), _axes(axis, np.ndim(x))
    reduced = tuple(a for a in range(x.ndim) if a not in keep)
    weights = np.ones(x.shape) if mask is None else np.broadcast_to(mask, x.shape) * 1.0
    valid = np.where(weights > 0, x, 0)
    count = weights.sum(reduced, keepdims=True)
    mean = valid.sum(reduced, keepdims=True) / np.maximum(count, 1)
    variance = (weights * (valid - mean) ** 2).sum(reduced, keepdims=True) / np.maximum(count, 1)
    gamma, beta = (_expand(p, x, keep) for p in (gamma, beta))
    y = gamma * (x - mean) / np.sqrt(variance + epsilon) + beta
    return y, *(np.squeeze(s, reduced) for s in (mean, variance, count))


def gradients(dy, x, gamma, epsilon, axis=-1, mask=None):
    """Computes dx, dgamma and dbeta of section 3, for statistics of the unmasked values."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    keep = _axes(axis, x.ndim)
    reduced = tuple(a for a in range(x.ndim) if a not in keep)
    x_hat, _, variance, count = batch_normalize(x, 1.0, 0.0, epsilon, axis, mask)
    variance, count = (_expand(s, x, keep) for s in (variance, count))
    dgamma = (dy * x_hat).sum(reduced, keepdims=True)
    dbeta = dy.sum(reduced, keepdims=True)
    through = (dbeta + x_hat * dgamma) / np.maximum(count, 1)
    if mask is not None:
        through = through * mask
    dx = _expand(gamma, x, keep) / np.sqrt(variance + epsilon) * (dy - through)
    return dx, np.squeeze(dgamma, reduced), np.squeeze(dbeta, reduced)


def update_average(average, value, momentum):
    """Computes one update of a moving average."""
    average, value = np.asarray(average, np.float64), np.asarray(value, np.float64)
    return momentum * average + (1 - momentum) * value


def unbiased(variance, count):
    """Applies Bessel's correction, Algorithm 2, line 10."""
    return variance * count / (count - 1)


def mixture(weights, means, variances):
    """Computes mean and variance of a mixture by the law of total variance."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    mean = np.tensordot(shares, means, 1)
    return mean, np.tensordot(shares, variances + (means - mean) ** 2, 1)


def _axes(axis, rank):
    return sorted(a % rank for a in np.atleast_1d(axis))


def _expand(values, x, keep):
    """Returns values with the rank of x: one for each position along the axes `keep`."""
    values = np.asarray(values, np.float64)
    if values.ndim == 0:
        return values
    return values.reshape([x.shape[a] if a in keep else 1 for a in range(x.ndim)])
