"""Inception in miniature on scikit-learn's digits: 8x8 pixels, 10 classes, no download.

    bn-keras train --config=digits_inception --workdir=runs/digits_inception

Half of the modules at an eighth of the width, and 150 steps: as in the paper, Inception is still
improving when the networks with BN have long reached its accuracy. Half a minute on one core.
Expected: 87.6% validation accuracy (one seed).

The initialization and the base rate are the best in an earlier search for Inception with all ten
modules and 600 steps; with Glorot weights, no rate works for every seed. The other networks
use the paper's multiples of this rate.
"""

from ml_collections import ConfigDict

from . import inception


def get_config() -> ConfigDict:
    config = inception.get_config().copy_and_resolve_references()
    config.data.name = "digits"
    config.data.image_size = 0
    config.data.crop = "none"
    # A mirrored digit is another digit, or none at all.
    config.data.mirror = False
    config.data.distortion = 0.0
    # Data in memory is one shard: shuffling shards would never change its order.
    config.data.shuffle = "examples"
    config.model.width = 0.125
    config.model.stem = "digits"
    config.model.modules = ("3a", "3c", "4a", "4e", "5b")
    # An average over ten steps: with 0.99 the moving statistics would lag by a hundred steps, most
    # of this short run.
    config.batch_norm.momentum = 0.9
    config.schedule.base_rate = 0.01
    config.train.steps = 150
    config.train.steps_per_loop = 10
    config.evaluation.every_steps = 10
    config.evaluation.global_batch_size = 360
    config.evaluation.per_class = False
    config.checkpoint.every_steps = 50
    # Two runs in parallel, on one core each, are faster than one after the other on two replicas.
    config.distribution.strategy = "one_device"
    return config.lock()
