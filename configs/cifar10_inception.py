"""Inception in miniature on CIFAR-10: a quarter of the width, a 3x3 stem with stride 2.

    python -m launch.train --config=configs/cifar10_inception.py --workdir=runs/cifar10_inception

Some 4 minutes on 2 cores; 38.5% validation accuracy. The base rate is not the outcome of a search
yet.
"""

from ml_collections import ConfigDict

from configs import inception


def get_config() -> ConfigDict:
    config = inception.get_config().copy_and_resolve_references()
    config.data.name = "cifar10"
    config.data.validation_split = "test"
    config.data.image_size = 0
    config.data.crop = "shift"
    # Full distortion is meant for photographs of 224 pixels.
    config.data.distortion = 0.0
    # In memory there are no shards whose order could change.
    config.data.shuffle = "examples"
    config.model.width = 0.25
    config.model.stem = "cifar"
    # Remembers ten steps: with 0.99 a short run would show the lag of the average for its first
    # hundred steps and more, and not the network.
    config.batch_norm.momentum = 0.9
    config.schedule.base_rate = 0.01
    config.train.steps = 1500
    config.train.steps_per_loop = 50
    config.evaluation.every_steps = 150
    config.evaluation.global_batch_size = 500
    config.checkpoint.every_steps = 300
    config.distribution.replicas = 2
    return config.lock()
