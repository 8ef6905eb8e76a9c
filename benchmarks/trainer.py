"""Overhead of the trainer over a bare training step.

    python benchmarks/trainer.py [--data_dir=FOLDER] [mlp] [inception] [start] [checkpoint] [memory]

Runs the named parts, by default all, each in a process of its own. The exit status is 1 if a part
misses its target. FOLDER may contain TFDS's prepared MNIST; without it, scikit-learn's digits are
used.

mlp: the network of section 4.1 with input, metrics, evaluations every 1,000 steps and checkpoints
every 5,000, against a bare loop over one constant batch. The time of a short run is subtracted from
that of a long one, which removes the time to build the graph.

inception: BN-Inception on 32 synthetic images of 224², against such a loop. First without crops and
distortions, which are a cost of the input and not of the trainer, then with them. Evaluations and
checkpoints are excluded, since their frequency is the user's choice.

start: from the call of train_and_evaluate to the end of BN-Inception's first step, against building
the same network and running one step of it.

checkpoint: time to save BN-Inception, as a share of five minutes between two checkpoints.

memory: growth of the process' memory while the network of section 4.1 trains for 10,000 steps.
"""

import argparse
import functools
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tensorflow as tf
from etils import epath

from bn_keras.data import pipeline
from bn_keras.distribute import make_strategy
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.training import loop as training_loop
from bn_keras.training.build import build_trainer_for
from bn_keras.training.progress import Progress
from configs import bn_x30, mnist_bn

SECONDS_BETWEEN_CHECKPOINTS = 300


def mlp(data_dir):
    short, long, rounds = 2_000, 22_000, 3
    config = mlp_config(data_dir)
    loop, _ = make_bare_loop(config)
    bare, trained = [], []
    for _ in range(rounds):
        bare.append(seconds_of(lambda: loop(tf.constant(long - short))) / (long - short))
        seconds = [run(config, steps)[-1][1] for steps in (short, long)]
        trained.append((seconds[1] - seconds[0]) / (long - short))
    bare_step, step = statistics.median(bare), statistics.median(trained)
    print(
        f"mlp: a step through the trainer {step * 1e6:.0f} us, bare {bare_step * 1e6:.0f} us,"
        f" ratio {step / bare_step:.2f} (target: at most 1.3)"
    )
    return step / bare_step <= 1.3


def inception(data_dir):
    steps, loops = 4, 10
    plain = inception_config(steps_per_loop=steps)
    plain.data.update({"crop": "none", "mirror": False, "distortion": 0.0})
    loop, _ = make_bare_loop(plain)

    def bare_steps():
        return [seconds_of(lambda: loop(tf.constant(steps))) / steps for _ in range(loops // 2)]

    ratios, before = {}, bare_steps()
    for name, config in (
        ("plain images", plain),
        ("crops and distortions", inception_config(steps_per_loop=steps)),
    ):
        ends = [seconds for _, seconds, _ in run(config, steps * loops)[1:-1]]
        step = statistics.median((b - a) / steps for a, b in itertools.pairwise(ends))
        # Measured before and after, since the load of the machine changes over minutes.
        after = bare_steps()
        bare_step = statistics.median(before + after)
        before = after
        ratios[name] = bare_step / step
        print(
            f"inception, {name}: a step through the trainer {step:.3f} s, bare"
            f" {bare_step:.3f} s, bare/trainer {ratios[name]:.3f} (target: at least 0.97)"
        )
    return ratios["plain images"] >= 0.97


def start(data_dir):
    # In separate processes, since the second build in a process starts warm.
    trainer, bare = (
        statistics.median(
            float(subprocess.check_output([sys.executable, __file__, part], text=True))
            for _ in range(3)
        )
        for part in ("first-step", "bare-first-step")
    )
    print(
        f"start: to the end of the first step {trainer:.1f} s, bare {bare:.1f} s, ratio"
        f" {trainer / bare:.2f} (target: at most 1.5)"
    )
    return trainer / bare <= 1.5


def checkpoint(data_dir):
    config = inception_config()
    strategy = make_strategy(**config.distribution)
    data = pipeline.open_data(config.data, seed=config.seed)
    trainer = build_trainer_for(config, strategy, data)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(epath.Path(folder), trainer.parts, config.checkpoint.keep)
        seconds = [seconds_of(functools.partial(checkpoints.save, step)) for step in range(1, 10)]
        size = sum(f.stat().st_size for f in pathlib.Path(folder).glob("step-9.*"))
    share = statistics.median(seconds) / SECONDS_BETWEEN_CHECKPOINTS
    print(
        f"checkpoint: {size / 2**20:.0f} MiB in {statistics.median(seconds):.2f} s (at most"
        f" {max(seconds):.2f}), {share:.2%} of five minutes (target: less than 1%)"
    )
    return share < 0.01


def memory(data_dir):
    config = mlp_config(data_dir)
    config.train.steps_per_loop = 500
    sizes = {step: size for step, _, size in run(config, 10_000)}
    before, after = sizes[2_000], sizes[10_000]
    print(
        f"memory: {before / 2**20:.0f} MiB after 2,000 steps, {after / 2**20:.0f} MiB after"
        f" 10,000, {(after - before) / 2**20:+.1f} MiB (target: less than 1% more)"
    )
    return after < 1.01 * before


def mlp_config(data_dir):
    config = mnist_bn.get_config()
    if data_dir:
        config.data.data_dir = data_dir
    else:
        config.data.name = "digits"
        config.data.validation_split = "validation"
        config.evaluation.global_batch_size = 120
    return config


def inception_config(steps_per_loop=1):
    config = bn_x30.get_config().copy_and_resolve_references()
    config.data.name = "synthetic"
    config.train.steps_per_loop = steps_per_loop
    return config


def run(config, steps):
    """Trains and returns (step, seconds since the start, bytes of the process) after each loop.

    The last entry is from the end of the training.
    """
    config = config.copy_and_resolve_references()
    config.train.steps = steps
    loops = []

    def record(step):
        loops.append((step, time.perf_counter() - began, resident_bytes()))

    class RecordingProgress(Progress):
        def update(self, step, *values):
            super().update(step, *values)
            record(step)

    with tempfile.TemporaryDirectory() as workdir:
        with unittest.mock.patch.object(training_loop, "Progress", RecordingProgress):
            began = time.perf_counter()
            training_loop.train_and_evaluate(config, workdir)
    record(steps)
    return loops


def make_bare_loop(config):
    """Returns a traced loop over a constant batch, and the seconds to the end of its first step."""
    strategy = make_strategy(**config.distribution)
    data = pipeline.open_data(config.data, seed=config.seed)
    # Kept alive: TensorFlow may crash if an iterator is destroyed while it prefetches.
    batches = iter(data.train_batches(strategy, config.train.global_batch_size))
    batch = next(batches)
    began = time.perf_counter()
    trainer = build_trainer_for(config, strategy, data)

    @tf.function
    def loop(num_steps):
        for _ in tf.range(num_steps):
            strategy.run(trainer.step, args=batch)

    loop(tf.constant(1))
    return loop, time.perf_counter() - began


def first_step(data_dir):
    class FirstStepDone(Exception):
        pass

    class StoppingProgress(Progress):
        def update(self, step, *values):
            raise FirstStepDone

    config = inception_config()
    with tempfile.TemporaryDirectory() as workdir:
        with unittest.mock.patch.object(training_loop, "Progress", StoppingProgress):
            began = time.perf_counter()
            try:
                training_loop.train_and_evaluate(config, workdir)
            except FirstStepDone:
                print(time.perf_counter() - began)


def bare_first_step(data_dir):
    print(make_bare_loop(inception_config())[1])


def seconds_of(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def resident_bytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


PARTS = {f.__name__: f for f in (mlp, inception, start, checkpoint, memory)}
# The parts that `start` runs in processes of their own.
PARTS_OF_START = {"first-step": first_step, "bare-first-step": bare_first_step}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--data_dir", default="")
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part not in PARTS | PARTS_OF_START:
            parser.error(f"unknown part {part!r}: expected one of {', '.join(PARTS)}")
    if len(arguments.parts) == 1:
        sys.exit((PARTS | PARTS_OF_START)[arguments.parts[0]](arguments.data_dir) is False)
    command = [sys.executable, __file__, f"--data_dir={arguments.data_dir}"]
    sys.exit(any([subprocess.call([*command, part]) for part in arguments.parts]))


if __name__ == "__main__":
    main()
