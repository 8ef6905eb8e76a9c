"""Inception in miniature on scikit-learn's digits, which come with it: 8x8 pixels, 10 classes.

python -m launch.train --config=configs/digits_inception.py --workdir=runs/digits_inception
"""

from ml_collections import ConfigDict

from configs import inception


def get_config() -> ConfigDict:
    config = inception.get_config().copy_and_resolve_references()
    config.data.name = "digits"
    config.data.image_size = 0
    config.data.crop = "none"
    # A mirrored digit is another digit, or none.
    config.data.mirror = False
    config.data.distortion = 0.0
    # In memory there are no shards whose order could change.
    config.data.shuffle = "examples"
    config.model.width = 0.125
    config.model.stem = "digits"
    config.batch_norm.momentum = 0.9
    config.schedule.base_rate = 0.01
    config.schedule.decay_epochs = 8.0
    config.train.steps = 600
    config.train.steps_per_loop = 20
    config.evaluation.every_steps = 20
    config.evaluation.global_batch_size = 360
    config.checkpoint.every_steps = 200
    config.distribution.replicas = 2
    return config.lock()
