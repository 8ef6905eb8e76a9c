"""What the paper's networks change, applied to the config of its Inception."""

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


class Member(NamedTuple):
    """A network of the ensemble of section 4.2.3: BN-x30 and what it changes in that.

    Attributes:
      initializer_scale: factor on the initial weights of the convolutions.
      dropout: fraction dropped before the classifier.
      per_activation_bn: whether BN in the last hidden layers is per activation.
    """

    initializer_scale: float = 1.0
    dropout: float = 0.0
    per_activation_bn: bool = False


# The paper says what was changed, but not in which of the six: that, and the factor, is ours.
ENSEMBLE = {
    "bn_x30_ensemble_1": Member(initializer_scale=2.0),
    "bn_x30_ensemble_2": Member(dropout=0.05),
    "bn_x30_ensemble_3": Member(dropout=0.1),
    "bn_x30_ensemble_4": Member(per_activation_bn=True),
    "bn_x30_ensemble_5": Member(initializer_scale=2.0, dropout=0.05),
    "bn_x30_ensemble_6": Member(per_activation_bn=True, dropout=0.1),
}


def derive(inception: ConfigDict, variant: str) -> ConfigDict:
    """Makes the config of a variant out of Inception's, as sections 4.2.1 to 4.2.3 say.

    An accelerated network has a higher rate, no dropout, a fifth of the L2 weight, a rate that
    decays 6 times faster, no local response normalization, examples shuffled within shards, and
    weaker photometric distortions (half is ours: the paper gives no number). A member of the
    ensemble is BN-x30 but for its own changes.
    """
    config = inception.copy_and_resolve_references()
    network = NETWORKS["bn_x30" if variant in ENSEMBLE else variant]
    config.model.variant = variant
    config.schedule.base_rate *= network.rate
    if network.accelerated:
        config.model.dropout = 0.0
        config.model.local_response_normalization = False
        config.train.l2 /= 5
        config.schedule.decay_epochs /= 6
        config.data.shuffle = "examples"
        config.data.distortion /= 2
    if variant in ENSEMBLE:
        config.model.update(ENSEMBLE[variant]._asdict())
    return config.lock()


def derive_member(inception: ConfigDict, number: str) -> ConfigDict:
    """Makes the config of a member of the ensemble, "1" to "6", with a seed of its own."""
    variant = f"bn_x30_ensemble_{number}"
    if variant not in ENSEMBLE:
        raise ValueError(
            f"no member {number!r} of the ensemble: give one of {', '.join(_NUMBERS)} after the"
            " colon"
        )
    config = derive(inception, variant)
    config.seed = int(number)
    return config


_NUMBERS = [variant.rpartition("_")[2] for variant in ENSEMBLE]
