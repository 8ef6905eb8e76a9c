"""Searches for the combinations in which the layer is slowest relative to the Keras layer.

    python benchmarks/batch_norm_grid.py [filter ...]

Times ranks 2 to 5, 1 to 1,024 channels, batches of 1 to 4,096 examples, axis -1 and 1, training and
inference, eager, graph and XLA, known and unknown batch size, float32 and bfloat16, one and two
threads, and prints the ten worst. A filter keeps the combinations whose name contains it. Half
an hour to an hour without filters.
"""

import itertools
import json
import os
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from bn_keras import BatchNormalization

SPATIAL = [(), (16,), (8, 8), (32, 32), (4, 4, 4)]
CHANNELS = [1, 16, 128, 1024]
BATCHES = [1, 32, 512, 4096]
MAX_SIZE = 2**22
MODES = [
    ("eager", "known"),
    *itertools.product(("graph", "XLA"), ("known", "unknown")),
]
WORST = 10
# A combination above this ratio is timed again, longer, because most of them are noise.
SUSPICIOUS = 1.02


def combinations():
    for spatial, channels, batch, axis in itertools.product(SPATIAL, CHANNELS, BATCHES, (-1, 1)):
        if axis == 1 and not spatial:
            continue
        shape = (batch, *spatial, channels) if axis == -1 else (batch, channels, *spatial)
        if np.prod(shape) > MAX_SIZE:
            continue
        for (mode, known), is_training in itertools.product(MODES, (True, False)):
            for dtype in ("float32", "bfloat16"):
                if dtype == "bfloat16" and (mode != "graph" or known != "known"):
                    continue
                yield shape, axis, mode, known, is_training, dtype


def name_of(shape, axis, mode, known, is_training, dtype):
    size = "×".join(map(str, shape))
    return f"{size} axis={axis} {mode} {known} {'train' if is_training else 'infer'} {dtype}"


def make(cls, shape, axis, mode, known, is_training, dtype):
    """Returns a call of one layer, forward, and backward in training."""
    layer = cls(axis=axis, dtype="mixed_bfloat16" if dtype == "bfloat16" else dtype)
    layer.build((None, *shape[1:]))
    x, dy = (tf.cast(tf.random.normal(shape), dtype) for _ in range(2))

    def step(x, dy):
        if not is_training:
            return layer(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

    if mode != "eager":
        spec = tf.TensorSpec(shape if known == "known" else (None, *shape[1:]), dtype)
        step = tf.function(step, jit_compile=mode == "XLA").get_concrete_function(spec, spec)

    def run():
        tf.nest.map_structure(lambda t: t.numpy, step(x, dy))

    return run


def ratio(functions, seconds):
    """Returns the ratio of the times of two functions, which take turns in short blocks.

    The ratio of lower quartiles, which other load on the machine affects less than medians.
    """
    for function in functions:
        function()
    start = time.perf_counter()
    functions[0]()
    repeats = max(1, int(1e-3 / max(time.perf_counter() - start, 1e-6)))
    times, end = ([], []), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for function, found in zip(functions, times, strict=True):
            function()
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            found.append((time.perf_counter() - start) / repeats)
    ours, theirs = (np.quantile(t, 0.25) for t in times)
    return ours / theirs, 1e3 * ours, 1e3 * theirs


def run_grid(threads, filters):
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    for combination in combinations():
        name = f"{name_of(*combination)} threads={threads}"
        if not all(f in name for f in filters):
            continue
        functions = [
            make(c, *combination) for c in (BatchNormalization, keras.layers.BatchNormalization)
        ]
        found = ratio(functions, 0.1)
        if found[0] > SUSPICIOUS:
            found = ratio(functions, 1.0)
        print(json.dumps([name, *found]), flush=True)
        keras.backend.clear_session(free_memory=False)


def main(filters):
    rows = []
    for threads in (1, 2):
        command = [sys.executable, __file__, f"--threads={threads}", *filters]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                rows.append(json.loads(line))
                print(f"\r{len(rows)} combinations", end="", file=sys.stderr)
        if process.returncode:
            sys.exit(process.returncode)
    rows.sort(key=lambda row: row[1], reverse=True)
    ratios = [row[1] for row in rows]
    print(f"\n\n{len(rows)} combinations, median bn_keras/Keras {np.median(ratios):.2f}\n")
    print("|the ten worst, ms|bn_keras|Keras|bn_keras/Keras|\n|---|---|---|---|")
    for name, found, ours, theirs in rows[:WORST]:
        print(f"|{name}|{ours:.3f}|{theirs:.3f}|{found:.2f}|")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("--threads="):
        run_grid(int(sys.argv[1].removeprefix("--threads=")), sys.argv[2:])
    else:
        print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPU cores")
        main(sys.argv[1:])
