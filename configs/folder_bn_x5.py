"""BN-x5 at half the width, for a hundred to a few thousand images of your own, 128 pixels square.

    bn-keras train --config=folder_bn_x5 --config.data.data_dir=pictures --workdir=runs/pictures

Expected layout: pictures/train/CLASS/*.jpg and pictures/validation/CLASS/*.jpg (or .png, .bmp, .gif, .webp).
For pictures/CLASS/*.jpg without splits, add

    --config.data.train_split='.[:90%]' --config.data.validation_split='.[90%:]'

40 epochs are 120 steps on 96 images, and 3,750 on 3,000. The warm-up and the cosine are counted in
epochs, too. Example: 480 CIFAR-10 images of five classes, of 30 to 200 images each, enlarged to
several sizes: 51% accuracy on 300 validation images (60 per class) after 600 steps, 53% at best;
about 100 images per second on 2 cores. (CIFAR-10 images are small; fine-tuning does better, see
docs/fine_tuning.md.) The learning rate is that of the paper's BN-x5, not the result of a search.
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import inception


def get_config() -> ConfigDict:
    config = networks.derive(inception.get_config(), "bn_x5").copy_and_resolve_references()
    config.data.name = "folder"
    config.data.image_size = 128
    # Some downloaded images are truncated; the log names each.
    config.data.max_bad_examples = 20
    # Enough for a few thousand images, and fast enough for a CPU.
    config.model.width = 0.5
    # An average over 20 steps: with 96 images, the run has 120.
    config.batch_norm.momentum = 0.95
    # Counted in epochs: the rate falls to 0 at the end, however many images there are.
    config.train.epochs = 40.0
    config.train.steps_per_loop = 20
    config.schedule.decay = "cosine"
    config.schedule.warmup_epochs = 2.0
    # 20 evaluations, however many images there are.
    config.evaluation.every_epochs = 2.0
    config.checkpoint.every_steps = 500
    return config.lock()
