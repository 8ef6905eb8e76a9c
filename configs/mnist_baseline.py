"""The network of section 4.1 without BN, on MNIST: 50,000 steps of 60 examples.

    bn-keras train --config=mnist_baseline --workdir=runs/mnist_baseline

Half a minute on 2 cores; 96.7% test accuracy.
"""

from ml_collections import ConfigDict

from bn_keras.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config().copy_and_resolve_references()
    config.data.name = "mnist"
    config.data.validation_split = "test"
    config.data.image_size = 0
    config.data.crop = "none"
    config.data.mirror = False
    config.data.distortion = 0.0
    # Data in memory is one shard: shuffling shards would never change its order.
    config.data.shuffle = "examples"
    config.data.binary = True
    config.model.name = "mlp"
    config.model.variant = "baseline"
    # The paper: "small random Gaussian values". Standard deviation, rate and plain SGD are our choice.
    config.model.initializer = "normal"
    config.model.initializer_stddev = 0.1
    config.batch_norm.momentum = 0.99
    config.train.steps = 50_000
    config.train.global_batch_size = 60
    config.train.momentum = 0.0
    config.train.l2 = 0.0
    config.schedule.base_rate = 0.1
    config.schedule.reference_batch_size = 60
    config.schedule.decay_factor = 1.0
    config.evaluation.every_steps = 1_000
    config.evaluation.global_batch_size = 1_000
    # The input of the last hidden layer's sigmoids (Figure 1b, c).
    config.record.layer = "sigmoid_3"
    config.distribution.strategy = "one_device"
    return config.lock()
