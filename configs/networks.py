"""What the paper's networks change, applied to the config of its Inception."""

from collections.abc import Callable, Mapping
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


class Change(NamedTuple):
    """One of section 4.2.1's changes, but for the learning rate, which differs by network.

    Attributes:
      key: of the config.
      made: gives its value in an accelerated network for the one in Inception.
    """

    key: str
    made: Callable[[object], object]


# The paper gives no number for the distortions: half is ours.
CHANGES = {
    "dropout": Change("model.dropout", lambda fraction: 0.0),
    "l2": Change("train.l2", lambda weight: weight / 5),
    "decay": Change("schedule.decay_epochs", lambda epochs: epochs / 6),
    "lrn": Change("model.local_response_normalization", lambda present: False),
    "shuffling": Change("data.shuffle", lambda order: "examples"),
    "distortions": Change("data.distortion", lambda strength: strength / 2),
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

# What a variant is but for its own changes, if it is not one of the five networks.
_LIKE = dict.fromkeys(ENSEMBLE, "bn_x30") | {"inception_sigmoid": "inception"}


def value_of(config: ConfigDict, key: str) -> object:
    """Gives what stands under a key such as "train.l2"."""
    section, name = key.split(".")
    return config[section][name]


def replaced(config: ConfigDict, values: Mapping[str, object]) -> ConfigDict:
    """Gives a copy of a config with other values under keys such as "train.l2"."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(values)
    return config.lock()


def accelerate(inception: ConfigDict) -> ConfigDict:
    """Makes all of CHANGES in a copy of Inception's config."""
    changed = {key: made(value_of(inception, key)) for key, made in CHANGES.values()}
    return replaced(inception, changed)


def derive(inception: ConfigDict, variant: str) -> ConfigDict:
    """Makes the config of a variant out of Inception's, as sections 4.2.1 to 4.2.3 say.

    An accelerated network has a higher rate and all of CHANGES. A member of the ensemble is BN-x30
    but for its own changes.
    """
    network = NETWORKS[_LIKE.get(variant, variant)]
    config = accelerate(inception) if network.accelerated else inception
    values = {
        "model.variant": variant,
        "schedule.base_rate": network.rate * inception.schedule.base_rate,
    }
    if variant in ENSEMBLE:
        values |= {f"model.{key}": value for key, value in ENSEMBLE[variant]._asdict().items()}
    return replaced(config, values)


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
