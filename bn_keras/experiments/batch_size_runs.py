"""Configs of the runs that relate accuracy to the statistical batch size.

The statistical batch size is the number of examples that BN computes its statistics from.
"""

from ml_collections import ConfigDict

from bn_keras.experiments import titles
from bn_keras.experiments.claim_runs import accelerated_steps
from bn_keras.runs.settings import replaced
from bn_keras.training.networks import derive

# Statistical batch sizes; the largest is the batch of the gradient in all runs.
SIZES = (2, 4, 8, 32, 128)


def get_batch_size_configs(inception: ConfigDict) -> dict[str, ConfigDict]:
    """Returns the configs by title, derived from Inception's config at some scale.

    BN-x5 is trained with the same batches of 128 images in all runs; ghost batches change only what
    BN normalizes together. The runs have as many epochs as those of BN-x5, a quarter of its steps,
    and by linear scaling four times its learning rate. They have one replica, whose batch the ghost
    batches divide.
    """
    x5 = derive(inception, "bn_x5")
    largest = max(SIZES)
    factor = largest // x5.train.global_batch_size
    common = {
        "train.global_batch_size": largest,
        "train.steps": accelerated_steps(inception) // factor,
        "evaluation.every_steps": max(1, x5.evaluation.every_steps // factor),
        "checkpoint.every_steps": max(1, x5.checkpoint.every_steps // factor),
        "distribution.strategy": "one_device",
        "distribution.replicas": 0,
    }
    return {
        titles.with_statistical_batch(size): replaced(
            x5, common | {"batch_norm.virtual_batch_size": size if size < largest else 0}
        )
        for size in SIZES
    }
