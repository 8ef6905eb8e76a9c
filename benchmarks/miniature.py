"""Compares training steps of the CIFAR-10 miniature with this layer, the Keras layer, and no layer.

    python benchmarks/miniature.py

The network, its loss, its optimizer and the loop around the step are those of
configs/cifar10_bn_baseline.py, built as the trainer builds them. The batch is constant, which
excludes the loading of images. One and two threads are measured in a process each.
"""

import json
import os
import pathlib
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import keras
import numpy as np
import tensorflow as tf
from _timing import compare, print_table
from batch_norm_networks import LAYERS, _keras_layer, _no_layer, _replace_layers

from bn_keras.distribute import make_strategy
from bn_keras.training.build import build_model, build_schedule
from bn_keras.training.step import Trainer
from configs import cifar10_bn_baseline

CONFIG = cifar10_bn_baseline.get_config()
SHAPE, CLASSES, EXAMPLES = (32, 32, 3), 10, 50_000
THREADS = (1, 2)
STEPS, ROUNDS = 4, 12
# The weights hardly change, so that every step computes with numbers of the same size.
RATE_FACTOR = 1e-4


def random_batch():
    """Returns float32 images [32, 32, 32, 3] and int32 labels [32]."""
    random, size = np.random.default_rng(0), CONFIG.train.global_batch_size
    images = random.normal(size=(size, *SHAPE)).astype(np.float32)
    return images, random.integers(CLASSES, size=size, dtype=np.int32)


def build(layer="bn_keras", config=CONFIG):
    """Returns the trainer of a config, with one of LAYERS in its network."""
    strategy = make_strategy(**config.distribution)
    with strategy.scope():
        model = build_model(config, SHAPE, CLASSES, training=True)
        if layer != "bn_keras":
            model = _replace_layers(model, _keras_layer if layer == "Keras" else _no_layer)
        schedule = build_schedule(config, EXAMPLES, RATE_FACTOR)
        optimizer = keras.optimizers.SGD(schedule, momentum=config.train.momentum)
    size = config.train.global_batch_size
    return Trainer(model, optimizer, strategy, size, l2=config.train.l2)


def run_steps(trainer):
    """Returns a call of STEPS training steps, which returns their mean loss."""
    batch = tuple(map(tf.constant, random_batch()))

    @tf.function
    def loop():
        total = 0.0
        for _ in tf.range(STEPS):
            loss, _ = trainer.strategy.run(trainer.step, args=batch)
            total += loss
        return total / STEPS

    return lambda: float(loop())


def measure_with_threads(script):
    """Runs a script in a process for each number of threads.

    Returns:
      Milliseconds per step by case and threads: the JSON objects that the script prints last.
    """
    rows = {}
    for threads in THREADS:
        command = [sys.executable, script, f"threads-{threads}"]
        *_, last = subprocess.check_output(command, text=True).splitlines()
        for case, row in json.loads(last).items():
            rows[f"{case}, threads: {threads}"] = row
    return rows


def print_rows(rows):
    """Prints milliseconds per call of STEPS steps for measure_with_threads to read."""
    print(json.dumps({c: {n: ms / STEPS for n, ms in row.items()} for c, row in rows.items()}))


def requested_threads():
    """Returns the number of threads that measure_with_threads asks for, or None."""
    if not sys.argv[1:]:
        return None
    kind, _, threads = sys.argv[1].partition("-")
    if kind != "threads" or not threads.isdecimal():
        sys.exit(f"unknown argument {sys.argv[1]!r}: expected none")
    return int(threads)


def set_threads(threads):
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def main():
    threads = requested_threads()
    if threads:
        set_threads(threads)
        print_rows({"32×32²": compare({n: run_steps(build(n)) for n in LAYERS}, ROUNDS)})
        return
    ratios = {"speedup over Keras": ("Keras", "bn_keras"), "bn_keras/no BN": ("bn_keras", "no BN")}
    print_table("A training step of the CIFAR-10 miniature", measure_with_threads(__file__), ratios)


if __name__ == "__main__":
    main()
