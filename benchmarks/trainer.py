"""What the trainer adds to a training step of the section 4.1 network.

A step through train_and_evaluate, with input, metrics, evaluations every 1,000 steps and
checkpoints every 5,000, against the same step in a bare tf.range loop over one constant batch.
The time of a short run is taken off that of a long one, so that building the graph doesn't count.

    python benchmarks/trainer.py [folder of prepared TFDS data sets with MNIST]

Without the folder the network is trained on scikit-learn's digits, with 64 inputs for 784.
"""

import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import keras
import tensorflow as tf

from bn_keras import distribution, models
from bn_keras.data import pipeline
from bn_keras.train import Trainer, train_and_evaluate
from configs import mnist_bn

SHORT, LONG, ROUNDS = 2_000, 22_000, 3
LIMIT = 1.3


def make_config(data_dir):
    config = mnist_bn.get_config()
    if data_dir:
        config.data.data_dir = data_dir
    else:
        config.data.name = "digits"
        config.data.validation_split = "validation"
        config.evaluation.global_batch_size = 120
    return config


def seconds_of_run(config, steps):
    config.train.steps = steps
    with tempfile.TemporaryDirectory() as workdir:
        began = time.perf_counter()
        train_and_evaluate(config, workdir)
        return time.perf_counter() - began


def make_bare_loop(config):
    strategy = distribution.make_strategy(**config.distribution)
    data = pipeline.open_data(config.data, seed=config.seed)
    model = models.from_config(config, data.input_shape, data.num_classes)
    optimizer = keras.optimizers.SGD(config.schedule.base_rate, momentum=config.train.momentum)
    optimizer.build(model.trainable_variables)
    trainer = Trainer(model, optimizer, strategy, config.train.global_batch_size)
    images, labels = next(iter(data.train_batches(strategy, config.train.global_batch_size)))

    @tf.function
    def loop(num_steps):
        for _ in tf.range(num_steps):
            trainer.train_step(images, labels)

    loop(tf.constant(1))
    return loop


def main():
    config = make_config(sys.argv[1] if len(sys.argv) > 1 else "")
    loop = make_bare_loop(config)
    bare, trained = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        loop(tf.constant(LONG - SHORT))
        bare.append((time.perf_counter() - began) / (LONG - SHORT))
        short, long = (seconds_of_run(config, steps) for steps in (SHORT, LONG))
        trained.append((long - short) / (LONG - SHORT))
    bare_step, step = statistics.median(bare), statistics.median(trained)
    print(
        f"{config.data.name}: a step through the trainer {step * 1e6:.0f} us, bare"
        f" {bare_step * 1e6:.0f} us, ratio {step / bare_step:.2f} (at most {LIMIT} is wanted)"
    )
    sys.exit(step / bare_step > LIMIT)


if __name__ == "__main__":
    main()
