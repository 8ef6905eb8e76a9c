"""Checks what only GPUs can show, without data, and prints a table to paste into an issue.

    make gpu-check

It imports from tests/ and benchmarks/, which the Makefile adds to PYTHONPATH. Arguments
select checks by name. On a machine without GPUs it checks the same on the CPU, with the miniatures
of the networks, and lists what that cannot show.
"""

import logging
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import reference
import tensorflow as tf
from _timing import compare
from ml_collections import ConfigDict

from bn_keras import BatchNormalization
from bn_keras.distribute import make_strategy
from bn_keras.distribute.devices import cpu, list_gpus
from bn_keras.runs import environment
from bn_keras.training.config_files import load_config
from bn_keras.training.dry_run import dry_run
from bn_keras.training.resume_check import verify_resume

EPSILON = 1e-3
GPUS = list_gpus()
# Without GPUs, two replicas of the CPU.
NUM_REPLICAS = len(GPUS) if GPUS else 2
NETWORKS = ("inception", "bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid")


class NotShownError(Exception):
    """This machine cannot show it."""


def law_of_training(dtype: str, tolerance: float, jit: bool = False) -> str:
    """Compares outputs and gradients with the paper in float64, and the update of the averages."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for shape, mean in (((8, 14, 14, 32), 0), ((8, 14, 14, 32), 100), ((256, 32), 3)):
        x = tf.cast(rng.normal(mean, 2, shape), dtype)
        dy = tf.cast(rng.normal(size=shape), dtype)
        layer = BatchNormalization(epsilon=EPSILON, momentum=0.5, dtype=policy_of(dtype))
        layer.build(shape)
        layer.gamma.assign(rng.uniform(0.5, 2, shape[-1:]))

        @tf.function(jit_compile=jit)
        def step(x, dy, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            weights = [v.value for v in layer.trainable_variables]
            return y, *tape.gradient(y, [x, *weights], dy)

        found = step(x, dy)
        given = [np.asarray(tf.cast(t, "float64")) for t in (x, dy)]
        gamma = layer.gamma.numpy()
        y, batch_mean, variance, count = reference.batch_normalize(given[0], gamma, 0.0, EPSILON)
        gradients = reference.gradients(given[1], given[0], gamma, EPSILON)
        averages = [
            reference.update_average(0.0, batch_mean, 0.5),
            reference.update_average(1.0, reference.unbiased(variance, count), 0.5),
        ]
        expected = [y, *gradients, *averages]
        moving = [layer.moving_mean, layer.moving_variance]
        for one, other in zip([*found, *moving], expected, strict=True):
            one = np.asarray(tf.cast(tf.convert_to_tensor(one), "float64"))
            worst = max(worst, float(np.max(np.abs(one - other)) / np.max(np.abs(other))))
    return judge(worst, tolerance)


def policy_of(dtype: str) -> str:
    return dtype if dtype == "float32" else f"mixed_{dtype}"


def judge(difference: float, tolerance: float) -> str:
    """Describes a relative difference; raises AssertionError if it is too large."""
    text = f"largest relative difference {difference:.1e}, limit {tolerance:.0e}"
    assert difference <= tolerance, text
    return text


def law_of_inference() -> str:
    """Checks inference of more rows than cuDNN's kernels accept, and the gradient when frozen."""
    rng = np.random.default_rng(0)
    layer = BatchNormalization(epsilon=EPSILON)
    layer.build((None, 8))
    layer.moving_mean.assign(rng.normal(size=8))
    layer.moving_variance.assign(rng.uniform(0.5, 2, 8))
    x = tf.constant(rng.normal(size=(70_000, 8)), "float32")
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=False)
    scale = 1 / np.sqrt(layer.moving_variance.numpy() + EPSILON)
    differences = [
        y - (x - layer.moving_mean.value) * scale,
        tape.gradient(y, x) - scale,
    ]
    return judge(max(float(tf.reduce_max(tf.abs(d))) for d in differences), 1e-5)


def law_of_replicas() -> str:
    """Compares synchronized BN on all replicas with one device on the joined batch."""
    if len(GPUS) == 1:
        raise NotShownError("there is one GPU: synchronization needs two")
    strategy = make_strategy("mirrored", NUM_REPLICAS)
    x = np.random.default_rng(0).normal(3, 2, (4 * NUM_REPLICAS, 7, 7, 16)).astype("float32")
    with strategy.scope():
        layer = BatchNormalization(epsilon=EPSILON, synchronized=True, momentum=0.5)
        layer.build(x.shape)

    def step() -> tuple[tf.Tensor, tf.Tensor]:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        own = tf.constant(x)[4 * replica : 4 * replica + 4]
        with tf.GradientTape() as tape:
            tape.watch(own)
            y = layer(own, training=True)
            loss = tf.reduce_sum(y**3)
        return y, tape.gradient(loss, own)

    results = tf.function(lambda: strategy.run(step))()
    y, dx = (
        np.concatenate([t.numpy() for t in strategy.experimental_local_results(r)]) for r in results
    )
    expected, *_ = reference.batch_normalize(x, 1.0, 0.0, EPSILON)
    expected_dx, *_ = reference.gradients(3 * expected**2, x, 1.0, EPSILON)
    worst = max(
        float(np.max(np.abs(one - other)) / np.max(np.abs(other)))
        for one, other in ((y, expected), (dx, expected_dx))
    )
    return f"{NUM_REPLICAS} replicas: {judge(worst, 1e-4)}"


def config_for(name: str, replicas: int, **overrides: object) -> ConfigDict:
    """Returns a config of ImageNet on a GPU, and its miniature on the CPU."""
    config = load_config(name if GPUS else f"digits_{name}")
    config.distribution.replicas = replicas
    for section in (config.train, config.evaluation):
        section.global_batch_size += -section.global_batch_size % replicas
    config.update_from_flattened_dict(overrides)
    return config


def one_step(name: str, replicas: int = 1, **overrides: object) -> str:
    """Trains one step of a config on synthetic images."""
    result = list(dry_run(config_for(name, replicas, **overrides)))[-1].splitlines()[0]
    assert "not finite" not in result, result
    return result


def jit_in_fit() -> str:
    """Trains a network with our layer in Keras' fit, compiled by XLA."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(8, 3, use_bias=False), BatchNormalization()]
    model = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=True)
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 3))
    loss = model.fit(x, x.mean((1, 2, 3)), batch_size=16, verbose=0).history["loss"][-1]
    assert np.isfinite(loss), f"loss {loss}"
    return f"loss {loss:.4f}"


def resume() -> str:
    """Compares a resumed training with an uninterrupted one, bit by bit."""
    if GPUS:
        config = load_config("digits_bn_x5")
    else:
        # The CPU takes half a minute to build two BN-Inceptions.
        config = load_config("mnist_bn")
        config.data.name, config.data.validation_split = "digits", "validation"
    return f"bit-exact, variables_sha256 {verify_resume(config)[:12]}"


def resume_deterministically() -> str:
    """Does the same with TensorFlow's deterministic kernels; they stay on."""
    tf.config.experimental.enable_op_determinism()
    return resume()


def speed(dtype: str) -> str:
    """Compares forward and backward with Keras' layer, on activations of BN-Inception."""
    texts = []
    for shape in ((32, 56, 56, 192), (32, 14, 14, 576)):
        x, dy = (tf.cast(tf.random.normal(shape), dtype) for _ in range(2))
        layers = {
            "bn_keras": BatchNormalization(dtype=policy_of(dtype)),
            "Keras": keras.layers.BatchNormalization(dtype=policy_of(dtype)),
        }
        times = compare({name: training_step(layer, x, dy) for name, layer in layers.items()}, 5)
        ratio = times["Keras"] / times["bn_keras"]
        size = "×".join(map(str, shape))
        texts.append(f"{size}: {times['bn_keras']:.2f} ms, {ratio:.2f} times as fast")
    return "; ".join(texts)


def training_step(layer: keras.Layer, x: tf.Tensor, dy: tf.Tensor) -> Callable[[], float]:
    layer.build(x.shape)

    @tf.function
    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        dx, *others = tape.gradient(y, [x, *[v.value for v in layer.trainable_variables]], dy)
        # One number that needs all results: reading it waits for the device.
        results = [y, dx, *others]
        return tf.add_n([tf.cast(tf.reshape(t, [-1])[0], "float32") for t in results])

    return lambda: float(step(x, dy))


CHECKS: dict[str, Callable[[], str]] = {
    "training, float32": lambda: law_of_training("float32", 1e-4),
    "training, bfloat16": lambda: law_of_training("bfloat16", 3e-2),
    "training, float16": lambda: law_of_training("float16", 1e-2),
    "training, float32, XLA": lambda: law_of_training("float32", 1e-4, jit=True),
    "inference of 70,000 rows": law_of_inference,
    "synchronized replicas": law_of_replicas,
    **{f"a step of {name}": (lambda name=name: one_step(name)) for name in NETWORKS},
    "a step of bn_x5 on all devices": lambda: one_step("bn_x5", NUM_REPLICAS),
    **{
        f"a step of bn_x5 in {precision}": (
            lambda precision=precision: one_step("bn_x5", **{"train.precision": precision})
        )
        for precision in ("mixed_bfloat16", "mixed_float16")
    },
    "fit with XLA": jit_in_fit,
    "speed beside Keras, float32": lambda: speed("float32"),
    "speed beside Keras, bfloat16": lambda: speed("bfloat16"),
    "resuming": resume,
    # Last: deterministic kernels cannot be turned off.
    "resuming, deterministic kernels": resume_deterministically,
}


def run_check(check: Callable[[], str]) -> tuple[str, str]:
    """Returns the result of a check, "ok", "FAILED" or "not shown", and its details."""
    try:
        return "ok", check()
    except NotShownError as reason:
        return "not shown", str(reason)
    except Exception as error:
        return "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> int:
    """Prints the table; returns 1 if a check has failed."""
    logging.disable(logging.WARNING)
    if not GPUS:
        # Before TensorFlow uses a device.
        make_strategy("mirrored", NUM_REPLICAS)
    selected = [name for name in CHECKS if not sys.argv[1:] or name in sys.argv[1:]]
    if unknown := set(sys.argv[1:]) - set(CHECKS):
        print(
            f"error: unknown check {min(unknown)!r}: expected {', '.join(CHECKS)}", file=sys.stderr
        )
        return 2
    versions = ", ".join(f"{k} {v}" for k, v in environment.describe()["versions"].items())
    print(f"bn_keras gpu-check: {versions}\n")
    for device in GPUS or [cpu()]:
        memory = f"{device.memory / 2**30:.1f} GiB" if device.memory else "memory unknown"
        print(f"- {device.name}: {device.model}, {memory}")
    print("\n| check | result | details | seconds |\n|---|---|---|---|")
    failures = 0
    for name in selected:
        began = time.perf_counter()
        result, details = run_check(CHECKS[name])
        failures += result == "FAILED"
        details = details.replace("|", "\\|")
        print(f"| {name} | {result} | {details} | {time.perf_counter() - began:.1f} |", flush=True)
    if not GPUS:
        print(
            "\nThere is no GPU. The CPU has shown the same laws with other kernels; it cannot show"
            " cuDNN's kernels, NCCL between GPUs, the full-size networks, the determinism of GPU"
            " kernels, or any speed on a GPU."
        )
    print(f"\n{failures} of {len(selected)} checks failed." if failures else "\nAll checks passed.")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
