"""Inception in miniature on CIFAR-10: a quarter of the width, a 3x3 stem with stride 2.

    python -m launch.train --config=configs/cifar10_inception.py --workdir=runs/cifar10_inception

Some 5 minutes on one core; 46.2% on the test images (mean over 3 seeds). The initialization and the
base rate are Inception's best of

    python -m launch.search --config=configs/cifar10_inception.py --workdir=runs/search --base_rates=0.005,0.01,0.02,0.04 --seeds=0 --config.data.train_split='train[:45000]' --config.data.validation_split='train[45000:]' --config.evaluation.every_steps=500

in which the test images have no part: on the 5,000 training images that are left out, 45.7%; at the
rates 0.04, 0.02 and 0.005 it is 44.4%, 43.8% and 41.1%, and with Glorot weights 38.3% at best (at 0.02).
The other networks' rates are the paper's multiples of it.
"""

from ml_collections import ConfigDict

from . import inception


def get_config() -> ConfigDict:
    config = inception.get_config().copy_and_resolve_references()
    config.data.name = "cifar10"
    config.data.validation_split = "test"
    config.data.image_size = 0
    config.data.crop = "shift"
    # In memory all is one shard, whose order would never change.
    config.data.shuffle = "examples"
    config.model.width = 0.25
    config.model.stem = "cifar"
    # Remembers ten steps: with 0.99 a short run would show the lag of the average for its first
    # hundred steps and more, and not the network.
    config.batch_norm.momentum = 0.9
    config.schedule.base_rate = 0.01
    config.train.steps = 3000
    # The run stands for the 6e6 steps to which the paper trained its best network: the epochs of
    # the decay shrink with it, so that the accelerated networks end at 1% of their rate, too.
    config.schedule.decay_epochs *= config.train.steps / 6e6 * 1_281_167 / 50_000
    config.train.steps_per_loop = 50
    config.evaluation.every_steps = 250
    config.evaluation.global_batch_size = 500
    config.checkpoint.every_steps = 1000
    # A core each for two runs side by side gets through more than two replicas of one.
    config.distribution.strategy = "one_device"
    return config.lock()
