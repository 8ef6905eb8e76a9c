"""Warnings about valid settings and data that are probably unintended, such as a vanishing rate."""

import keras
import numpy as np
from ml_collections import ConfigDict

from bn_keras.data.pipeline import Data
from bn_keras.keras_internals import batch_norm_layers
from bn_keras.text import counted
from bn_keras.training.class_report import name_rare_classes
from bn_keras.training.schedule import ExamplesSchedule

# Ratio of the largest to the smallest class from which the trainer suggests to balance them.
_UNEQUAL = 10
# Share of the initial values in BN's moving averages at the end: above the first, the trainer warns
# and advises a momentum that leaves the second. With a smaller share, the advised momentum would be
# almost the config's own.
_MAX_INITIAL_SHARE, _ADVISED_INITIAL_SHARE = 0.05, 0.01


def find_pitfalls(config: ConfigDict, schedule: ExamplesSchedule, model: keras.Model) -> list[str]:
    """Returns a line for each setting that is unlikely to be intended; see docs/training.md.

    Args:
      config: config with its final train.steps.
      schedule: schedule of the config.
      model: network of the config.
    """
    lines = []
    if config.data.train_split == config.data.validation_split:
        lines.append(
            f"data.train_split and data.validation_split are both {config.data.train_split!r}:"
            " validation accuracy does not show how well the network generalizes"
        )
    steps = config.train.steps
    # In the second half, a low rate is the purpose of a decay.
    low_from = schedule.vanishes_at(steps)
    if low_from is not None and low_from < steps / 2:
        lines.append(
            f"the learning rate is below 1% of its highest value from step {low_from:,} of"
            f" {steps:,} on, and hardly anything is learned after it: raise schedule.decay_epochs,"
            " set schedule.decay='cosine', or train for fewer steps"
        )
    momentum = config.batch_norm.momentum
    layers = batch_norm_layers(model)
    if config.population.when == "never" and any(layer.trainable for layer in layers):
        share = momentum**steps
        if share > _MAX_INITIAL_SHARE and not config.model.init_from:
            # Two digits of the share of each step, because those of the momentum may all be 9.
            advised = 1 - float(f"{1 - _ADVISED_INITIAL_SHARE ** (1 / steps):.2g}")
            lines.append(
                f"BN averages its mean and variance over more than the {counted(steps, 'step')} of"
                f" this run: at the end, {share:.0%} of the average is still the initial value, and"
                " the network is evaluated with it; set population.when='end', or"
                f" batch_norm.momentum={advised:g} instead of {momentum:g}"
            )
    return lines


def find_class_pitfalls(data: Data) -> list[str]:
    """Returns lines about classes that have no or few training images, or very unequal numbers.

    Nothing is known about the classes of a set that is read from TFRecord files.
    """
    if data.class_counts is None:
        return []
    lines = name_rare_classes(data.class_names, data.class_counts, "training", "to learn from")
    sizes = data.class_counts[data.class_counts > 0]
    if len(sizes) == 1:
        [only] = np.flatnonzero(data.class_counts)
        lines.append(
            f"all training images have the class {data.class_names[only]!r}:"
            " there is nothing to classify; is data.data_dir the right folder?"
        )
    if data.balance == "none" and sizes.max() >= _UNEQUAL * sizes.min():
        lines.append(
            f"the classes have from {sizes.min():,} to {sizes.max():,} training images, so the"
            " network favours the large ones: set data.balance='weights' or 'sampling' in a new"
            " workdir"
        )
    return lines


def describe_balance(data: Data) -> list[str]:
    """Returns lines about what data.balance does to the classes."""
    if data.balance == "weights" and data.class_weights is not None:
        weights = data.class_weights[data.class_weights > 0]
        return [
            f"the loss weighs each class by the inverse of its size: from {weights.min():.3g} to"
            f" {weights.max():.3g}; the reported loss and accuracy are unweighted"
        ]
    if data.balance == "sampling":
        groups = data.num_balanced_groups
        within = f", within each of {groups:,} groups of shards" if groups > 1 else ""
        return [
            f"all classes are drawn equally often{within}; an epoch has"
            f" {data.num_train_examples:,} draws"
        ]
    return []
