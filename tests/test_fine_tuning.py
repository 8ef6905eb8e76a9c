"""Fine-tuning: initial weights, frozen layers, a learning rate of its own for the head."""

import json

import keras
import numpy as np
import pytest
from small import killed_after_a_loop, small_mlp

from bn_keras.errors import UsageError
from bn_keras.inference.evaluation import evaluate_networks
from bn_keras.inference.loading import load_trained
from bn_keras.models import BNInception
from bn_keras.runs.metrics_log import FINISHED
from bn_keras.runs.workdir import Workdir
from bn_keras.training import resume_check
from bn_keras.training.dry_run import dry_run
from bn_keras.training.fine_tuning import PretrainedWeights, freeze, initialize
from bn_keras.training.loop import train_and_evaluate


def tuned(source, **overrides):
    return small_mlp(**{"model.init_from": str(source), "train.steps": 4} | overrides)


def layers_of(workdir, best=False):
    return {
        layer.name: layer.get_weights() for layer in load_trained(workdir, best=best).model.layers
    }


def equal(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    keras.utils.clear_session(free_memory=False)
    train_and_evaluate(small_mlp(), workdir)
    return workdir


def small_inception(**options):
    return BNInception("bn_x5", input_shape=(8, 8, 3), stem="digits", width=0.02, **options)


def weights_of(model, source="a.keras", class_names=None):
    layers = {layer.name: layer.get_weights() for layer in model.layers if layer.weights}
    return PretrainedWeights(source, source, layers, class_names)


@pytest.mark.parametrize(
    "part, first_trained",
    [("none", "stem_1_conv"), ("stem", "3a_1x1_conv"), ("4e", "5a_1x1_conv")],
)
def test_layers_are_frozen_up_to_a_part(part, first_trained):
    model = small_inception(classes=3)
    freeze(model, part)
    names = [layer.name for layer in model.layers if layer.trainable_variables]
    frozen = {
        layer.name.partition("_")[0]
        for layer in model.layers
        if layer.weights and not layer.trainable
    }
    order = ["stem", "3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
    assert frozen == set(order[: order.index(part) + 1] if part != "none" else [])
    assert first_trained in names


def test_only_the_head_is_trained():
    model = small_inception(classes=3, auxiliary=True)
    freeze(model, "all_but_head")
    trained = {layer.name for layer in model.layers if layer.trainable_variables}
    assert {"logits", "auxiliary_logits", "auxiliary_conv"} <= trained
    assert all(name.startswith(("logits", "auxiliary_")) for name in trained)


def test_an_unknown_part_is_named():
    with pytest.raises(UsageError, match="unknown model.freeze '6a': .*all_but_head.* stem, 3a"):
        freeze(small_inception(classes=3), "6a")


@pytest.mark.parametrize(
    "given, names, reason",
    [
        (dict(classes=4), None, "4 classes in the source, 3 here"),
        (dict(classes=3), ("x", "y", "z"), "classes with other names in the source"),
        (dict(classes=3), ("a", "b", "c"), None),
        (dict(classes=3), None, None),
    ],
)
def test_the_head_is_loaded_only_for_the_same_classes(given, names, reason):
    source, model = small_inception(**given), small_inception(classes=3)
    before = model.get_layer("logits").get_weights()
    found = initialize(model, weights_of(source, class_names=names), ("a", "b", "c"))
    assert found.new == ({"logits": reason} if reason else {})
    for layer in model.layers:
        expected = source.get_layer(layer.name).get_weights()
        if layer.name == "logits" and reason:
            expected = before
        assert equal(layer.get_weights(), expected), layer.name
    assert not reason or any(reason in line for line in found.describe())


def test_auxiliary_layers_may_be_in_one_of_the_networks_only():
    plain, auxiliary = small_inception(classes=3), small_inception(classes=3, auxiliary=True)
    found = initialize(auxiliary, weights_of(plain), "abc")
    assert set(found.new.values()) == {"not in the source"} and "auxiliary_logits" in found.new
    found = initialize(plain, weights_of(auxiliary), "abc")
    assert not found.new and "auxiliary_logits" in found.unused


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(width=0.05), "of the wrong shape"),
        (dict(variant="inception", width=0.02), "missing"),
    ],
)
def test_another_network_is_refused_and_changes_nothing(wrong, message):
    wrong = {"variant": "bn_x5", "input_shape": (8, 8, 3), "stem": "digits"} | wrong
    model = small_inception(classes=3)
    before = model.get_weights()
    with pytest.raises(UsageError, match=f"model.init_from='a.keras' do not fit.*{message}"):
        initialize(model, weights_of(BNInception(classes=3, **wrong)), "abc")
    assert equal(model.get_weights(), before)


def test_a_run_starts_from_the_best_network_of_another(pretrained, tmp_path):
    best = layers_of(pretrained, best=True)
    train_and_evaluate(tuned(pretrained, **{"model.freeze": "2"}), tmp_path)
    trained = layers_of(tmp_path)
    for name in ("dense_1", "bn_1", "dense_2", "bn_2"):
        assert equal(trained[name], best[name]), name
    assert not equal(trained["dense_3"], best["dense_3"])
    # BN that is not frozen updates its moving statistics.
    assert not equal(trained["bn_3"], best["bn_3"])
    record = Workdir(tmp_path).read_environment()[0]["init_from"]
    assert record["source"] == str(pretrained) and len(record["sha256"]) == 64
    assert record["layers_new"] == {}
    assert (record["layers_loaded"], record["layers_frozen"]) == (7, 4)


@pytest.mark.job
def test_a_resumed_run_needs_its_source_no_more_and_is_exact(pretrained, tmp_path, monkeypatch):
    source = tmp_path / "source"
    pretrained.rename(source)
    try:
        config = tuned(
            source, **{"model.freeze": "1", "schedule.head_factor": 3.0, "train.ema": 0.0}
        ).copy_and_resolve_references()
        config.train.steps_per_loop = config.checkpoint.every_steps = 2
        expected = train_and_evaluate(config, tmp_path / "uninterrupted")
        with killed_after_a_loop(monkeypatch):
            train_and_evaluate(config, tmp_path / "killed")
    finally:
        source.rename(pretrained)
    resumed = train_and_evaluate(config, tmp_path / "killed")
    assert resumed[FINISHED] == expected[FINISHED]
    first, second = Workdir(tmp_path / "killed").read_environment()
    assert "init_from" in first and "init_from" not in second
    assert resume_check.verify_resume(tuned(pretrained, **{"model.freeze": "1"}))


def test_a_file_is_a_source(pretrained, tmp_path):
    path = tmp_path / "network.weights.h5"
    load_trained(pretrained).model.save_weights(path)
    config = tuned(path, **{"model.freeze": "all_but_head", "population.when": "end"})
    assert "initial weights of 7 layers" in list(dry_run(config))[1]
    last = train_and_evaluate(config, tmp_path / "run")
    # Frozen BN keeps its statistics, at the end and in a later evaluation.
    assert last["validation/statistics"] == "moving"
    [row] = evaluate_networks([tmp_path / "run"])
    assert row["accuracy"] == last["validation/accuracy"]
    assert equal(layers_of(tmp_path / "run")["bn_3"], layers_of(pretrained)["bn_3"])


def test_the_ema_starts_from_the_loaded_weights(pretrained, tmp_path):
    config = tuned(
        pretrained,
        **{"schedule.base_rate": 1e-30, "train.ema": 0.99, "population.when": "end"},
        **{"train.l2": 0.0},
    )
    train_and_evaluate(config, tmp_path)
    best = layers_of(pretrained, best=True)["dense_1"]
    np.testing.assert_allclose(layers_of(tmp_path)["dense_1"][0], best[0], rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_head_has_a_learning_rate_of_its_own(pretrained, tmp_path, steps):
    """With all other layers frozen, a factor on the head equals a factor on the whole rate."""
    frozen = {"model.freeze": "all_but_head", "train.steps": steps}
    settings = ({"schedule.head_factor": 4.0}, {"schedule.base_rate": 2.0})
    weights = []
    for number, changed in enumerate(settings):
        train_and_evaluate(tuned(pretrained, **frozen, **changed), tmp_path / str(number))
        weights.append(layers_of(tmp_path / str(number))["logits"][0])
    np.testing.assert_allclose(*weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "make_source, message",
    [
        (lambda folder: folder / "missing.keras", "cannot be read"),
        (lambda folder: folder, "expected the workdir of a run, or a .keras or .weights.h5 file"),
        (lambda folder: "imagenet", "includes no trained weights; .*bn-keras convert"),
    ],
)
def test_a_wrong_source_is_refused_before_anything_is_written(make_source, message, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    with pytest.raises(UsageError, match=message):
        train_and_evaluate(tuned(make_source(folder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_trained_network_is_no_source(pretrained, tmp_path):
    for name in ("config.json", "interface.json"):
        (tmp_path / name).write_text((pretrained / name).read_text())
    with pytest.raises(UsageError, match="a run without a trained network: train it first"):
        train_and_evaluate(tuned(tmp_path), tmp_path / "run")


def test_frozen_random_weights_are_refused(tmp_path):
    with pytest.raises(UsageError, match="model.freeze='stem' would keep random weights"):
        train_and_evaluate(small_mlp(**{"model.freeze": "stem"}), tmp_path)


def test_settings_that_change_what_the_weights_compute_are_named(pretrained, tmp_path, caplog):
    train_and_evaluate(tuned(pretrained, **{"batch_norm.epsilon": 0.1}), tmp_path)
    assert "batch_norm.epsilon=0.0, here 0.1" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["model"]["init_from"]
