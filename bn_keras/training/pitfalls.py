"""Warnings about valid settings and data that are probably unintended, such as a vanishing rate."""

import keras
import numpy as np
from ml_collections import ConfigDict

from bn_keras.data.pipeline import Data
from bn_keras.keras_internals import trains_batch_norm
from bn_keras.text import counted
from bn_keras.training.class_report import name_rare_classes
from bn_keras.training.length import global_micro_batch_size
from bn_keras.training.schedule import PAPER_BATCH_SIZE, ExamplesSchedule

# Ratio of the largest to the smallest class from which the trainer suggests to balance them.
_UNEQUAL = 10
# The trainer warns if more than _MAX_INITIAL_SHARE of BN's moving averages is still the initial
# value at the end, and advises a momentum that leaves _ADVISED_INITIAL_SHARE. With a smaller
# maximum, the advised momentum would be almost the config's own.
_MAX_INITIAL_SHARE, _ADVISED_INITIAL_SHARE = 0.05, 0.01
# Number of examples that BN normalizes together below which the trainer warns. The error of a
# ResNet-50 on ImageNet is 23.6% with 32 examples, 23.7% with 16, 24.8% with 8 and 27.3% with 4
# (Wu & He 2018, arXiv 1803.08494, table 2).
_MIN_EXAMPLES = 16


def find_pitfalls(
    config: ConfigDict, schedule: ExamplesSchedule, model: keras.Model, replicas: int = 1
) -> list[str]:
    """Returns a line for each setting that is unlikely to be intended; see docs/training.md.

    Args:
      config: config with its final train.steps.
      schedule: schedule of the config.
      model: network of the config.
      replicas: number of replicas that train it.
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
    if trains_batch_norm(model):
        lines += _describe_small_mini_batch(config, replicas)
    if config.population.when == "never" and trains_batch_norm(model):
        updates = steps * config.train.micro_batches
        share = momentum**updates
        if share > _MAX_INITIAL_SHARE and not config.model.init_from:
            # Two digits of the share of each step, because those of the momentum may all be 9.
            advised = 1 - float(f"{1 - _ADVISED_INITIAL_SHARE ** (1 / updates):.2g}")
            lines.append(
                f"BN averages its mean and variance over more than the {counted(steps, 'step')} of"
                f" this run: at the end, {share:.0%} of the average is still the initial value, and"
                " the network is evaluated with it; set population.when='end', or"
                f" batch_norm.momentum={advised:g} instead of {momentum:g}"
            )
    return lines


def _describe_small_mini_batch(config: ConfigDict, replicas: int) -> list[str]:
    """Returns a line if BN normalizes few examples together, with settings that change that."""
    train, ghost_batch_size = config.train, config.batch_norm.virtual_batch_size
    # Replicas that share their statistics.
    sharing = replicas if config.batch_norm.synchronized else 1
    per_replica = global_micro_batch_size(config) // replicas
    size = sharing * (ghost_batch_size or per_replica)
    if size >= _MIN_EXAMPLES:
        return []
    if sharing * per_replica >= _MIN_EXAMPLES:
        reason = f"batch_norm.virtual_batch_size={ghost_batch_size}"
        remedies = ["a larger batch_norm.virtual_batch_size"]
    else:
        reason = f"train.global_batch_size={train.global_batch_size}"
        if train.micro_batches > 1:
            reason += f" in {train.micro_batches} micro-batches"
        if replicas > sharing:
            reason += f" on {replicas} replicas"
        remedies = [_advise_larger_batch(config, train.micro_batches * replicas // sharing)]
    if replicas > sharing and size * replicas >= _MIN_EXAMPLES:
        remedies.append("batch_norm.synchronized=True")
    return [
        f"BN normalizes only {counted(size, 'example')} together ({reason}), and the statistics of"
        f" fewer than {_MIN_EXAMPLES} are noisy: in a new workdir, set {', or '.join(remedies)}"
    ]


def _advise_larger_batch(config: ConfigDict, parts: int) -> str:
    """Returns the settings with which each part of a batch has as many examples as in the paper."""
    train, size = config.train, PAPER_BATCH_SIZE * parts
    factor = size / train.global_batch_size
    settings = [f"train.global_batch_size={size}"]
    if not train.epochs:
        # As many examples in total.
        settings.append(f"train.steps={max(1, round(train.steps / factor))}")
    if config.batch_norm.virtual_batch_size:
        settings.append("batch_norm.virtual_batch_size=0")
    return f"{' and '.join(settings)} (the learning rate becomes {factor:.3g} times as high)"


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
