"""The runs by which the paper's sentences are tested, beside those of its five networks."""

from ml_collections import ConfigDict

from bn_keras.experiments import titles
from bn_keras.training.config_files import load_config
from bn_keras.training.networks import CHANGES, accelerate, derive, replaced, value_of


def get_claim_runs(inception: ConfigDict) -> dict[str, ConfigDict]:
    """Gives the runs for the claims, by title, made from the config of a scale's Inception.

    None is longer than the accelerated networks' runs. Where the start of a run decides, it is a
    third as long: the first third of what the longer run would be, step for step, so that it is
    compared with the others' curves at its own last step. A run that would only repeat another one
    is left out, as full distortions are where there are none.
    """
    full = min(inception.train.steps, load_config("bn_x5").train.steps)
    third = full // 3
    baseline, x5 = derive(inception, "bn_baseline"), derive(inception, "bn_x5")
    sigmoid = derive(inception, "inception_sigmoid")
    rate = "schedule.base_rate"
    slow = inception.schedule.base_rate
    # By title: what it is compared with, its steps, and what differs.
    runs = {
        titles.INCEPTION_X5: (inception, full, {rate: 5 * slow}),
        titles.INCEPTION_X30: (inception, third, {rate: 30 * slow}),
        titles.SIGMOID: (inception, full, {"model.variant": sigmoid.model.variant}),
        titles.SIGMOID_X5: (sigmoid, third, {rate: 5 * slow}),
        titles.X5_AT_RATE_1: (x5, third, {rate: slow}),
    }
    changed = accelerate(inception)
    made = {key: value_of(changed, key) for key, _ in CHANGES.values()}
    runs[titles.CONTROL] = (inception, full, made)
    # What the paper compares with, also where a miniature shuffles Inception's examples, too.
    before = {key: value_of(inception, key) for key, _ in CHANGES.values()}
    before[CHANGES["shuffling"].key] = "shards"
    for name, title in titles.ABLATIONS.items():
        key = CHANGES[name].key
        runs[title] = (x5, full, {key: before[key]})
    decay = CHANGES["decay"].key
    for variant, title in (
        ("bn_x30", titles.X30_DECAY),
        ("bn_x5_sigmoid", titles.X5_SIGMOID_DECAY),
    ):
        runs[title] = (derive(inception, variant), full, {decay: before[decay]})
    for network, reference in ((titles.INCEPTION, inception), (titles.BASELINE, baseline)):
        for factor in titles.SCALES:
            values = {"model.initializer_scale": factor}
            runs[titles.scaled(network, factor)] = (reference, third, values)
    # TF-Slim's momentum, made for the paper's many steps.
    runs[titles.LONG_MEMORY] = (x5, third, {"batch_norm.momentum": 0.9997})
    runs[titles.POPULATION] = (x5, third, {"population.when": "evaluations"})
    return {
        title: replaced(reference, values | {"train.steps": steps})
        for title, (reference, steps, values) in runs.items()
        if any(value_of(reference, key) != value for key, value in values.items())
    }
