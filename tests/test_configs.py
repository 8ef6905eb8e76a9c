"""Every config loads, is locked, has the schema of default.py, and is the paper's."""

import pathlib

import pytest

from bn_keras.models import BNInception
from bn_keras.models import bn_inception as inception
from bn_keras.training import networks
from bn_keras.training.build import build_model
from bn_keras.training.config import default_config
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
    """The keys and the types of their values, all the way down."""
    return {
        key: shape_of(value) if hasattr(value, "items") else type(value)
        for key, value in config.items()
    }


def test_all_that_are_promised_are_there():
    miniatures = {f"{d}_{n}" for d in ("digits", "cifar10") for n in networks.NETWORKS}
    ensembles = {f"{scale}bn_x30_ensemble" for scale in ("", "cifar10_", "digits_")}
    promised = {*networks.NETWORKS, "mnist_baseline", "mnist_bn"}
    promised |= miniatures | ensembles
    assert promised <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_locked_and_follows_the_schema(name):
    config = load(name)
    assert shape_of(config) == shape_of(default_config())
    with pytest.raises(AttributeError):
        config.train.stepz = 3


@pytest.mark.parametrize("name", NAMES)
def test_its_first_lines_give_the_command(name):
    text = (CONFIGS / f"{name}.py").read_text()
    assert f"python -m launch.train --config=configs/{name}.py" in text


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
    assert config.model.dropout == dropout
    accelerated = dropout == 0.0
    assert config.model.local_response_normalization != accelerated
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


@pytest.mark.parametrize(
    "module", [bn_x30_ensemble, cifar10_bn_x30_ensemble, digits_bn_x30_ensemble]
)
def test_members_of_the_ensemble_are_bn_x30_but_for_their_changes(module):
    base = load(module.__name__.removeprefix("configs.").removesuffix("_ensemble")).to_dict()
    members = [module.get_config(str(i)).to_dict() for i in range(1, 7)]
    changes = []
    for i, member in enumerate(members, start=1):
        assert member["seed"] == i
        assert member["model"].pop("variant") == f"bn_x30_ensemble_{i}"
        changed = {k for k, v in member["model"].items() if v != base["model"][k]}
        assert changed and changed <= {"initializer_scale", "dropout", "per_activation_bn"}
        changes.append(member["model"])
        rest = {k: v for k, v in member.items() if k not in ("seed", "model")}
        assert rest == {k: base[k] for k in rest}
    assert all(changes.count(change) == 1 for change in changes)


def test_inception_with_sigmoids_is_inception_but_for_the_variant():
    config = networks.derive(load("inception"), "inception_sigmoid").to_dict()
    assert config["model"].pop("variant") == "inception_sigmoid"
    inception = load("inception").to_dict()
    inception["model"].pop("variant")
    assert config == inception


def test_an_unknown_member_is_refused():
    with pytest.raises(ValueError, match="no member '7' of the ensemble: give one of 1, 2, 3"):
        digits_bn_x30_ensemble.get_config("7")


@pytest.fixture
def short_figure_5(monkeypatch):
    rows = [row for row in inception.FIGURE_5 if row.name in ("3a", "4d", "5b")]
    monkeypatch.setattr(inception, "FIGURE_5", rows)


MINIATURE = dict(input_shape=(8, 8, 1), classes=10)


@pytest.mark.parametrize("variant", inception.VARIANTS)
def test_the_network_of_a_config_is_the_variant_of_its_name(variant, short_figure_5):
    config = networks.derive(digits_inception.get_config(), variant)
    by_config = build_model(config, **MINIATURE)
    by_name = BNInception(variant, **MINIATURE, width=0.125, stem="digits", momentum=0.9)
    assert by_config.get_config() == by_name.get_config()


def test_what_a_config_says_of_the_network(short_figure_5):
    config = networks.derive(digits_inception.get_config(), "bn_x5")
    config.model.update(preset="caffe", pool_projection=64, auxiliary_weight=0.4)
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
