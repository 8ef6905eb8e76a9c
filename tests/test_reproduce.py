"""The experiments are the runs that the paper's are, and one command makes and reports them."""

import itertools

import pytest

from bn_keras.experiments import paper as experiments
from bn_keras.training.config import check_config
from configs import bn_x30, cifar10_inception, inception, mnist_bn


@pytest.mark.parametrize("scale", experiments.SCALES)
def test_every_run_has_a_config_that_can_be_meant(scale):
    runs = experiments.get_runs(experiments.EXPERIMENTS, scale, seeds=2)
    for trial, config in runs.items():
        check_config(config)
        assert config.seed == trial.seed
    folders = {str(trial).lower() for trial in runs}
    assert len(folders) == len(runs)
    # Two networks with a title of their own are never trained twice.
    same = [
        (a, b) for (a, one), (b, other) in itertools.combinations(runs.items(), 2) if one == other
    ]
    assert same == []


def test_at_its_own_size_an_experiment_is_the_papers():
    runs = experiments.get_runs(["figure2"], "imagenet", seeds=1)
    assert [trial.title for trial in runs] == [
        "Inception",
        "BN-Baseline",
        "BN-x5",
        "BN-x30",
        "BN-x5-Sigmoid",
    ]
    assert list(runs.values())[0] == inception.get_config()
    assert list(runs.values())[3] == bn_x30.get_config()
    for scale in ("cifar10", "imagenet"):
        figure_1 = experiments.get_runs(["figure1"], scale, seeds=3)
        assert [str(trial) for trial in figure_1][:2] == ["with BN seed 0", "with BN seed 1"]
        config = figure_1[experiments.Trial("with BN", 2)].copy_and_resolve_references()
        config.seed = 0
        assert config == mnist_bn.get_config()


def test_experiments_share_what_they_have_in_common():
    five = experiments.get_runs(["figure2", "figure3"], "cifar10", seeds=3)
    assert len(five) == 15
    with_claims = experiments.get_runs(["figure2", "figure3", "claims"], "cifar10", seeds=3)
    assert with_claims.items() > five.items()
    assert five[experiments.Trial("Inception", 0)] == cifar10_inception.get_config()


def test_the_members_of_an_ensemble_have_seeds_of_their_own():
    members = experiments.get_runs(["figure4"], "digits", seeds=5)
    assert [trial.seed for trial in members] == [1, 2, 3, 4, 5, 6]
