"""Every config loads, is locked, follows the schema, and has the paper's values."""

import pathlib

import pytest
from ml_collections import ConfigDict

from bn_keras.errors import UsageError
from bn_keras.models import BNInception, bn_inception
from bn_keras.runs.settings import replaced
from bn_keras.training import networks
from bn_keras.training.build import build_model
from bn_keras.training.config import check_config, default_config
from bn_keras.training.config_files import load_config
from configs import (
    bn_x30_ensemble,
    cifar10_bn_x30_ensemble,
    digits_bn_x30_ensemble,
    digits_inception,
)

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = sorted(p.stem for p in CONFIGS.glob("*.py") if "def get_config(" in p.read_text())


def load(name):
    return load_config(name)


def shape_of(config):
    """The keys and the types of their values, in all sections."""
    return {
        key: shape_of(value) if hasattr(value, "items") else config.get_type(key)
        for key, value in config.items()
    }


def test_the_documented_configs_exist():
    miniatures = {f"{d}_{n}" for d in ("digits", "cifar10") for n in networks.NETWORKS}
    ensembles = {f"{scale}bn_x30_ensemble" for scale in ("", "cifar10_", "digits_")}
    promised = {*networks.NETWORKS, "mnist_baseline", "mnist_bn"}
    promised |= miniatures | ensembles
    assert promised <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_locked_and_follows_the_schema(name):
    config = load(name)
    assert shape_of(config) == shape_of(default_config())
    with pytest.raises(AttributeError):
        config.train.stepz = 3


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_of_a_config_has_its_command(name):
    text = (CONFIGS / f"{name}.py").read_text()
    assert f"bn-keras train --config={name}" in text


# Section 4.2.2: the learning rates; section 4.2.1: L2 / 5, decay 6 times faster, no dropout.
@pytest.mark.parametrize(
    "name, rate, l2, decay_epochs, dropout",
    [
        ("inception", 0.0015, 4e-5, 8, 0.4),
        ("bn_baseline", 0.0015, 4e-5, 8, 0.4),
        ("bn_x5", 0.0075, 8e-6, 8 / 6, 0.0),
        ("bn_x30", 0.045, 8e-6, 8 / 6, 0.0),
        ("bn_x5_sigmoid", 0.0075, 8e-6, 8 / 6, 0.0),
    ],
)
def test_the_imagenet_configs_are_the_papers(name, rate, l2, decay_epochs, dropout):
    config = load(name)
    assert config.model.variant == name
    assert config.data.name == "imagenet2012"
    assert config.train.global_batch_size == 32
    assert config.schedule.base_rate == pytest.approx(rate)
    assert config.train.l2 == pytest.approx(l2)
    assert config.schedule.decay_epochs == pytest.approx(decay_epochs)
    assert networks.value_of(config, "model.dropout") == dropout
    accelerated = dropout == 0.0
    lrn = networks.value_of(config, "model.local_response_normalization")
    assert lrn != accelerated
    assert (config.data.shuffle == "examples") == accelerated
    assert (config.data.distortion < 1) == accelerated


@pytest.mark.parametrize("data", ["digits", "cifar10"])
@pytest.mark.parametrize(
    "variant, rate", [("bn_baseline", 1), ("bn_x5", 5), ("bn_x30", 30), ("bn_x5_sigmoid", 5)]
)
def test_miniatures_differ_from_inception_as_the_papers_networks_do(data, variant, rate):
    inception, config = load(f"{data}_inception"), load(f"{data}_{variant}")
    assert config.schedule.base_rate == pytest.approx(rate * inception.schedule.base_rate)
    for key in ("steps", "global_batch_size", "momentum"):
        assert config.train[key] == inception.train[key]
    assert config.model.initializer == inception.model.initializer
    assert config.model.width == inception.model.width


def test_mnist_is_section_4_1():
    baseline, bn = load("mnist_baseline"), load("mnist_bn")
    for config in (baseline, bn):
        assert config.train.steps == 50_000 and config.train.global_batch_size == 60
        assert config.data.binary and config.data.crop == "none" and not config.data.mirror
        assert config.train.l2 == 0.0
    bn.unlock()
    bn.model.variant = "baseline"
    assert bn.to_dict() == baseline.to_dict()


# A third of the length, and the paper's crops, which fit an evaluation with many crops.
CIFAR10_MEMBER = {
    "data.crop": "inception",
    "train.steps": 31_250 // 3,
    "schedule.decay_epochs": pytest.approx(1.0676 / 6 / 3, rel=1e-4),
}


@pytest.mark.parametrize(
    "module, common",
    [
        (bn_x30_ensemble, {}),
        (cifar10_bn_x30_ensemble, CIFAR10_MEMBER),
        (digits_bn_x30_ensemble, {}),
    ],
)
def test_members_of_the_ensemble_are_bn_x30_except_for_their_changes(module, common):
    name = module.__name__.rpartition(".")[2].removesuffix("_ensemble")
    base = load(name).to_dict()
    for key, value in common.items():
        section, setting = key.split(".")
        base[section][setting] = value
    members = [module.get_config(str(i)) for i in range(1, 7)]
    keys = ("initializer_scale", "dropout", "per_activation_bn")
    own = {key: networks.value_of(load(name), f"model.{key}") for key in keys}
    changes = []
    for i, member in enumerate(members, start=1):
        effective = {key: networks.value_of(member, f"model.{key}") for key in keys}
        assert effective != own
        changes.append(effective)
        values = member.to_dict()
        assert values.pop("seed") == i
        assert values["model"].pop("variant") == f"bn_x30_ensemble_{i}"
        rest = {k: v for k, v in base.items() if k != "seed"}
        assert values == rest | {
            "model": {k: v for k, v in base["model"].items() if k != "variant"}
        }
    assert all(changes.count(change) == 1 for change in changes)


def test_inception_with_sigmoids_differs_from_inception_by_the_variant_only():
    config = networks.derive(load("inception"), "inception_sigmoid").to_dict()
    assert config["model"].pop("variant") == "inception_sigmoid"
    inception = load("inception").to_dict()
    inception["model"].pop("variant")
    assert config == inception


def test_an_unknown_member_is_refused():
    with pytest.raises(UsageError, match="unknown ensemble member '7': expected one of 1, 2, 3"):
        digits_bn_x30_ensemble.get_config("7")


@pytest.fixture
def short_figure_5(monkeypatch):
    rows = [row for row in bn_inception.FIGURE_5 if row.name in ("3a", "4d", "5b")]
    monkeypatch.setattr(bn_inception, "FIGURE_5", rows)


MINIATURE = dict(input_shape=(8, 8, 1), classes=10)


@pytest.mark.parametrize("variant", bn_inception.VARIANTS)
def test_the_network_of_a_config_is_the_variant(variant, short_figure_5):
    config = networks.derive(digits_inception.get_config(), variant)
    config.model.modules = ()
    by_config = build_model(config, **MINIATURE)
    by_name = BNInception(variant, **MINIATURE, width=0.125, stem="digits", momentum=0.9)
    assert by_config.get_config() == by_name.get_config()


def test_the_settings_of_a_config_reach_the_network(short_figure_5):
    config = networks.derive(digits_inception.get_config(), "bn_x5")
    config.model.update(preset="caffe", pool_projection=64, auxiliary_weight=0.4, modules=())
    assert len(build_model(config, **MINIATURE).outputs) == 1
    by_config = build_model(config, **MINIATURE, training=True)
    options = dict(width=0.125, stem="digits", momentum=0.9)
    by_name = BNInception(
        "bn_x5", **MINIATURE, **options, preset="caffe", pool_projection=64, auxiliary=True
    )
    assert by_config.get_config() == by_name.get_config()
    assert by_config.get_layer("3a_1x1_bn").epsilon == 1e-5
    config.batch_norm.epsilon = 0.01
    assert build_model(config, **MINIATURE).get_layer("3a_1x1_bn").epsilon == 0.01


def dropout_of(config):
    layers = build_model(config, **MINIATURE).layers
    return next((layer.rate for layer in layers if layer.name == "dropout"), 0)


@pytest.mark.parametrize("variant, dropout", [("bn_x30_ensemble_2", 0.05), ("bn_x30", 0)])
def test_a_variant_brings_its_own_settings(variant, dropout, short_figure_5):
    config = replaced(load("digits_bn_x30"), {"model.variant": variant, "model.modules": ()})
    assert dropout_of(config) == networks.value_of(config, "model.dropout") == dropout


def test_a_setting_takes_precedence_over_the_variant(short_figure_5):
    for variant, dropout in (("bn_x30_ensemble_2", 0.2), ("inception", 0.0)):
        values = {"model.variant": variant, "model.dropout": dropout, "model.modules": ()}
        config = replaced(load("digits_bn_x30"), values)
        assert dropout_of(config) == networks.value_of(config, "model.dropout") == dropout


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ConfigDict(), "the config has no batch_norm.epsilon, .* more: expected all keys of"),
        (ConfigDict({"data": 3}), "the config has no batch_norm.epsilon"),
        ({"data": {}}, "the config is a dict: expected a ConfigDict"),
        (None, "the config is a NoneType: expected a ConfigDict"),
    ],
    ids=str,
)
def test_a_config_that_lacks_settings_is_reported_on_one_line(config, message):
    with pytest.raises(UsageError, match=message) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.crop", "centre", "unknown data.crop 'centre': expected one of inception, shift, n"),
        ("data.mixup", -1.0, "data.mixup=-1.0 is invalid: expected 0 or more"),
        ("train.precision", "float16", "unknown train.precision 'float16': expected float32, mix"),
        ("schedule.decay", "linear", "unknown schedule.decay 'linear': expected steps or cosine"),
        ("batch_norm.momentum", 1.5, "batch_norm.momentum=1.5 is invalid: expected 0 to 1"),
        ("batch_norm.epsilon", -1.0, "batch_norm.epsilon=-1.0 is invalid: expected 0 or more"),
        ("model.dropout", 2.0, "model.dropout=2.0 is invalid: expected 0 or more and less than 1"),
        ("record.unit", -3, "record.unit=-3 is invalid: expected 0 or more"),
    ],
)
def test_settings_are_checked_before_the_data_is_opened(key, value, message):
    config = replaced(load("digits_bn_x5"), {key: value})
    with pytest.raises(UsageError, match=message):
        check_config(config)
