"""Compares the layer with the Keras layer and the fused kernels called directly, on the CPU.

    python benchmarks/batch_norm.py [part ...]

Parts: float32, bfloat16, inference, shapes, ghost, masked. Default: all.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from _timing import compare, print_table

from bn_keras import BatchNormalization

# Activations that BN-Inception normalizes, from its stem to its end, for 32 images.
SHAPES = [
    (32, 112, 112, 64),
    (32, 56, 56, 192),
    (32, 28, 28, 256),
    (32, 14, 14, 576),
    (32, 7, 7, 1024),
]


def name_of(shape):
    return "×".join(map(str, shape))


def training_step(layer, x, dy, mask=None):
    layer.build(x.shape)

    @tf.function
    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
        variables = [v.value for v in layer.trainable_variables]
        return y, tape.gradient(y, [x, *variables], dy)

    return lambda: step(x, dy)


def kernel_training_step(x, dy):
    """Calls only the two kernels, and updates the moving statistics as every layer must."""
    channels = x.shape[-1]
    gamma, beta = tf.Variable(tf.ones(channels)), tf.Variable(tf.zeros(channels))
    moving = [tf.Variable(tf.zeros(channels)), tf.Variable(tf.ones(channels))]

    @tf.function
    def step(x, dy):
        y, mean, variance, *reserved = tf.raw_ops.FusedBatchNormV3(
            x=x, scale=gamma, offset=beta, mean=[], variance=[], epsilon=1e-3, is_training=True
        )
        for old, new in zip(moving, (mean, variance), strict=True):
            old.assign(0.99 * old + 0.01 * new)
        dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=dy,
            x=x,
            scale=gamma,
            reserve_space_1=reserved[0],
            reserve_space_2=reserved[1],
            reserve_space_3=reserved[2],
            epsilon=1e-3,
            is_training=True,
        )
        return y, dx, dgamma, dbeta

    return lambda: step(x, dy)


def random_inputs(shape, dtype="float32"):
    return tuple(tf.cast(tf.random.normal(shape), dtype) for _ in range(2))


def training(dtype):
    rows, policy = {}, "mixed_bfloat16" if dtype == "bfloat16" else dtype
    for shape in SHAPES:
        x, dy = random_inputs(shape, dtype)
        rows[name_of(shape)] = compare(
            {
                "bn_keras": training_step(BatchNormalization(dtype=policy), x, dy),
                "fused kernels": kernel_training_step(x, dy),
                "Keras": training_step(keras.layers.BatchNormalization(dtype=policy), x, dy),
            }
        )
    ratios = {
        "speedup over Keras": ("Keras", "bn_keras"),
        "bn_keras/fused kernels": ("bn_keras", "fused kernels"),
    }
    print_table(f"Forward and backward, {dtype}", rows, ratios)


def call_kernel(shape):
    one, zero = tf.ones(shape[-1]), tf.zeros(shape[-1])
    return lambda x: tf.raw_ops.FusedBatchNormV3(
        x=x, scale=one, offset=zero, mean=zero, variance=one, is_training=False
    )[0]


def call_in_graph(function, x):
    function = tf.function(function)
    return lambda: function(x)


def inference():
    rows = {}
    for shape in SHAPES:
        ours, theirs = BatchNormalization(), keras.layers.BatchNormalization()
        x, _ = random_inputs(shape)
        for layer in (ours, theirs):
            layer.build(shape)
        functions = {"fused kernel": call_kernel(shape), "bn_keras": ours, "Keras": theirs}
        rows[name_of(shape)] = compare(
            {name: call_in_graph(f, x) for name, f in functions.items()}, rounds=25
        )
    ratios = {
        "bn_keras/fused kernel": ("bn_keras", "fused kernel"),
        "speedup over Keras": ("Keras", "bn_keras"),
    }
    print_table("Inference, float32", rows, ratios)


def shapes():
    """Compares rank 2, and per-activation BN of images (section 4.2.3)."""
    rows = {}
    for shape, axis in (
        ((60, 100), -1),
        ((1024, 256), -1),
        ((8192, 1024), -1),
        ((32, 7, 7, 1024), [1, 2, 3]),
        ((32, 28, 28, 256), [1, 2, 3]),
    ):
        x, dy = random_inputs(shape)
        flat = [tf.reshape(t, [shape[0], -1]) for t in (x, dy)]
        rows[f"{name_of(shape)}, axis={axis}"] = compare(
            {
                "bn_keras": training_step(BatchNormalization(axis=axis), x, dy),
                # The Keras layer has no axis lists, so it normalizes flattened activations.
                "Keras": training_step(keras.layers.BatchNormalization(), *flat),
            },
            rounds=15,
        )
    print_table(
        "Other shapes, forward and backward, float32",
        rows,
        {"speedup over Keras": ("Keras", "bn_keras")},
    )


def ghost():
    rows = {}
    for shape in SHAPES:
        x, dy = random_inputs(shape)
        functions = {"no ghost batches": training_step(BatchNormalization(), x, dy)}
        for size in (16, 8):
            layer = BatchNormalization(virtual_batch_size=size)
            functions[f"ghost batches of {size}"] = training_step(layer, x, dy)
        rows[name_of(shape)] = compare(functions)
    ratios = {
        f"{size}/no ghost batches": (f"ghost batches of {size}", "no ghost batches")
        for size in (16, 8)
    }
    print_table("Ghost batches, forward and backward, float32", rows, ratios)


def masked():
    rows = {}
    for shape in SHAPES:
        x, dy = random_inputs(shape)
        mask = tf.constant(np.random.default_rng(0).random(shape[:-1]) < 0.8)
        rows[name_of(shape)] = compare(
            {
                "bn_keras": training_step(BatchNormalization(), x, dy, mask),
                "Keras": training_step(keras.layers.BatchNormalization(), x, dy, mask),
            }
        )
    print_table(
        "Masked, forward and backward, float32", rows, {"speedup over Keras": ("Keras", "bn_keras")}
    )


PARTS = {
    "float32": lambda: training("float32"),
    "bfloat16": lambda: training("bfloat16"),
    "inference": inference,
    "shapes": shapes,
    "ghost": ghost,
    "masked": masked,
}

if __name__ == "__main__":
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPU cores")
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
