"""Compares inference of BN-Inception: folded, with our layer, and with Keras' layer.

    python benchmarks/fold.py [policy ...]

Policies: float32, mixed_bfloat16. Default: both. Batches of 1 and 32 images of 224².
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from _timing import compare, print_table

from bn_keras import BatchNormalization, BNInception, fold_batch_norm

BATCHES = (1, 32)
SIDE = 224
RATIOS = {
    "speedup over bn_keras": ("bn_keras", "folded"),
    "speedup over Keras": ("Keras", "folded"),
}


def _with_keras_layers(model):
    def clone(layer):
        config = layer.get_config()
        if isinstance(layer, BatchNormalization):
            config.pop("unbiased", None)
            return keras.layers.BatchNormalization.from_config(config)
        return type(layer).from_config(config)

    return keras.models.clone_model(model, clone_function=clone)


def _inference(model, images):
    run = tf.function(lambda: model(images, training=False), autograph=False)
    return lambda: run().numpy()


def compare_networks(policy):
    keras.config.set_dtype_policy(policy)
    model = BNInception("bn_x30", input_shape=(SIDE, SIDE, 3))
    folded, _ = fold_batch_norm(model, tf.random.normal([1, SIDE, SIDE, 3]))
    models = {"folded": folded, "bn_keras": model, "Keras": _with_keras_layers(model)}
    rows = {}
    for batch in BATCHES:
        images = tf.random.normal([batch, SIDE, SIDE, 3])
        functions = {name: _inference(model, images) for name, model in models.items()}
        # Calls on a single image are short and vary more: the median covers more of them.
        rounds = 12 if batch == 1 else 6
        rows[f"{batch}×{SIDE}²"] = compare(functions, rounds=rounds, block=3)
    print_table(f"Inference of BN-Inception, {policy}", rows, RATIOS)


if __name__ == "__main__":
    for policy in sys.argv[1:] or ("float32", "mixed_bfloat16"):
        compare_networks(policy)
