"""Runs that differ in the seed alone share traced graphs, and are the same to the bit."""

import numpy as np
import pytest
from small import small_mlp

from bn_keras.errors import TrainingDivergedError
from bn_keras.experiments import run_all
from bn_keras.runs.settings import replaced
from bn_keras.training.graphs import Graphs
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.step import Trainer
from configs import digits_inception

FEW = {"train.steps": 4, "train.steps_per_loop": 2, "evaluation.every_steps": 2}


def with_dropout(seed):
    """A network whose dropout has a state of its own."""
    values = FEW | {"model.modules": ("3a",), "model.width": 0.03, "seed": seed}
    return replaced(digits_inception.get_config(), values)


@pytest.fixture
def traced(monkeypatch):
    """The trainers that were traced."""
    trainers, trace = [], Trainer.trace
    monkeypatch.setattr(Trainer, "trace", lambda t, b: [trainers.append(t), trace(t, b)])
    return trainers


def learned(result):
    return {key: value for key, value in result.items() if "per_second" not in key}


@pytest.mark.job
def test_a_run_with_shared_graphs_equals_a_run_alone(tmp_path, traced):
    graphs = Graphs()
    train_and_evaluate(with_dropout(0), tmp_path / "first", graphs=graphs)
    shared = train_and_evaluate(with_dropout(1), tmp_path / "shared", graphs=graphs)
    alone = train_and_evaluate(with_dropout(1), tmp_path / "alone")
    assert learned(shared) == learned(alone)
    first, second, third = traced
    assert first is second is not third
    assert first._train_loop.experimental_get_tracing_count() == 1


def test_another_network_has_its_own_graphs(tmp_path, traced):
    graphs = Graphs()
    for name, changes in (("a", {}), ("b", {"train.l2": 0.1}), ("c", {"train.l2": 0.1, "seed": 1})):
        train_and_evaluate(small_mlp(**FEW | changes), tmp_path / name, graphs=graphs)
    a, b, c = traced
    assert a is not b is c


def test_runs_of_a_length_in_epochs_share_graphs(tmp_path, traced):
    graphs = Graphs()
    epochs = FEW | {"train.epochs": 0.1, "evaluation.every_epochs": 0.05}
    for seed in (0, 1):
        train_and_evaluate(small_mlp(**epochs, seed=seed), tmp_path / f"{seed}", graphs=graphs)
    first, second = traced
    assert first is second


def test_a_divergence_ends_the_sharing(tmp_path, traced):
    graphs = Graphs()
    bad = FEW | {"model.variant": "baseline", "schedule.base_rate": 1e38}
    for seed in (0, 1):
        with pytest.raises(TrainingDivergedError):
            train_and_evaluate(small_mlp(**bad, seed=seed), tmp_path / f"{seed}", graphs=graphs)
    assert traced[0] is not traced[1]


def test_seeds_that_follow_each_other_are_one_task():
    def trainings(*seeds_by_network):
        return [
            run_all._DueRun(f"{network}{seed}", small_mlp(seed=seed, **{"train.l2": network}), None)
            for network, seeds in enumerate(seeds_by_network)
            for seed in range(seeds)
        ]

    def titles(groups):
        return [[training.title for training in group] for group in groups]

    three = trainings(2, 2, 2)
    assert titles(run_all._group(three, 1)) == [["00", "01"], ["10", "11"], ["20", "21"]]
    # Two processes: the third network's seeds are divided, so that both have work.
    assert titles(run_all._group(three, 2)) == [["00", "01"], ["10", "11"], ["20"], ["21"]]
    assert titles(run_all._group(three, 3)) == titles(run_all._group(three, 1))
    assert titles(run_all._group(trainings(1, 1, 1), 2)) == [["00"], ["10"], ["20"]]
    assert run_all._group([], 2) == []
    by_seed = sorted(three, key=lambda training: training.config.seed)
    assert np.shape(titles(run_all._group(by_seed, 2))) == (6, 1)
