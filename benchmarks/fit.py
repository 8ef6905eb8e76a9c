"""Compares `fit` of whole networks with this layer, the Keras layer, and no layer.

    python benchmarks/fit.py [part ...]

Parts: mlp (three hidden layers of 100 units, the paper's Figure 1, batches of 60), resnet20 (images
of 32², batches of 64), first-step (building, tracing and running the first step of BN-Inception).
Default: all. As in any `fit`, the batch size is unknown while the graph is built.
"""

import os
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from _timing import compare, print_table
from batch_norm_networks import _Identity, _keras_layer, _no_layer, _replace_layers

from bn_keras import BatchNormalization, BNInception

LAYERS = {
    "bn_keras": BatchNormalization,
    "Keras": keras.layers.BatchNormalization,
    "no BN": lambda: _Identity(),
}
RATIOS = {"speedup over Keras": ("Keras", "bn_keras"), "no BN, speedup": ("Keras", "no BN")}
STEPS = 20


def _mlp(make):
    layers = [keras.Input((784,))]
    for _ in range(3):
        layers += [keras.layers.Dense(100), make(), keras.layers.Activation("sigmoid")]
    return keras.Sequential([*layers, keras.layers.Dense(10)])


def _resnet20(make):
    def unit(x, filters, strides=1):
        return make()(keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x))

    inputs = keras.Input((32, 32, 3))
    x = keras.layers.ReLU()(unit(inputs, 16))
    for filters in (16, 32, 64):
        for block in range(3):
            strides = 2 if filters > 16 and block == 0 else 1
            y = unit(keras.layers.ReLU()(unit(x, filters, strides)), filters)
            if strides == 2:
                x = keras.layers.Conv2D(filters, 1, strides, use_bias=False)(x)
            x = keras.layers.ReLU()(x + y)
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)))


def _compile(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # On a CPU Keras would not choose XLA either.
    model.compile(keras.optimizers.SGD(1e-3), loss, jit_compile=False)
    return model


def _steps_of_fit(model, batch_size):
    """Returns a call of STEPS steps of `fit`, without its start and its callbacks."""
    shape = (4 * batch_size, *model.input_shape[1:])
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    labels = np.random.default_rng(1).integers(10, size=len(images))
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch_size)
    _compile(model).make_train_function()
    batches = iter(dataset.cache().repeat())

    def run():
        for _ in range(STEPS):
            logs = model.train_function(batches)
        return float(logs["loss"])

    return run


def steps(make_network, batch_size, rounds):
    functions = {n: _steps_of_fit(make_network(make), batch_size) for n, make in LAYERS.items()}
    return {n: t / STEPS for n, t in compare(functions, rounds, block=1).items()}


def first_step():
    """Measures each layer in processes of its own, which take turns."""
    command = [sys.executable, __file__]
    seconds = {name: [] for name in LAYERS}
    for _ in range(3):
        for name in LAYERS:
            output = subprocess.check_output([*command, f"first-step-{name}"], text=True)
            seconds[name].append(float(output))
    return {name: 1e3 * float(np.median(found)) for name, found in seconds.items()}


def _time_first_step(name):
    start = time.perf_counter()
    model = BNInception(input_shape=(224, 224, 3), classes=10)
    if name != "bn_keras":
        model = _replace_layers(model, _keras_layer if name == "Keras" else _no_layer)
    images = np.zeros((8, 224, 224, 3), np.float32)
    _compile(model).fit(images, np.zeros(8), batch_size=8, verbose=0)
    print(time.perf_counter() - start)


PARTS = {
    "mlp": lambda: ("A step of an MLP in fit", {"60×784": steps(_mlp, 60, 40)}),
    "resnet20": lambda: ("A step of ResNet-20 in fit", {"64×32²": steps(_resnet20, 64, 5)}),
    "first-step": lambda: ("First step of fit of BN-Inception", {"8×224²": first_step()}),
}

if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("first-step-"):
        _time_first_step(sys.argv[1].removeprefix("first-step-"))
    else:
        for part in sys.argv[1:] or PARTS:
            title, rows = PARTS[part]()
            print_table(title, rows, RATIOS)
