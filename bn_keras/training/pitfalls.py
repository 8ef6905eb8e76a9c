"""Settings that are valid, but hardly meant: a vanishing rate, too long an average of BN."""

import keras
from ml_collections import ConfigDict

from bn_keras.keras_internals import all_layers
from bn_keras.training.schedule import ExamplesSchedule


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
    layers = [v for v in all_layers(model) if isinstance(v, keras.layers.BatchNormalization)]
    if config.population.when == "never" and any(layer.trainable for layer in layers):
        kept = momentum**steps
        if kept > 0.01 and not config.model.init_from:
            lines.append(
                f"BN's moving statistics still consist of their initial values to {kept:.0%} after"
                f" {steps:,} steps: lower batch_norm.momentum={momentum:g} (such as"
                f" {0.01 ** (1 / steps):.2g}), or set population.when='end'"
            )
    return lines
