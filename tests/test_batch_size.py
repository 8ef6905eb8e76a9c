"""Ghost batches of the trainer, and the study of accuracy against the statistical batch size."""

import dataclasses
import os
import re

import pytest
from small import small_mlp

from bn_keras.errors import UsageError
from bn_keras.experiments.batch_size_runs import SIZES, get_batch_size_configs
from bn_keras.experiments.titles import with_statistical_batch
from bn_keras.models import BNInception
from bn_keras.report import Run, build_batch_size, evaluate_batch_sizes
from bn_keras.runs.metrics_log import FINISHED
from bn_keras.runs.settings import replaced
from bn_keras.training import networks
from bn_keras.training.build import build_model
from bn_keras.training.config import check_config
from bn_keras.training.loop import train_and_evaluate
from configs import cifar10_inception, digits_inception, inception


@pytest.mark.parametrize("module, steps", [(cifar10_inception, 31_250), (inception, 6_000_000)])
def test_only_the_statistical_batch_size_differs(module, steps):
    base = module.get_config()
    configs = get_batch_size_configs(base)
    assert list(configs) == [with_statistical_batch(size) for size in SIZES]
    x5 = networks.derive(base, "bn_x5")
    for size, config in zip(SIZES, configs.values(), strict=True):
        check_config(config)
        assert config.train.global_batch_size == 128
        assert config.train.steps == steps // 4
        assert (config.batch_norm.virtual_batch_size or 128) == size
        rest = replaced(config, {"batch_norm.virtual_batch_size": 0})
        assert rest == configs[with_statistical_batch(128)]
        assert config.schedule == x5.schedule and config.model == x5.model


def test_the_networks_have_ghost_batches():
    config = replaced(
        networks.derive(digits_inception.get_config(), "bn_x5"),
        {"batch_norm.virtual_batch_size": 4, "model.modules": ("3a",)},
    )
    layer = build_model(config, (8, 8, 1), 10).get_layer("3a_1x1_bn")
    assert layer.virtual_batch_size == 4
    mlp = build_model(small_mlp(**{"batch_norm.virtual_batch_size": 4}), (8, 8, 1), 10)
    assert mlp.get_layer("bn_1").virtual_batch_size == 4
    assert build_model(small_mlp(), (8, 8, 1), 10).get_layer("bn_1").virtual_batch_size is None


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Two finished runs with statistics of 4 and of all 32 examples."""
    folder = tmp_path_factory.mktemp("batch_size")
    paths = {}
    for size, virtual in ((4, 4), (32, 0)):
        few = {"train.steps": 40, "train.global_batch_size": 32, "population.num_batches": 5}
        config = small_mlp(**few, **{"batch_norm.virtual_batch_size": virtual})
        paths[with_statistical_batch(size)] = folder / f"{size}"
        train_and_evaluate(config, folder / f"{size}")
    return paths


def read(workdirs):
    return {title: [Run.read(title, path)] for title, path in workdirs.items()}


def test_both_kinds_of_statistics_are_compared(workdirs, tmp_path, monkeypatch):
    rows = evaluate_batch_sizes(workdirs, tmp_path)
    assert [row["title"] for row in rows] == list(workdirs)
    results = read(workdirs)
    section = build_batch_size(results, rows)
    moving = {title: runs[0].metrics[-1]["validation/accuracy"] for title, runs in results.items()}
    for size, row in zip((4, 32), rows, strict=True):
        cells = f"{size} | {moving[row['title']]:.1%} | {row['accuracy']:.1%} |"
        assert cells in " ".join(section.body.split())
    (axes,) = section.plots["batch_size.svg"].axes
    lines = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert lines[0] == [[4, moving[rows[0]["title"]]], [32, moving[rows[1]["title"]]]]
    assert lines[1] == [[4, rows[0]["accuracy"]], [32, rows[1]["accuracy"]]]
    assert moving != {row["title"]: row["accuracy"] for row in rows}
    assert f"; with 4, {moving[rows[0]['title']]:.1%}, and " in section.summary

    monkeypatch.setattr("bn_keras.report.batch_size.evaluate_networks", None)
    assert evaluate_batch_sizes(workdirs, tmp_path) == rows


def test_unknown_modules_are_refused():
    def build(modules, **options):
        return BNInception("bn_x5", 10, (8, 8, 1), 0.1, "digits", modules=modules, **options)

    for modules in (("3c", "3a"), ("3a", "3a"), ("9z",), "3a", ()):
        with pytest.raises(UsageError, match="modules=.* is invalid: expected names in this order"):
            build(modules)
    with pytest.raises(UsageError, match="auxiliary=True needs module 4d"):
        build(("3a",), auxiliary=True)
    with pytest.raises(UsageError, match="per_activation_bn=True needs module 5b"):
        build(("3a",), per_activation_bn=True)


@pytest.mark.parametrize(
    "accuracies, summary",
    [
        # Two standard errors of a difference are 1.35 points.
        (
            (0.489, 0.603, 0.648, 0.637, 0.647),
            "With statistics of 8 or more examples, BN-x5 reaches 63.7% to 64.8%; with 2, 48.9%.",
        ),
        ((0.64, 0.64, 0.64, 0.64, 0.65), "With statistics of 2 or more examples, BN-x5 reaches"),
        ((0.5, 0.5, 0.5, 0.5, 0.6), "With statistics of 128 examples, BN-x5 reaches 60.0%; with"),
        ((0.5, 0.7, 0.5, 0.5, 0.6), "With statistics of 4 examples, BN-x5 reaches 70.0%; with 2,"),
    ],
)
def test_the_summary_names_the_sizes_that_suffice(accuracies, summary):
    configs = get_batch_size_configs(cifar10_inception.get_config())
    results = {}
    for (title, config), accuracy in zip(configs.items(), accuracies, strict=True):
        last = {"step": config.train.steps, "train/loss": 1.3, "validation/examples": 10_000}
        last |= {"validation/accuracy": accuracy, FINISHED: "0123456789abcdef"}
        results[title] = [Run(title, config, [last], [], num_classes=10, num_train_examples=50_000)]
    # An extension of this run was interrupted before its first step.
    longest = results[title][0]
    extended = replaced(longest.config, {"train.steps": 2 * longest.config.train.steps})
    results[title] = [dataclasses.replace(longest, config=extended)]
    section = build_batch_size(results, [])
    assert section.summary.startswith(summary)
    assert " 1.30 |" in section.body
    (axes,) = section.plots["batch_size.svg"].axes
    axes.figure.canvas.draw()
    for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        assert float(label.get_text().rstrip("%")) == pytest.approx(100 * tick)


def test_unfinished_runs_are_left_out(workdirs, tmp_path):
    title, path = next(iter(workdirs.items()))
    results = {title: read(workdirs)[title]}
    unfinished = {with_statistical_batch(8): [dataclasses.replace(results[title][0], metrics=[])]}
    assert evaluate_batch_sizes({title: os.fspath(tmp_path / "none")}, tmp_path) == []
    section = build_batch_size(results | unfinished, [])
    assert (
        " - |" in section.body
        and "\n| 8 " not in section.body
        and "population" not in section.summary
    )
    assert re.fullmatch(r"With statistics of 4 examples, BN-x5 reaches \S+%\.", section.summary)
    with pytest.raises(UsageError, match="no run of the statistical batch sizes has finished"):
        build_batch_size({}, [])
