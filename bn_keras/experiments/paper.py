"""The paper's experiments, each a list of runs, in three sizes.

"digits" takes minutes, "cifar10" an hour on two cores, and "imagenet" is the paper's own.
"""

from collections.abc import Iterable
from typing import NamedTuple

from ml_collections import ConfigDict

from bn_keras.experiments import titles
from bn_keras.experiments.claim_runs import get_claim_runs
from bn_keras.models.bn_inception import ENSEMBLE
from bn_keras.training.config_files import load_config
from bn_keras.training.networks import NETWORKS

EXPERIMENTS = ("figure1", "figure2", "figure3", "figure4", "claims")
SCALES = ("digits", "cifar10", "imagenet")


class Trial(NamedTuple):
    """What a run is: str() names it.

    Attributes:
      title: of what is trained.
      seed: of the run.
    """

    title: str
    seed: int

    def __str__(self) -> str:
        return f"{self.title} seed {self.seed}"


def get_runs(experiments: Iterable[str], scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    """Gives the runs of some experiments, each run once.

    Args:
      experiments: of EXPERIMENTS.
      scale: of SCALES.
      seeds: how many runs, of seeds 0, 1, ..., there are of what a figure compares.
    """
    runs = {}
    for experiment in experiments:
        runs.update(_RUNS[experiment](scale, seeds))
    return runs


def _figure_1(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    configs = {
        titles.WITH_BN: load_config("mnist_bn"),
        titles.WITHOUT_BN: load_config("mnist_baseline"),
    }
    if scale == "digits":
        configs = {title: _on_digits(config) for title, config in configs.items()}
    return _seeded(configs, seeds)


def _on_digits(config: ConfigDict) -> ConfigDict:
    """Section 4.1's network for a test of all that is around it: 1,442 images, 3,000 steps."""
    config = config.copy_and_resolve_references()
    config.data.name = "digits"
    config.data.validation_split = "validation"
    config.train.steps = 3_000
    config.train.steps_per_loop = 100
    config.evaluation.every_steps = 100
    config.evaluation.global_batch_size = 360
    config.record.every_steps = 100
    config.checkpoint.every_steps = 1_000
    return config.lock()


def _five(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    configs = {network.title: _load(scale, variant) for variant, network in NETWORKS.items()}
    return _seeded(configs, seeds)


def _figure_4(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    """The six have seeds of their own, whatever `seeds` is."""
    return {
        Trial(f"BN-x30 ensemble {number}", number): _load(scale, "bn_x30_ensemble", str(number))
        for number in range(1, len(ENSEMBLE) + 1)
    }


def _claims(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    """The five networks, and one run each of what they are compared with."""
    others = get_claim_runs(_load(scale, "inception"))
    return _five(scale, seeds) | {Trial(title, 0): config for title, config in others.items()}


_RUNS = dict(zip(EXPERIMENTS, (_figure_1, _five, _five, _figure_4, _claims), strict=True))


def _load(scale: str, name: str, *arguments: str) -> ConfigDict:
    prefix = "" if scale == "imagenet" else f"{scale}_"
    return load_config(":".join([f"{prefix}{name}", *arguments]))


def _seeded(configs: dict[str, ConfigDict], seeds: int) -> dict[Trial, ConfigDict]:
    runs = {}
    for title, config in configs.items():
        for seed in range(seeds):
            seeded = config.copy_and_resolve_references()
            seeded.seed = seed
            runs[Trial(title, seed)] = seeded.lock()
    return runs
