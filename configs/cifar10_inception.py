"""Inception in miniature on CIFAR-10: a quarter of the width, a 3x3 stem with stride 2.

    bn-keras train --config=cifar10_inception --workdir=runs/cifar10_inception

About 5 minutes on one core; 46.2% test accuracy (mean over 3 seeds). The initialization and the
base rate are the best in this search for Inception,

    bn-keras search --config=cifar10_inception --workdir=runs/search --base_rates=0.005,0.01,0.02,0.04 --seeds=0 --config.data.train_split='train[:45000]' --config.data.validation_split='train[45000:]' --config.evaluation.every_steps=500

which does not use the test images. On the 5,000 held-out training images: 45.7% at 0.01, and 44.4%,
43.8% and 41.1% at 0.04, 0.02 and 0.005; with Glorot weights at best 38.3% (at 0.02). The other
networks use the paper's multiples of this rate.
"""

from ml_collections import ConfigDict

from . import inception


def get_config() -> ConfigDict:
    config = inception.get_config().copy_and_resolve_references()
    config.data.name = "cifar10"
    config.data.validation_split = "test"
    config.data.image_size = 0
    config.data.crop = "shift"
    # Data in memory is one shard: shuffling shards would never change its order.
    config.data.shuffle = "examples"
    config.model.width = 0.25
    config.model.stem = "cifar"
    # An average over ten steps: with 0.99 the moving statistics would lag by a hundred steps, a
    # good part of this short run.
    config.batch_norm.momentum = 0.9
    config.schedule.base_rate = 0.01
    config.train.steps = 3000
    # This run is a miniature of the 6e6 steps of the paper's best network. Its decay is faster in
    # proportion: the accelerated networks end at 1% of their rate, as in the paper.
    config.schedule.decay_epochs *= config.train.steps / 6e6 * 1_281_167 / 50_000
    config.train.steps_per_loop = 50
    config.evaluation.every_steps = 250
    config.evaluation.global_batch_size = 500
    config.checkpoint.every_steps = 1000
    # Two runs in parallel, on one core each, are faster than one after the other on two replicas.
    config.distribution.strategy = "one_device"
    return config.lock()
