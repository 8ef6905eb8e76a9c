"""The paper's five networks, which Figures 2 and 3 compare."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bn_keras.errors import UsageError
from bn_keras.experiments.titles import INCEPTION
from bn_keras.report import published
from bn_keras.runs.history import Results, Run, Spread, over_seeds
from bn_keras.runs.metrics_log import ACCURACY


class FiveNetworks(NamedTuple):
    """The networks in the paper's order, as means over seeds and seed by seed.

    Attributes:
      results: runs of the five networks, without those that were not trained.
      bands: validation accuracy over seeds, by title and step.
      by_seed: one run of each network by title, for each seed that all networks share.
      target: highest mean accuracy of Inception, to which steps are counted; infinite if Inception
        was never evaluated, so that no network reaches it.
    """

    results: Results
    bands: Mapping[str, Mapping[int, Spread]]
    by_seed: Sequence[Mapping[str, Run]]
    target: float

    @classmethod
    def select(cls, results: Results) -> "FiveNetworks":
        """Selects the five networks; raises UsageError without Inception or a shared seed."""
        if not results.get(INCEPTION):
            raise UsageError(
                f"no run of {INCEPTION}: Figures 2 and 3 compare"
                f" {', '.join(results) or 'the other networks'} with it; train it too"
            )
        results = {title: results[title] for title in published.FIGURE_3 if results.get(title)}
        runs = {title: {run.config.seed: run for run in seeds} for title, seeds in results.items()}
        shared = sorted(set.intersection(*map(set, runs.values())))
        if not shared:
            seeds = "; ".join(f"{title}: {sorted(by_seed)}" for title, by_seed in runs.items())
            raise UsageError(
                f"no seed is shared by all networks ({seeds}): train all of them with one seed"
            )
        by_seed = [{title: runs[title][seed] for title in runs} for seed in shared]
        bands = {title: over_seeds(seeds, ACCURACY) for title, seeds in results.items()}
        target = max((spread.mean for spread in bands[INCEPTION].values()), default=math.inf)
        return cls(results, bands, by_seed, target)

    def steps_to_target(self, title: str) -> int | None:
        """Returns the first evaluated step at which the mean reaches the target, or None."""
        points = self.bands[title].items()
        return next((step for step, spread in points if spread.mean >= self.target), None)

    def best(self, title: str) -> Spread | None:
        """Returns the accuracies at the step with the highest mean; None without an evaluation."""
        return max(self.bands[title].values(), key=lambda spread: spread.mean, default=None)

    @property
    def global_batch_size(self) -> int:
        """Global batch size of Inception's runs."""
        return self.results[INCEPTION][0].config.train.global_batch_size
