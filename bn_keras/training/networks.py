"""Derives the training configs of the paper's networks from the config of its Inception.

Differences in the network itself are in bn_keras/models/bn_inception.py, VARIANTS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bn_keras.errors import UsageError
from bn_keras.models.bn_inception import ENSEMBLE, VARIANTS
from bn_keras.runs.settings import replaced


class Network(NamedTuple):
    """One of the five networks of section 4.2.2.

    Attributes:
      title: its name in the paper.
      rate: factor on Inception's learning rate.
      accelerated: whether it has the changes of section 4.2.1.
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
    """A change of section 4.2.1. The learning rate is not among them: it differs by network.

    Attributes:
      key: config key that changes.
      apply: maps Inception's value to that of an accelerated network.
    """

    key: str
    apply: Callable[[Any], Any]


# The paper gives no number for the distortions: one half is our choice.
CHANGES = {
    "dropout": Change("model.dropout", lambda fraction: 0.0),
    "l2": Change("train.l2", lambda weight: weight / 5),
    "decay": Change("schedule.decay_epochs", lambda epochs: epochs / 6),
    "lrn": Change("model.local_response_normalization", lambda present: False),
    "shuffling": Change("data.shuffle", lambda order: "examples"),
    "distortions": Change("data.distortion", lambda strength: strength / 2),
}

# The variants that are none of the five networks, and the network they are trained like.
_TRAINED_LIKE = dict.fromkeys(ENSEMBLE, "bn_x30") | {"inception_sigmoid": "inception"}


def value_of(config: ConfigDict, key: str) -> Any:
    """Returns the value of a key such as "train.l2"; if it is None, the variant's own value."""
    section, name = key.split(".")
    value = getattr(config[section], name)
    if value is None and section == "model" and config.model.variant in VARIANTS:
        return getattr(VARIANTS[config.model.variant], name)
    return value


def shortened(config: ConfigDict, factor: int) -> ConfigDict:
    """Returns a copy of a config with 1/factor of the steps and a decay faster in proportion."""
    return replaced(
        config,
        {
            "train.steps": config.train.steps // factor,
            "schedule.decay_epochs": config.schedule.decay_epochs / factor,
        },
    )


def accelerate(inception: ConfigDict) -> ConfigDict:
    """Returns Inception's config with all CHANGES and nothing else changed."""
    return replaced(
        inception, {key: apply(value_of(inception, key)) for key, apply in CHANGES.values()}
    )


def derive(inception: ConfigDict, variant: str) -> ConfigDict:
    """Returns the config of a variant, derived from Inception's as in sections 4.2.1 to 4.2.3.

    An accelerated network has a higher rate and all of CHANGES; those of the model come with the
    variant. A member of the ensemble is trained like BN-x30.
    """
    network = NETWORKS[_TRAINED_LIKE.get(variant, variant)]
    values: dict[str, Any] = {
        "model.variant": variant,
        "schedule.base_rate": network.rate * inception.schedule.base_rate,
    }
    if network.accelerated:
        values |= {
            key: apply(value_of(inception, key))
            for key, apply in CHANGES.values()
            if not key.startswith("model.")
        }
    return replaced(inception, values)


def derive_member(inception: ConfigDict, number: str) -> ConfigDict:
    """Returns the config of ensemble member "1" to "6"; its number is also its seed.

    Raises:
      UsageError: no such member.
    """
    variant = f"bn_x30_ensemble_{number}"
    if variant not in ENSEMBLE:
        numbers = ", ".join(name.rpartition("_")[2] for name in ENSEMBLE)
        raise UsageError(
            f"unknown ensemble member {number!r}: expected one of {numbers} after the colon"
        )
    return replaced(derive(inception, variant), {"seed": int(number)})
