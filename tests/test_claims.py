"""The runs for the claims differ as they say, and the report on them says what they measured."""

import pytest

from bn_keras.report import titles
from configs import cifar10_inception, claims, digits_inception, inception, networks

SCALES = {
    module.__name__.rpartition(".")[2]: module
    for module in (digits_inception, cifar10_inception, inception)
}
RATE, VARIANT = "schedule.base_rate", "model.variant"
SCALE, STEPS = "model.initializer_scale", "train.steps"
MADE = [change.key for change in networks.CHANGES.values()]
# By title: the network that it is compared with, what it differs in, and the part of its steps.
EXPECTED = {
    titles.INCEPTION_X5: ("inception", [RATE], 1),
    titles.INCEPTION_X30: ("inception", [RATE], 3),
    titles.SIGMOID: ("inception", [VARIANT], 1),
    titles.SIGMOID_X5: ("inception", [VARIANT, RATE], 3),
    titles.X5_AT_RATE_1: ("bn_x5", [RATE], 3),
    titles.CONTROL: ("inception", MADE, 1),
    "BN-x5 with 40% dropout": ("bn_x5", ["model.dropout"], 1),
    "BN-x5 with Inception's L2": ("bn_x5", ["train.l2"], 1),
    "BN-x5 with Inception's decay": ("bn_x5", ["schedule.decay_epochs"], 1),
    "BN-x5 with local response normalization": (
        "bn_x5",
        ["model.local_response_normalization"],
        1,
    ),
    "BN-x5 shuffled by shards only": ("bn_x5", ["data.shuffle"], 1),
    "BN-x5 with full distortions": ("bn_x5", ["data.distortion"], 1),
    **{titles.scaled("Inception", f): ("inception", [SCALE], 3) for f in (0.25, 0.5, 2, 4)},
    **{titles.scaled("BN-Baseline", f): ("bn_baseline", [SCALE], 3) for f in (0.25, 0.5, 2, 4)},
    titles.LONG_MEMORY: ("bn_x5", ["batch_norm.momentum"], 3),
    titles.POPULATION: ("bn_x5", ["population.when"], 3),
}
# What would be a run of the network that it is compared with, once more.
REPEATED = {
    "digits_inception": {"BN-x5 with full distortions"},
    "cifar10_inception": set(),
    "inception": {titles.LONG_MEMORY},
}


def differing(one, other):
    """The keys with other values in the one config than in the other."""
    return {
        f"{section}.{key}"
        for section, values in one.items()
        if hasattr(values, "items")
        for key, value in values.items()
        if value != other[section][key]
    }


@pytest.mark.parametrize("scale", SCALES)
def test_the_runs_differ_as_their_titles_say(scale):
    base = SCALES[scale].get_config()
    runs = claims.get_runs(base)
    assert runs.keys() == EXPECTED.keys() - REPEATED[scale]
    steps = 6_000_000 if scale == "inception" else base.train.steps
    # The miniatures have no distortions, or shuffle Inception's examples too: no difference.
    same = {
        key
        for key in MADE
        if networks.value_of(networks.accelerate(base), key) == networks.value_of(base, key)
    }
    for title, config in runs.items():
        variant, keys, part = EXPECTED[title]
        reference = networks.derive(base, variant)
        assert config.is_locked and config.seed == reference.seed
        expected = set(keys) - (same if title == titles.CONTROL else set())
        assert differing(config, reference) - {STEPS} == expected, title
        assert config.train.steps == steps // part
        # There is a number at its end to compare with.
        assert config.train.steps % config.evaluation.every_steps == 0
    assert same <= {"data.shuffle", "data.distortion"}


@pytest.mark.parametrize("scale", SCALES)
def test_the_values_of_the_runs(scale):
    base = SCALES[scale].get_config()
    runs, rate = claims.get_runs(base), base.schedule.base_rate
    rates = {
        titles.INCEPTION_X5: 5,
        titles.INCEPTION_X30: 30,
        titles.SIGMOID: 1,
        titles.SIGMOID_X5: 5,
        titles.X5_AT_RATE_1: 1,
        titles.CONTROL: 1,
        titles.ABLATIONS["decay"]: 5,
    }
    for title, factor in rates.items():
        assert runs[title].schedule.base_rate == pytest.approx(factor * rate)
    assert runs[titles.SIGMOID].model.variant == "inception_sigmoid"
    assert runs[titles.CONTROL].model.variant == "inception"
    assert runs["BN-x5 with 40% dropout"].model.dropout == 0.4
    assert runs["BN-x5 with Inception's L2"].train.l2 == base.train.l2
    decay = runs["BN-x5 with Inception's decay"].schedule.decay_epochs
    assert decay == base.schedule.decay_epochs
    assert runs["BN-x5 with local response normalization"].model.local_response_normalization
    assert runs["BN-x5 shuffled by shards only"].data.shuffle == "shards"
    if "BN-x5 with full distortions" in runs:
        assert runs["BN-x5 with full distortions"].data.distortion == base.data.distortion == 1
    for factor in titles.SCALES:
        title = titles.scaled("Inception", factor)
        assert title.endswith(f"{factor:g}") and runs[title].model.initializer_scale == factor
    assert runs[titles.POPULATION].population.when == "evaluations"
    assert all(config.batch_norm.momentum <= 0.9997 for config in runs.values())


def test_names_that_a_folder_can_have():
    assert len({title.lower() for title in EXPECTED}) == len(EXPECTED)
