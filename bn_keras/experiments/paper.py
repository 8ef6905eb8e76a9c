"""The paper's experiments as lists of runs, at three scales.

"digits" takes minutes, "cifar10" an hour on two cores, and "imagenet" has the paper's own size.
"""

from collections.abc import Iterable
from typing import NamedTuple

from ml_collections import ConfigDict

from bn_keras.experiments import titles
from bn_keras.experiments.claim_runs import get_claim_configs
from bn_keras.models.bn_inception import ENSEMBLE
from bn_keras.training.config_files import load_config
from bn_keras.training.networks import NETWORKS, replaced

EXPERIMENTS = ("figure1", "figure2", "figure3", "figure4", "claims")
SCALES = ("digits", "cifar10", "imagenet")


class Trial(NamedTuple):
    """Identity of a run; str() is its name.

    Attributes:
      title: title of the network.
      seed: seed of the run.
    """

    title: str
    seed: int

    def __str__(self) -> str:
        return f"{self.title} seed {self.seed}"


def get_trials(experiments: Iterable[str], scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    """Returns the configs of the runs of some experiments; a shared run occurs once.

    Args:
      experiments: names in EXPERIMENTS.
      scale: one of SCALES.
      seeds: number of runs of each network that a figure compares, with seeds 0, 1, ...
    """
    trials = {}
    for experiment in experiments:
        trials.update(_TRIALS[experiment](scale, seeds))
    return trials


def _figure_1(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    configs = {
        titles.WITH_BN: load_config("mnist_bn"),
        titles.WITHOUT_BN: load_config("mnist_baseline"),
    }
    if scale == "digits":
        configs = {title: _on_digits(config) for title, config in configs.items()}
    return _with_seeds(configs, seeds)


def _on_digits(config: ConfigDict) -> ConfigDict:
    """Returns a config of section 4.1 for a quick run: 1,442 images, 3,000 steps."""
    return replaced(
        config,
        {
            "data.name": "digits",
            "data.validation_split": "validation",
            "train.steps": 3_000,
            "train.steps_per_loop": 100,
            "evaluation.every_steps": 100,
            "evaluation.global_batch_size": 360,
            "record.every_steps": 100,
            "checkpoint.every_steps": 1_000,
        },
    )


def _five_networks(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    configs = {network.title: _load(scale, variant) for variant, network in NETWORKS.items()}
    return _with_seeds(configs, seeds)


def _figure_4(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    """Returns the six members of the ensemble, which have fixed seeds."""
    return {
        Trial(f"BN-x30 ensemble {number}", number): _load(scale, "bn_x30_ensemble", str(number))
        for number in range(1, len(ENSEMBLE) + 1)
    }


def _claims(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    """Returns the five networks, and one run of each network that they are compared with."""
    others = get_claim_configs(_load(scale, "inception"))
    return _five_networks(scale, seeds) | {Trial(t, 0): config for t, config in others.items()}


_TRIALS = {
    "figure1": _figure_1,
    "figure2": _five_networks,
    "figure3": _five_networks,
    "figure4": _figure_4,
    "claims": _claims,
}


def _load(scale: str, name: str, *arguments: str) -> ConfigDict:
    prefix = "" if scale == "imagenet" else f"{scale}_"
    return load_config(":".join([f"{prefix}{name}", *arguments]))


def _with_seeds(configs: dict[str, ConfigDict], seeds: int) -> dict[Trial, ConfigDict]:
    return {
        Trial(title, seed): replaced(config, {"seed": seed})
        for title, config in configs.items()
        for seed in range(seeds)
    }
