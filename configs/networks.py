"""What the paper's five networks change, applied to the config of its Inception."""

from typing import NamedTuple

from ml_collections import ConfigDict


class Network(NamedTuple):
    """A row of the paper's section 4.2.2.

    Attributes:
      title: the paper's name of it.
      rate: factor on Inception's learning rate.
      accelerated: whether the changes of section 4.2.1 are made.
    """

    title: str
    rate: float
    accelerated: bool


NETWORKS = {
    "inception": Network("Inception", 1, False),
    "bn_baseline": Network("BN-Baseline", 1, False),
    "bn_x5": Network("BN-x5", 5, True),
    "bn_x30": Network("BN-x30", 30, True),
    "bn_x5_sigmoid": Network("BN-x5-Sigmoid", 5, True),
}


def derive(inception: ConfigDict, variant: str) -> ConfigDict:
    """Makes the config of a variant out of Inception's, as sections 4.2.1 and 4.2.2 say.

    An accelerated network has a higher rate, no dropout, a fifth of the L2 weight, a rate that
    decays 6 times faster, no local response normalization, examples shuffled within shards, and
    weaker photometric distortions (half is ours: the paper gives no number).
    """
    config = inception.copy_and_resolve_references()
    network = NETWORKS[variant]
    config.model.variant = variant
    config.schedule.base_rate *= network.rate
    if network.accelerated:
        config.model.dropout = 0.0
        config.model.local_response_normalization = False
        config.train.l2 /= 5
        config.schedule.decay_epochs /= 6
        config.data.shuffle = "examples"
        config.data.distortion /= 2
    return config.lock()
