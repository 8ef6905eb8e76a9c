"""Compares training steps of 32 images of 224² with this layer, the Keras layer, and no layer.

    python benchmarks/batch_norm_networks.py [network ...]

Networks: inception-float32, inception-bfloat16, resnet50, mobilenetv2, memory. Default: all.
inception-* are BN-Inception. resnet50 and mobilenetv2 are networks of keras.applications before and
after replace_batch_norm. memory measures the peak of a BN-Inception step, each in its own process.
"""

import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from _timing import compare, print_table

from bn_keras import BatchNormalization, BNInception, replace_batch_norm

IMAGES, SIDE, CLASSES = 32, 224, 1000
LAYERS = ("bn_keras", "Keras", "no BN")


def _replace_layers(model, make):
    """Returns the model with make(config) in place of each layer of this package."""

    def clone(layer):
        if isinstance(layer, BatchNormalization):
            return make(layer.get_config() | {"unbiased": False})
        return type(layer).from_config(layer.get_config())

    return keras.models.clone_model(model, clone_function=clone)


def _keras_layer(config):
    config.pop("unbiased")
    return keras.layers.BatchNormalization.from_config(config)


class _Identity(keras.layers.Layer):
    def call(self, inputs, training=None, mask=None):
        return inputs


def _no_layer(config):
    return _Identity(name=config["name"], dtype=config["dtype"])


def _inception(layer):
    model = BNInception(input_shape=(SIDE, SIDE, 3), classes=CLASSES)
    if layer == "bn_keras":
        return model
    return _replace_layers(model, _keras_layer if layer == "Keras" else _no_layer)


def _step(model):
    """Returns one step of SGD on a constant batch, which excludes the loading of images."""
    optimizer = keras.optimizers.SGD(1e-6, momentum=0.9)
    optimizer.build(model.trainable_variables)
    images = tf.random.normal([IMAGES, SIDE, SIDE, 3])
    labels = tf.random.uniform([IMAGES], maxval=CLASSES, dtype=tf.int32)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return loss

    return lambda: float(step())


def inception(policy):
    keras.config.set_dtype_policy(policy)
    row = compare({name: _step(_inception(name)) for name in LAYERS}, rounds=4, block=2)
    keras.config.set_dtype_policy("float32")
    ratios = {"speedup over Keras": ("Keras", "bn_keras"), "bn_keras/no BN": ("bn_keras", "no BN")}
    print_table(f"A step of BN-Inception, {policy}", {f"{IMAGES}×{SIDE}²": row}, ratios)


def application(name):
    before = getattr(keras.applications, name)(
        weights=None, classifier_activation=None, classes=CLASSES
    )
    functions = {"after": _step(replace_batch_norm(before)), "before": _step(before)}
    row = compare(functions, rounds=3, block=2)
    ratios = {"speedup": ("before", "after")}
    print_table(f"A step of {name} before and after replace_batch_norm", {"float32": row}, ratios)


def memory():
    print("\nPeak of TensorFlow's allocator in three steps of BN-Inception, float32, MiB\n")
    print("||one operation at a time|branches at once|\n|---|---|---|")
    for layer in LAYERS:
        command = [sys.executable, __file__, f"memory-{layer}"]
        sizes = [
            subprocess.check_output([*command, *order], text=True).strip()
            for order in (["in-order"], [])
        ]
        print("|".join(["", layer, *sizes, ""]), flush=True)


def _measure_memory(layer, in_order):
    if in_order:
        # Otherwise the peak also depends on which branches happen to run at the same time.
        tf.config.threading.set_inter_op_parallelism_threads(1)
    step = _step(_inception(layer))
    step()
    tf.config.experimental.reset_memory_stats("CPU:0")
    for _ in range(3):
        step()
    print(tf.config.experimental.get_memory_info("CPU:0")["peak"] // 2**20)


NETWORKS = {
    "inception-float32": lambda: inception("float32"),
    "inception-bfloat16": lambda: inception("mixed_bfloat16"),
    "resnet50": lambda: application("ResNet50"),
    "mobilenetv2": lambda: application("MobileNetV2"),
    "memory": memory,
}

if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("memory-"):
        _measure_memory(sys.argv[1].removeprefix("memory-"), in_order="in-order" in sys.argv)
    else:
        for network in sys.argv[1:] or NETWORKS:
            NETWORKS[network]()
