"""Configs of the runs that test the paper's claims, in addition to those of its five networks."""

from typing import Any

from ml_collections import ConfigDict

from bn_keras.experiments import titles
from bn_keras.runs.settings import replaced
from bn_keras.training.config_files import load_config
from bn_keras.training.networks import CHANGES, accelerate, derive, value_of


def accelerated_steps(inception: ConfigDict) -> int:
    """Returns the length of the accelerated networks' runs at a scale.

    On ImageNet, they do not need Inception's 31 million steps.
    """
    return min(inception.train.steps, load_config("bn_x5").train.steps)


def _longer_steps(inception: ConfigDict) -> int:
    """Returns the length of Inception's run in the paper's proportion, in whole evaluations.

    The paper's Inception trains for 31 million steps where BN-x30 is best after 6 million.
    """
    paper, paper_accelerated = (load_config(name).train.steps for name in ("inception", "bn_x5"))
    period = inception.evaluation.every_steps
    return accelerated_steps(inception) * paper // paper_accelerated // period * period


def get_claim_configs(inception: ConfigDict) -> dict[str, ConfigDict]:
    """Returns the configs by title, derived from Inception's config at some scale.

    All but the longer run of Inception are at most as long as the accelerated networks' runs. Where
    the start of training decides, a run ends with the last evaluation of the first fifth: step for
    step, it equals the beginning of a full run, and it is compared with the other networks at its
    own last step. A run equal to its reference is left out: full distortions at a scale without
    distortions, and the longer run of Inception at the paper's own scale.
    """
    full = accelerated_steps(inception)
    period = inception.evaluation.every_steps
    start = full // 5 // period * period
    baseline, x5, x30, sigmoid = (
        derive(inception, variant)
        for variant in ("bn_baseline", "bn_x5", "bn_x30", "inception_sigmoid")
    )
    rate = "schedule.base_rate"
    inception_rate = inception.schedule.base_rate
    longer = _longer_steps(inception)
    accelerated = accelerate(inception)
    after = {key: value_of(accelerated, key) for key, _ in CHANGES.values()}
    # The paper's Inception shuffles by shards, even at a scale that shuffles its examples too.
    before = {key: value_of(inception, key) for key, _ in CHANGES.values()}
    before[CHANGES["shuffling"].key] = "shards"
    # By title, in the order of training: the config that is changed, the number of steps, and the
    # changes.
    runs: dict[str, tuple[ConfigDict, int, dict[str, Any]]] = {
        titles.INCEPTION_X5: (inception, start, {rate: 5 * inception_rate}),
        titles.INCEPTION_X30: (inception, start, {rate: 30 * inception_rate}),
    }
    for name, title in titles.ABLATIONS.items():
        key = CHANGES[name].key
        runs[title] = (x5, full, {key: before[key]})
    runs |= {
        titles.CONTROL: (inception, full, after),
        titles.X30_AT_HALF: (x30, full, {rate: x30.schedule.base_rate / 2}),
        titles.X5_AT_RATE_1: (x5, start, {rate: inception_rate}),
        titles.SIGMOID: (inception, start, {"model.variant": sigmoid.model.variant}),
        titles.SIGMOID_X5: (sigmoid, start, {rate: 5 * inception_rate}),
        titles.POPULATION: (x5, start, {"population.when": "evaluations"}),
        # TF-Slim's momentum, meant for the paper's many steps.
        titles.LONG_MEMORY: (x5, start, {"batch_norm.momentum": 0.9997}),
        titles.LONGER_INCEPTION: (inception, longer, {"train.steps": longer}),
    }
    for network, reference in ((titles.INCEPTION, inception), (titles.BASELINE, baseline)):
        for factor in titles.WEIGHT_FACTORS:
            values = {"model.initializer_scale": factor}
            runs[titles.with_weight_factor(network, factor)] = (reference, start, values)
    return {
        title: replaced(reference, values | {"train.steps": steps})
        for title, (reference, steps, values) in runs.items()
        if any(value_of(reference, key) != value for key, value in values.items())
    }
