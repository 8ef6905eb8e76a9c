"""The paper's experiments as lists of runs, at three scales.

"digits" takes two minutes, "cifar10" hours to days on two cores, and "imagenet" has the paper's own
size.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from bn_keras.experiments import titles
from bn_keras.experiments.batch_size_runs import get_batch_size_configs
from bn_keras.experiments.claim_runs import get_claim_configs
from bn_keras.models.bn_inception import ENSEMBLE
from bn_keras.runs.settings import replaced
from bn_keras.training.config_files import load_config
from bn_keras.training.networks import NETWORKS, shortened

EXPERIMENTS = ("figure1", "figure2", "figure3", "figure4", "batch_size", "claims")
SCALES = ("digits", "cifar10", "imagenet")

# Training images per second and core by model and data set, including evaluations and saves, on 2
# cores of an AMD EPYC virtual machine.
_IMAGES_PER_SECOND = {
    ("inception", "digits"): 330,
    ("inception", "cifar10"): 270,
    ("mlp", "digits"): 50_000,
    ("mlp", "mnist"): 50_000,
}


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

    They are in the order of training. In long runs, all networks of an experiment with the first
    seed precede those with the second, so that a report can compare the networks early.

    Args:
      experiments: names in EXPERIMENTS.
      scale: one of SCALES.
      seeds: number of runs of each network that a figure compares, with seeds 0, 1, ...
    """
    trials = {}
    for experiment in experiments:
        trials.update(_TRIALS[experiment](scale, seeds))
    return trials


def estimate_core_hours(config: ConfigDict) -> float | None:
    """Estimates the core-hours of a whole run; None where no run of its kind has been measured."""
    rate = _IMAGES_PER_SECOND.get((config.model.name, config.data.name))
    images = config.train.steps * config.train.global_batch_size
    return images / rate / 3600 if rate else None


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
    # Building the graph takes longer than a run on digits; consecutive seeds share it.
    return _with_seeds(configs, seeds, by_title=scale == "digits")


def _figure_4(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    """Returns the six members of the ensemble, which have fixed seeds."""
    return {
        Trial(f"BN-x30 ensemble {number}", number): _load(scale, "bn_x30_ensemble", str(number))
        for number in range(1, len(ENSEMBLE) + 1)
    }


def _batch_size(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    inception = _load(scale, "inception")
    if scale == "cifar10":  # 5 epochs separate the sizes; 20 would take 6 hours of a core.
        inception = shortened(inception, 4)
    return _with_seeds(get_batch_size_configs(inception), 1)


def _claims(scale: str, seeds: int) -> dict[Trial, ConfigDict]:
    """Returns the five networks, and one run of each network that they are compared with."""
    others = get_claim_configs(_load(scale, "inception"))
    return _five_networks(scale, seeds) | _with_seeds(others, 1)


_TRIALS = {
    "figure1": _figure_1,
    "figure2": _five_networks,
    "figure3": _five_networks,
    "figure4": _figure_4,
    "batch_size": _batch_size,
    "claims": _claims,
}


def _load(scale: str, name: str, *arguments: str) -> ConfigDict:
    prefix = "" if scale == "imagenet" else f"{scale}_"
    return load_config(":".join([f"{prefix}{name}", *arguments]))


def _with_seeds(
    configs: Mapping[str, ConfigDict], seeds: int, by_title: bool = False
) -> dict[Trial, ConfigDict]:
    """Returns a run of each config with each seed, ordered by seed or by title."""
    trials = {
        Trial(title, seed): replaced(config, {"seed": seed})
        for seed in range(seeds)
        for title, config in configs.items()
    }
    titles_in_order = list(configs)
    if by_title:
        return dict(sorted(trials.items(), key=lambda item: titles_in_order.index(item[0].title)))
    return trials
