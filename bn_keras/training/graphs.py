"""Traced graphs that runs of one process share if their configs differ in the seed alone."""

from typing import Any

import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras.distribute import make_strategy
from bn_keras.runs.settings import flatten
from bn_keras.training.evaluator import Evaluator
from bn_keras.training.step import Trainer

# A config without its seed.
_Settings = dict[str, Any]


class Graphs:
    """Traced graphs of the last finished run, for a next run with another seed.

    Tracing takes longer than the training itself in a run of a few hundred steps. The next run
    starts with the variables that a new network would have, so it is bit-identical.

    Attributes:
      evaluator: evaluator of the last run; None if the next run needs a new one.
    """

    def __init__(self) -> None:
        # The config of the current run as given: epochs are not yet converted to steps.
        self._given: _Settings | None = None
        # The config of the graphs, and the factor on the learning rate, which they contain.
        self._key: tuple[_Settings, float] | None = None
        self._strategy: tf.distribute.Strategy | None = None
        self._trainer: Trainer | None = None
        self.evaluator: Evaluator | None = None

    def make_strategy(self, config: ConfigDict) -> tf.distribute.Strategy:
        """Returns the strategy of the last run if its settings are the same, or a new one.

        Args:
          config: config as given, whose steps need not have been derived from its epochs.
        """
        last, self._given = self._given, _without_seed(config)
        if self._strategy and self._given == last:
            return self._strategy
        self.clear()
        return make_strategy(**config.distribution)

    def reuse(self, config: ConfigDict, rate_factor: float, new: Trainer) -> Trainer:
        """Returns the trainer of the last run with the variables of a new one, or the new one.

        Args:
          config: config of the new trainer, with its final steps; see `with_steps`.
          rate_factor: factor on its learning rate.
          new: trainer that has been built, but not traced.
        """
        if self._trainer is None or (_without_seed(config), rate_factor) != self._key:
            self.clear()
            return new
        self._trainer.restore(new.snapshot())
        return self._trainer

    def keep(
        self, config: ConfigDict, rate_factor: float, trainer: Trainer, evaluator: Evaluator
    ) -> None:
        """Keeps the graphs of a run that has finished; the first arguments are those of `reuse`."""
        self._key = _without_seed(config), rate_factor
        self._strategy, self._trainer, self.evaluator = trainer.strategy, trainer, evaluator

    def clear(self) -> None:
        """Frees the graphs."""
        self._key = self._strategy = self._trainer = self.evaluator = None


def _without_seed(config: ConfigDict) -> _Settings:
    return {key: value for key, value in flatten(config).items() if key != "seed"}
