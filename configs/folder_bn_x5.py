"""BN-x5 at half the width on a few thousand images of your own, 128 pixels square.

    python -m launch.train --config=configs/folder_bn_x5.py --config.data.data_dir=pictures --workdir=runs/pictures

where pictures/train/CLASS and pictures/validation/CLASS hold the images, in .jpg, .png and the
like. If pictures/CLASS holds them, add

    --config.data.train_split='.[:90%]' --config.data.validation_split='.[90%:]'

A first try on 3,000 of CIFAR-10's images, enlarged to 160x128, gave 44% validation accuracy after
1,000 of the 4,000 steps, a quarter of an hour on 2 cores that had other work as well; the rate is
the paper's BN-x5, not the outcome of a search.
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import inception


def get_config() -> ConfigDict:
    config = networks.derive(inception.get_config(), "bn_x5").copy_and_resolve_references()
    config.data.name = "folder"
    config.data.image_size = 128
    # Downloaded pictures are not all whole; each that isn't is named.
    config.data.max_bad_examples = 20
    # A few thousand images don't teach more channels, and a CPU has to keep up.
    config.model.width = 0.5
    # Remembers a hundred steps of a short run.
    config.batch_norm.momentum = 0.99
    config.train.steps = 4_000
    config.train.steps_per_loop = 100
    # To about a thirtieth over 4,000 steps of 3,000 images.
    config.schedule.decay_epochs = 0.5
    config.evaluation.every_steps = 500
    config.checkpoint.every_steps = 500
    return config.lock()
