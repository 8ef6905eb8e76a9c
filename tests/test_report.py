"""The report shows what the runs recorded and, marked as such, the paper's own results."""

import dataclasses
import itertools
import os
import re

import pytest
from matplotlib.figure import Figure

from bn_keras.data.multi_crop import Crops
from bn_keras.errors import StorageError, UsageError
from bn_keras.report import (
    Run,
    Section,
    build_figure_2,
    build_figure_3,
    build_figure_4,
    describe_accuracy,
    escape,
    evaluate_ensemble,
    figure_4,
    published,
    write_report,
)
from bn_keras.runs.metrics_log import DIVERGED, FINISHED
from bn_keras.runs.metrics_writer import MetricsWriter
from bn_keras.runs.saved_config import SavedConfig
from bn_keras.runs.workdir import Interface, Workdir
from bn_keras.training import networks
from configs import (
    cifar10_bn_x30_ensemble,
    cifar10_inception,
    digits_bn_x30,
    digits_inception,
)

TITLES = [network.title for network in networks.NETWORKS.values()]
SVG = b"<?xml"


def configure(seed=0, **settings):
    config = digits_inception.get_config().copy_and_resolve_references()
    config.update_from_flattened_dict(settings | {"seed": seed})
    return config.lock()


def run(title, accuracies, losses=(2.0, 1.0), diverged=False, seed=0, **settings):
    lines = [
        {"step": 10 * i, "validation/accuracy": a, "validation/examples": 400}
        for i, a in enumerate(accuracies, 1)
    ]
    lines += [
        {
            "step": 10 * i,
            "train/loss": x,
            "train/learning_rate": 0.5,
            "train/images_per_second": 64.0,
        }
        for i, x in enumerate(losses, 1)
    ]
    if diverged:
        lines.append({"step": 17, DIVERGED: True})
    return Run(title, configure(seed, **settings), lines)


# Two seeds each, for which every statement about Figure 3 holds.
CURVES = {
    "Inception": [(0.5, 0.7, 0.79, 0.8), (0.4, 0.6, 0.7, 0.8)],
    "BN-Baseline": [(0.5, 0.7, 0.82), (0.5, 0.7, 0.84)],
    "BN-x5": [(0.81, 0.83), (0.83, 0.85)],
    "BN-x30": [(0.7, 0.9), (0.6, 0.92)],
    "BN-x5-Sigmoid": [(0.6, 0.72), (0.6, 0.74)],
}


def results(**changes):
    """Builds runs by title; BN_x30=[(0.1, 0.2)] replaces curves, one for each seed."""
    curves = CURVES | {name.replace("_", "-"): curves for name, curves in changes.items()}
    return {
        title: [run(title, curve, seed=seed) for seed, curve in enumerate(seeds)]
        for title, seeds in curves.items()
    }


def tables(body):
    """Returns the cells of each table, by its first two headers and the first cell of a row."""
    found = {}
    for lines in re.findall(r"(?:^\|.*\n?)+", body, re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            for line in lines.strip().splitlines()
        )
        found[header[0], header[1]] = {row[0]: row[1:] for row in rows}
    return found


def table_of(body, second_header):
    return next(rows for (_, name), rows in tables(body).items() if name.startswith(second_header))


def verdicts(results):
    rows = table_of(build_figure_3(results).body, "verdict")
    return {text: row[0].strip("*") for text, row in rows.items()}


def environment(**changes):
    start = {
        "started": "2026-11-21T10:00:00+00:00",
        "ended": "2026-11-21T11:30:00+00:00",
        "step": 0,
        "versions": {"bn_keras": "1.2", "tensorflow": "2.21"},
        "commit": "abc123",
        "modified": False,
        "machine": {
            "platform": "Linux x86_64",
            "processor": "EPYC",
            "cores": 2,
            "devices": ["CPU"],
        },
    }
    return [start | changes]


def provenance(results, tmp_path, command="make it", num_missing=0):
    write_report("t", [], results, tmp_path, command, num_missing)
    return (tmp_path / "report.md").read_text()


# --- Runs.


def test_a_run_summarizes_its_metrics():
    one = run("BN-x5", (0.5, 0.8, 0.7), losses=(2.0, 0.5, 0.75))
    assert one.best_accuracy == 0.8 and one.lowest_loss == 0.5
    assert one.steps_to_accuracy(0.5) == 10 and one.steps_to_accuracy(0.8) == 20
    assert one.steps_to_accuracy(0.81) is None
    assert one.name == "BN-x5 (seed 0)"
    # sqrt(p * (1 - p) / n) for 400 images and two more of each kind.
    assert one.standard_error(0.8) == pytest.approx((322 / 404 * 82 / 404 / 404) ** 0.5)
    # 30 steps of 32 examples at 64 images a second.
    assert one.seconds == pytest.approx(15.0)
    assert one.diverged_at is None
    assert run("x", (), (), diverged=True).diverged_at == 17


def test_a_single_run_is_described_in_words():
    alone = run("x", (0.5, 0.8, 0.7))
    assert describe_accuracy(alone) == "best validation accuracy 80.00% at step 20"
    for name, target, batch, rest in (
        ("digits", 0.5, 64, " (40 steps of 32), target 50.0% at step 10 (20 steps of 32)"),
        ("digits", 0.9, 32, ", target 90.0% not reached"),
        ("imagenet2012", 0.0, 32, ", target 72.2% at step 20"),
    ):
        config = digits_inception.get_config().copy_and_resolve_references()
        config.data.name = name
        config.train.until_accuracy, config.train.global_batch_size = target, batch
        aimed = Run("x", config, alone.metrics)
        assert describe_accuracy(aimed) == f"best validation accuracy 80.00% at step 20{rest}"


# --- Figure 3.


def test_the_table_shows_means_over_seeds():
    rows = table_of(build_figure_3(results()).body, "steps to 80.0%")
    assert rows == {
        "Inception": ["40", "31.0 million", "1.0", "1.0", "80.0%", "72.2%"],
        "BN-Baseline": ["30", "13.3 million", "1.3", "2.3", "83.0% (82.0% to 84.0%)", "72.7%"],
        "BN-x5": ["10", "2.1 million", "4.0", "14.8", "84.0% (83.0% to 85.0%)", "73.0%"],
        "BN-x30": ["20", "2.7 million", "2.0", "11.5", "91.0% (90.0% to 92.0%)", "74.8%"],
        "BN-x5-Sigmoid": ["never", "never", "-", "-", "73.0% (72.0% to 74.0%)", "69.8%"],
    }


def test_a_seed_that_misses_the_target_is_shown():
    rows = table_of(build_figure_3(results(BN_x5=[(0.9,), (0.74,)])).body, "steps to")
    assert rows["BN-x5"][0] == "10 (10 to never)"


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_run_affects_only_its_own_numbers(title, seed):
    before = results()
    after = {name: list(runs) for name, runs in before.items()}
    changed = [line.copy() for line in before[title][seed].metrics]
    for line in changed:
        if "validation/accuracy" in line:
            line["validation/accuracy"] -= 0.1
        else:
            line["train/loss"] /= 4
            line["train/learning_rate"] *= 2
    after[title][seed] = dataclasses.replace(before[title][seed], metrics=changed)
    bodies = build_figure_3(before).body, build_figure_3(after).body
    accuracies = [table_of(body, "steps to") for body in bodies]
    trainings = [table_of(body, "first logged learning rate") for body in bodies]
    assert trainings[0][title] != trainings[1][title]
    assert all(a != b for a, b in zip(trainings[0][title], trainings[1][title], strict=True))
    for name in TITLES:
        is_changed = accuracies[0][name][4] != accuracies[1][name][4]
        assert is_changed == (name == title)
        assert name == title or trainings[0][name] == trainings[1][name]
        # The paper's numbers stay.
        assert accuracies[0][name][1::2] == accuracies[1][name][1::2]


def test_every_statement_holds_for_the_papers_own_results():
    paper = {}
    for title, network in published.FIGURE_3.items():
        points = [(2 * 10**8, network.best_accuracy)]
        if network.steps:
            points.insert(0, (network.steps, published.INCEPTION_ACCURACY))
        lines = [{"step": step, "validation/accuracy": accuracy} for step, accuracy in points]
        paper[title] = [Run(title, configure(), lines)]
    body = build_figure_3(paper).body
    assert set(verdicts(paper).values()) == {"holds"}
    assert len(verdicts(paper)) == 6
    for cells in table_of(body, "steps to").values():
        speedup, paper_speedup = cells[2:4]
        assert speedup == paper_speedup


def test_a_statement_that_holds_in_each_seed_holds():
    assert set(verdicts(results()).values()) == {"holds"}


@pytest.mark.parametrize(
    "changes, otherwise",
    [
        (
            {"BN_x5": [(0.1, 0.1, 0.95), (0.1, 0.1, 0.96)]},
            ["BN-x30 has the highest", "BN-x5 reaches .* than BN-x30"],
        ),
        ({"BN_x30": [(0.1,), (0.1,)]}, ["BN-x30 reaches", "BN-x30 has the highest"]),
        (
            {"BN_x30": [(0.9,), (0.9,)], "BN_x5": [(0.1, 0.85)] * 2},
            ["BN-x5 reaches .* than BN-x30"],
        ),
        (
            {"BN_Baseline": [(0.3,)] * 2, "BN_x5": [(0.3,)] * 2},
            ["BN-x5 reaches .* than BN-x30"],
        ),
        ({"BN_x5_Sigmoid": [(0.87,), (0.88,)]}, ["BN-x5-Sigmoid never"]),
    ],
)
def test_a_statement_that_holds_in_no_seed_does_not_hold(changes, otherwise):
    judged = verdicts(results(**changes))
    found = [text for text, verdict in judged.items() if verdict == "does not hold"]
    assert len(found) >= len(otherwise)
    assert all(any(re.match(start, text) for text in found) for start in otherwise)
    count = f"{len(found)} do{'es' * (len(found) == 1)} not hold"
    assert count in build_figure_3(results(**changes)).summary


def test_a_statement_on_which_seeds_disagree_is_too_close_to_call():
    # The mean over seeds is the highest, but one seed is not.
    changed = results(BN_x30=[(0.7, 0.99), (0.6, 0.84)])
    section = build_figure_3(changed)
    assert table_of(section.body, "verdict")[
        "BN-x30 has the highest best accuracy of the five"
    ] == [
        "**too close to call**",
        "1 of 2 seeds, 1 tie",
    ]
    assert "5 hold and 1 is too close to call." in section.summary


@pytest.mark.parametrize(
    "changes, statement",
    [
        # Equal numbers of steps.
        ({"BN_Baseline": [(0.1, 0.7, 0.7, 0.82)] * 2}, "BN-Baseline reaches"),
        # 400 images have standard errors of 1.8 points at 85% and 2.0 at 80%: differences of 4.9
        # (85% and 85%) and 5.5 points (80% and 80%) have a chance of 5% between equal networks.
        ({"BN_x30": [(0.7, 0.875), (0.6, 0.88)]}, "BN-x30 has the highest"),
        ({"BN_x5_Sigmoid": [(0.845,)] * 2}, "BN-x5-Sigmoid never"),
    ],
)
def test_a_tie_is_not_a_failure(changes, statement):
    judged = verdicts(results(**changes))
    [verdict] = [verdict for text, verdict in judged.items() if text.startswith(statement)]
    assert verdict == "too close to call"


def test_the_summary_compares_numbers_with_the_papers():
    assert build_figure_3(results()).summary == (
        "BN-x5 reaches Inception's best accuracy, 80.0%, in 10 steps instead of 40, a speedup of"
        " 4.0 (paper: 14.8); Inception still improves at its end. Best accuracies: BN-x30"
        " with 91.0% and Inception with 80.0% (paper: BN-x30 with 74.8% and Inception with 72.2%)."
        " Of 6 statements of the paper's Figure 3, 6 hold."
    )
    equal = build_figure_3(results(BN_x5_Sigmoid=[(0.81,)] * 2)).summary
    assert equal.startswith("BN-x5 and BN-x5-Sigmoid reach Inception's best accuracy")
    assert "(paper: 14.8 and never)" in equal
    slow = {name: [(0.1,)] * 2 for name in ("BN_Baseline", "BN_x5", "BN_x30", "BN_x5_Sigmoid")}
    summary = build_figure_3(results(**slow)).summary
    assert summary.startswith("Best accuracies: Inception with 80.0% (paper: BN-x30 with 74.8%")


def test_a_single_seed_is_mentioned():
    alone = {title: runs[:1] for title, runs in results().items()}
    body = build_figure_3(alone).body
    assert "(single seed)" in body and "In parentheses" not in body
    assert "another seed may differ" in body and "if seeds disagree" not in body
    assert "if seeds disagree" in build_figure_3(results()).body
    assert "Each line is a single run" in build_figure_2(alone).body
    assert "means over 2 seeds" in build_figure_2(results()).body


def test_the_resolution_of_the_numbers_is_computed():
    body = build_figure_3(results()).body
    assert "every 10 steps" in body
    later = build_figure_3(results(Inception=[(0.5, 0.7, 0.79, 0.78)] * 2)).body
    assert "best at its last evaluation" in body and "last evaluation" not in later
    converged = build_figure_3(results(Inception=[(0.5, 0.7, 0.79, 0.78)] * 2)).summary
    assert "still improves" not in converged
    # sqrt(0.8 * 0.2 / 400) = 2%.
    assert "80.0% on 400 validation images has a standard error of 2 percentage points" in body
    assert "for the difference of two such accuracies, it is 2.8." in body


def test_another_batch_size_is_mentioned():
    larger = {"train.global_batch_size": 256}
    runs = {title: [run(title, curves[0], **larger)] for title, curves in CURVES.items()}
    body = build_figure_3(runs).body
    assert (
        "steps of 256 images to 80.0%" in body
        and "The paper's steps are steps of 32 images" in body
    )


def test_a_seed_of_inception_that_diverges_before_its_first_evaluation_leaves_no_target():
    runs = results()
    runs["Inception"][1] = run("Inception", (), diverged=True, seed=1)
    body = build_figure_3(runs).body
    assert "**Diverged:** Inception (seed 1) at step 17" in build_figure_2(runs).body
    assert "best at its last evaluation" not in body and "standard error of" not in body


def test_diverged_runs_are_reported():
    runs = results()
    runs["BN-x5"][1] = run("BN-x5", (0.3,), diverged=True, seed=1)
    body = build_figure_3(runs).body
    assert "**Diverged:** BN-x5 (seed 1) at step 17." in body
    assert "**Diverged:** BN-x5 (seed 1) at step 17." in build_figure_2(runs).body
    assert table_of(body, "steps to")["BN-x5"][0] == "never (10 to never)"
    assert "Diverged" not in build_figure_3(results()).body


def test_runs_without_metrics_are_no_error(tmp_path):
    runs = {title: [run(title, (), ())] for title in TITLES}
    body = build_figure_3(runs).body
    assert table_of(body, "steps")["BN-x5"][::2] == ["never", "-", "-"]
    assert table_of(body, "first logged learning rate")["BN-x5"] == ["-"] * 4
    write_report("t", [build_figure_2(runs), build_figure_3(runs)], runs, tmp_path, "c")


def test_statements_are_not_tested_without_all_five_networks():
    two = {title: results()[title] for title in ("BN-x5", "Inception")}
    body = build_figure_3(two).body
    assert "\nThe paper's statements are not tested: no run of BN-B" in body
    assert list(table_of(body, "steps to")) == ["Inception", "BN-x5"]


def test_other_titles_are_ignored():
    more = results() | {"BN-x5 with 40% dropout": [run("y", (1.0,), seed=7)]}
    assert build_figure_3(more).body == build_figure_3(results()).body
    assert build_figure_2(more).body == build_figure_2(results()).body


@pytest.mark.parametrize("build", [build_figure_2, build_figure_3])
def test_networks_that_cannot_be_compared_are_an_error(build):
    with pytest.raises(UsageError, match="no run of Inception: .* compare BN-x5 with it"):
        build({"BN-x5": results()["BN-x5"]})
    apart = results() | {"BN-x5": [run("BN-x5", (0.5,), seed=5)]}
    with pytest.raises(UsageError, match=r"no seed is shared by all .* BN-x5: \[5\]"):
        build(apart)


# --- Figure 2.


def lines_of(section, name):
    """Returns the curves of a plot, and its diamonds as (x, y, whether it is hollow)."""
    (axes,) = section.plots[name].axes
    curves = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() != "D"]
    diamonds = [
        (*line.get_xydata().tolist()[0], line.get_markerfacecolor() == "white")
        for line in axes.lines
        if line.get_marker() == "D"
    ]
    return curves, diamonds


def test_lines_are_means_over_seeds_and_carry_the_diamonds():
    curves, diamonds = lines_of(build_figure_2(results()), "figure_2.svg")
    assert len(curves) == 6 and len(diamonds) == 4
    assert curves[2] == [[10, pytest.approx(0.82)], [20, pytest.approx(0.84)]]
    assert diamonds[0] == (40, pytest.approx(0.8), False)
    assert diamonds[2] == (10, pytest.approx(0.82), False)
    (axes,) = build_figure_2(results()).plots["figure_2.svg"].axes
    assert axes.get_ylim() == (0, 1)
    curves, _ = lines_of(build_figure_3(results()), "figure_3_loss.svg")
    assert curves == [[[10, 2.0], [20, 1.0]]] * 5


def test_overlapping_diamonds_have_different_sizes():
    section = build_figure_2(results(BN_x5=[(0.1, 0.91), (0.1, 0.91)]))
    (axes,) = section.plots["figure_2.svg"].axes
    sizes = {
        line.get_color(): line.get_markersize()
        for line in axes.lines
        if line.get_marker() == "D" and line.get_xdata()[0] == 20
    }
    x5, x30 = sizes.values()
    assert x5 > x30


def test_the_papers_points_are_drawn_on_imagenet_only():
    def diamonds(**settings):
        runs = {title: [run(title, c[0], **settings)] for title, c in CURVES.items()}
        section = build_figure_2(runs)
        return section.body, [d[:2] for d in lines_of(section, "figure_2.svg")[1] if d[2]]

    text, points = diamonds()
    assert not points and "Hollow" not in text
    text, points = diamonds(**{"data.name": "imagenet2012", "train.global_batch_size": 64})
    assert (15.5e6, 0.722) in points and (3e6, 0.748) in points and len(points) == 5
    assert "Hollow diamonds are the paper's results, with steps converted to batches of 64" in text


# --- Figure 4.

ROWS = [
    {"model": model, "models": models, "crops": crops, "examples": 400, "classes": 10, "step": 9}
    | {"top1_error": top1, "top5_error": top1 / 10, "cut": cut, "trained_on": "shift"}
    for crops, cut, errors in (
        (1, [4, 1, 6, 2], (0.3, 0.2, 0.15)),
        (48, [4, 1, 6, 2], (0.2, 0.25, 0.1)),
    )
    for model, models, top1 in zip(("a", "b", "ensemble"), (1, 1, 2), errors, strict=True)
]


def test_errors_are_shown_beside_the_papers():
    section = build_figure_4(ROWS)
    body = section.body
    assert section.summary == (
        "2 BN-x30 networks have a mean top-1 error of 25.0% with one crop and 22.5% with 48; their"
        " ensemble has 10.0% with 48, lower than 2 of the 2 alone (paper, on ImageNet: 25.2%, 22.0%"
        " and 20.1%)."
    )
    lines = re.findall(r"^\| (?:single network|ensemble) .*$", body, re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["single network", "1", "1", "25.00% (20.00% to 30.00%)", "25.20%"]
        + ["2.50% (2.00% to 3.00%)", "7.82%"],
        ["single network", "1", "48", "22.50% (20.00% to 25.00%)", "21.99%"]
        + ["2.25% (2.00% to 2.50%)", "5.82%"],
        ["ensemble", "2", "1", "15.00%", "-", "1.50%", "-"],
        ["ensemble", "2", "48", "10.00%", "20.10%", "1.00%", "4.90%"],
    ]
    assert "the three squares of a square image are identical" in body
    assert "Training is unfinished for 4 of the 6 networks." in body
    assert "a top-1 error of 25.0% has a standard error of 2.2 points" in body
    assert "With 10 classes instead of 1,000, the errors are not comparable" in body
    imagenet = build_figure_4([row | {"classes": 1_000} for row in ROWS]).body
    assert "not comparable" not in imagenet


def test_a_single_network_or_none_is_no_error():
    alone = [row for row in ROWS if row["model"] == "a"]
    assert "ensemble" not in build_figure_4(alone).summary
    assert "No member" in build_figure_4([]).body


def write_run(path, config, lines, input_shape=(8, 8, 1)):
    workdir = Workdir(path)
    workdir.create(config, Interface(input_shape, "0123456789"))
    with MetricsWriter(workdir, 32) as metrics:
        for line in lines:
            metrics.write(line["step"], {k: v for k, v in line.items() if k != "step"})
    return path


def test_an_evaluation_is_saved_until_a_run_changes(tmp_path, monkeypatch):
    evaluated = []

    def evaluate_networks(workdirs, crops):
        evaluated.append((workdirs, crops))
        return [{"model": os.fspath(path), "models": 1, "crops": 1} for path in workdirs]

    monkeypatch.setattr(figure_4, "evaluate_networks", evaluate_networks)
    ends = iter(itertools.count())

    def finish(name):
        lines = [{"step": 10, FINISHED: f"{next(ends)}"}]
        return write_run(tmp_path / name, digits_bn_x30.get_config(), lines)

    paths = [finish("a"), finish("b")]
    paths.append(write_run(tmp_path / "c", digits_bn_x30.get_config(), [{"step": 5}]))

    def evaluate():
        return evaluate_ensemble(paths, tmp_path)

    rows = evaluate()
    # Without the folder of the runs, which says nothing about the result.
    assert [row["model"] for row in rows] == ["a", "b"]
    # Digits are square images, and training neither mirrors nor enlarges them.
    assert rows[0]["cut"] == [1, 1, 6, 1] and rows[0]["trained_on"] == "none"
    assert evaluate() == rows and len(evaluated) == 1
    (tmp_path / "b" / "metrics.jsonl").unlink()
    finish("b")
    assert evaluate() == rows and len(evaluated) == 2
    with monkeypatch.context() as patch:
        patch.setattr(figure_4, "suitable_crops", lambda workdir: Crops(windows=5))
        evaluate()
    assert len(evaluated) == 3
    (tmp_path / "figure_4.json").write_text("{")
    assert evaluate() == rows and len(evaluated) == 4
    assert evaluate_ensemble(paths[2:], tmp_path) == []


def test_crops_are_the_distinct_ones_of_the_papers_144(tmp_path):
    imagenet = configure(**{"data.image_size": 224, "data.mirror": True, "data.crop": "inception"})
    for name, config, shape, crops in (
        ("imagenet", imagenet, (224, 224, 3), Crops(4, 3, 6, 2)),
        ("shift", cifar10_inception.get_config(), (32, 32, 3), Crops(1, 1, 6, 2)),
        ("cifar10", cifar10_bn_x30_ensemble.get_config(), (32, 32, 3), Crops(4, 1, 6, 2)),
    ):
        write_run(tmp_path / name, config, [], shape)
        assert figure_4.suitable_crops(tmp_path / name) == crops


# --- The page.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a report of Figures 2 and 3."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    runs = results()
    sections = [build_figure_2(runs), build_figure_3(runs)]
    write_report("In miniature", sections, runs, folder, "python -m x --a='b c'")
    return folder


def test_both_files_contain_the_whole_report(folder):
    names = {"report.md", "report.html", "figure_2.svg", "figure_3_loss.svg"}
    assert {file.name for file in folder.iterdir()} == names
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert build_figure_3(results()).body in text and "\n    python -m x --a='b c'\n" in text
    images = re.findall(r"\]\(([\w.]+\.svg)\)", text)
    assert images == ["figure_2.svg", "figure_3_loss.svg"]
    assert all((folder / name).read_bytes().startswith(SVG) for name in images)
    headings = ["Figure 2: accuracy against steps", "Figure 3: steps and best accuracy"]
    for heading in [*headings, "How this report was made"]:
        (anchor,) = re.findall(rf'<h2 id="([^"]+)">{heading}</h2>', page)
        assert f'<a href="#{anchor}">{heading}</a>' in page and f"(#{anchor})" in text
    assert page.count("<table") == text.count("\n| ---")


def test_the_report_begins_with_the_results(folder):
    summary = build_figure_3(results()).summary
    title, paper, first, contents, *_ = (folder / "report.md").read_text().split("\n\n")
    assert title == "# In miniature" and "Internal Covariate Shift" in paper
    assert first == summary and contents.startswith("- [Figure 2")
    page = (folder / "report.html").read_text()
    assert re.search(rf'<div class="summary">\s*<p>{re.escape(summary)}</p>\s*</div>\s*<nav>', page)


def test_a_phone_shows_the_rows_of_wide_tables_as_blocks(folder):
    page = (folder / "report.html").read_text()
    tables = re.findall(r'<table( class="wide")?>(.*?)</table>', page, re.DOTALL)
    for is_wide, table in tables:
        names = re.findall(r"<th[^>]*>(.*?)</th>", table)
        assert bool(is_wide) == (len(names) > 3)
        labels = re.findall(r'data-label="([^"]*)"', table)
        rows = table.count("<tr>") - 1
        assert labels == (names * rows if is_wide else [])


def test_the_html_file_is_self_contained(folder):
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == page.count("src=") == 2
    assert not re.search(r"<(script|link|iframe|object|base)|@import|url\(|srcset", page)
    # A link is followed only by a reader.
    assert set(re.findall(r'href="(?!#)([^"]*)"', page)) == {"https://arxiv.org/abs/1502.03167"}


def small_section(height):
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, height])
    return Section("Small", "![A line](a.svg)", {"a.svg": figure})


def test_names_chosen_by_users_are_shown_literally(tmp_path):
    bad = "<script>x</script> *a* _b_ `c` | [d](e) & \\"
    runs = {bad: [dataclasses.replace(run("x", (0.5,)), environment=environment(commit=bad))]}
    runs["y"] = [run("y", (0.5,), **{"data.crop": bad})]
    write_report(
        bad,
        [Section(bad, f"<img src=x> {escape(bad)}\n\n<div>y</div>")],
        runs,
        tmp_path,
        f"{bad}\n{bad}",
    )
    page = (tmp_path / "report.html").read_text()
    shown = "&lt;script&gt;x&lt;/script&gt; *a* _b_ `c` | [d](e) &amp; \\"
    assert "<script" not in page and "<em>a</em>" not in page and "<img" not in page
    assert "&lt;div&gt;y&lt;/div&gt;" in page
    assert f"<title>{shown}</title>" in page
    for place in ("h1", "h2", "p", "a", "td", "code"):
        assert re.search(rf"<{place}[^>]*>[^<]*{re.escape(shown)}", page), place


def read_all(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_failed_report_leaves_the_previous_one(tmp_path, monkeypatch):
    runs = results()
    write_report("first", [small_section(2)], runs, tmp_path, "c")
    first = read_all(tmp_path)

    def no_space(path, content):
        if path.name.startswith("report.html"):
            raise OSError(28, "No space left on device")
        path.write_text("")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_bytes", no_space)
        with pytest.raises(StorageError, match="cannot be written: No space left on device"):
            write_report("second", [small_section(3)], runs, tmp_path, "c")
    assert read_all(tmp_path) == first
    write_report("second", [small_section(3)], runs, tmp_path, "c")
    second = read_all(tmp_path)
    assert second.keys() == first.keys() and all(second[name] != first[name] for name in first)
    with pytest.raises(StorageError, match="report in .*a.svg cannot be written"):
        write_report("third", [], runs, tmp_path / "a.svg", "c")


def test_the_same_runs_produce_the_same_files(tmp_path):
    for name in "ab":
        write_report("t", [small_section(2)], results(), tmp_path / name, "c")
    assert read_all(tmp_path / "a") == read_all(tmp_path / "b")


@pytest.mark.parametrize(
    "sections",
    [
        [Section("a", "no plot", {"a.svg": Figure()})],
        [Section("a", "![b](b.svg)")],
        [Section("a", "![b](b.svg)", {"b.png": Figure()})],
        [Section("a", "![b](b.svg)", {"b.svg": Figure()})] * 2,
        [Section("a", "![b](b.svg) ![b](b.svg)", {"b.svg": Figure()})],
        [Section("a", "![b](../b.svg)", {"../b.svg": Figure()})],
    ],
)
def test_each_plot_must_be_shown_once_in_its_section(sections, tmp_path):
    with pytest.raises(ValueError, match="expected each plot to be shown once"):
        write_report("t", sections, {}, tmp_path / "new", "c")
    assert not (tmp_path / "new").exists()


# --- How the report was made.


def test_missing_runs_are_counted(tmp_path):
    text = provenance(results(), tmp_path, num_missing=3)
    assert "The report covers 10 of this command's 13 runs." in text
    assert "The report covers" not in provenance(results(), tmp_path)


def test_every_run_is_listed_with_its_status_and_time(tmp_path):
    runs = results()
    finished = [*runs["BN-x5"][0].metrics, {"step": 30, FINISHED: "0123456789abcdef"}]
    runs["BN-x5"][0] = dataclasses.replace(
        runs["BN-x5"][0], metrics=finished, environment=environment()
    )
    killed = environment() + environment(started="2026-11-21T12:00:00+00:00", ended=None)
    runs["BN-x30"][1] = dataclasses.replace(
        run("BN-x30", (0.5,), diverged=True, seed=1), environment=killed
    )
    rows = table_of(text := provenance(runs, tmp_path), "status")
    assert len(rows) == 10
    assert rows["BN-x5 (seed 0)"] == ["finished", "2026-11-21 10:00", "0123456789ab"] + [
        "1",
        "30",
        "10 s",
        "1 h 30 min",
    ]
    assert rows["BN-x30 (seed 1)"][0] == "diverged at step 17"
    assert rows["BN-x30 (seed 1)"][3] == "2"
    assert rows["BN-x30 (seed 1)"][-1] == "over 1 h 30 min"
    assert rows["Inception (seed 0)"][:3] == ["unfinished", "-", "-"]
    assert "the runs took over 3 h 0 min" in text and "last ended 2026-11-21 11:30 UTC." in text


def test_a_common_environment_is_described_once(tmp_path):
    runs = {
        title: [dataclasses.replace(r, environment=environment()) for r in seeds]
        for title, seeds in results().items()
    }
    text = provenance(runs, tmp_path)
    assert "Software: bn\\_keras 1.2, tensorflow 2.21." in text and "Source: commit abc123." in text
    assert "Machine: EPYC, 2 cores per run, Linux x86\\_64, trained on CPU." in text
    one = environment(machine=environment()[0]["machine"] | {"cores": 1})
    runs = {"x": [dataclasses.replace(run("x", ()), environment=one)]}
    assert "EPYC, 1 core per run," in provenance(runs, tmp_path)
    assert "differs between" not in text and "not recorded" not in text


@pytest.mark.parametrize(
    "change, which",
    [
        ({"versions": {"bn_keras": "1.3"}}, "Software"),
        ({"commit": "def456"}, "Source"),
        ({"commit": None, "modified": None}, "Source"),
        ({"modified": True}, "Source"),
        ({"machine": environment()[0]["machine"] | {"cores": 64}}, "Machine"),
    ],
)
def test_a_difference_in_the_environment_is_listed_by_run(change, which, tmp_path):
    runs = {
        title: [dataclasses.replace(r, environment=environment()) for r in seeds]
        for title, seeds in results().items()
    }
    # Started in one environment, and resumed in the other.
    both = environment() + environment(**change)
    runs["BN-x5"][1] = dataclasses.replace(runs["BN-x5"][1], environment=both)
    text = provenance(runs, tmp_path)
    assert re.findall(r"\*\*(\w+) differs between starts of runs", text) == [which]
    first, second = re.findall(r"^- .*: (.*\(seed \d\))\.$", text, re.MULTILINE)
    assert second == "BN-x5 (seed 1)" and first.count("seed") == 10


def test_runs_without_a_recorded_environment_are_named(tmp_path):
    runs = results()
    text = provenance(runs, tmp_path)
    assert "Software and machine are not recorded for any run." in text
    runs["BN-x5"][0] = dataclasses.replace(runs["BN-x5"][0], environment=environment())
    text = provenance(runs, tmp_path)
    assert "not recorded for Inception (seed 0), Inception (seed 1), BN-Baseline (seed 0)" in text
    assert "BN-x5-Sigmoid (seed 1)." in text


def test_settings_are_divided_into_different_and_common_ones(tmp_path):
    runs = {
        "Inception": [run("Inception", (0.5,), seed=s) for s in (0, 1)],
        "BN-x30": [Run("BN-x30", digits_bn_x30.get_config(), [])],
    }
    text = provenance(runs, tmp_path)
    rows = table_of(text, "settings")
    assert "`schedule.base_rate` 0.01" in rows["Inception"][0] and "data_dir" not in text
    assert "`schedule.base_rate` 0.3" in rows["BN-x30"][0]
    assert "`model.local_response_normalization` off" in rows["BN-x30"][0]
    assert "steps" not in rows["Inception"][0]
    train = next(line for line in text.splitlines() if line.startswith("- train:"))
    assert "`steps` 150" in train and "`momentum` 0.9" in train and "`l2`" not in train
    # Settings that are off in all runs are left out.
    assert "mixup" not in text
    runs["again"] = runs["Inception"]
    runs["one longer"] = [run("x", (), **{"train.steps": n}) for n in (600, 900)]
    rows = table_of(provenance(runs, tmp_path), "settings")
    assert rows["again"] == ["same as the first"]
    assert rows["one longer"] == ["`train.steps` 600 or 900"]


def test_settings_are_those_in_effect(tmp_path):
    """A setting of None is the variant's own value; older versions wrote the value itself."""
    runs = {
        "Inception": [run("Inception", (0.5,))],
        "BN-x30": [Run("BN-x30", digits_bn_x30.get_config(), [])],
    }
    assert runs["BN-x30"][0].config.model.dropout is None
    explicit = {"model.dropout": 0.4, "model.local_response_normalization": True}
    older = runs | {"Inception": [run("Inception", (0.5,), **explicit)]}
    assert provenance(older, tmp_path) == (text := provenance(runs, tmp_path))
    rows = table_of(text, "settings")
    assert "`model.dropout` 0.4" in rows["Inception"][0]
    assert "`model.dropout` 0," in rows["BN-x30"][0]
    assert "`model.local_response_normalization` off" in rows["BN-x30"][0]


def test_networks_trained_with_dropout_are_named():
    runs = results()
    runs["BN-x30"] = [Run("BN-x30", digits_bn_x30.get_config(), runs["BN-x30"][0].metrics)]
    names = "Inception, BN-Baseline, BN-x5, BN-x5-Sigmoid"
    text = f"Dropout raises the training loss of these networks: {names}."
    assert text in build_figure_3(runs).body
    assert "ropout" not in build_figure_3(results()).body


def test_a_setting_that_an_older_version_did_not_write_is_named(tmp_path):
    runs = {title: seeds[:1] for title, seeds in results().items()}
    values = runs["BN-x5"][0].config.to_dict()
    del values["model"]["dropout"]
    saved = SavedConfig(values, tmp_path / "config.json")
    runs["BN-x5"] = [dataclasses.replace(runs["BN-x5"][0], config=saved)]
    with pytest.raises(UsageError, match="config.json has no model.dropout"):
        build_figure_3(runs)
    assert "`model.dropout` -" in provenance(runs, tmp_path)


def test_settings_of_other_models_and_data_sets_are_listed_apart(tmp_path):
    runs = {"a": [run("a", ())], "b": [run("b", (), **{"data.name": "mnist", "model.name": "mlp"})]}
    text = provenance(runs, tmp_path)
    assert "**inception on digits**" in text and "**mlp on mnist**" in text
    assert "Settings that differ" not in text
    assert "**inception on digits**" not in provenance({"a": runs["a"]}, tmp_path)
    # The network of section 4.1 has neither a stem nor dropout.
    inception, mlp = text.split("**mlp on mnist**")
    assert "`dropout` 0.4" in inception and "`stem`" in inception
    assert "`dropout`" not in mlp and "`stem`" not in mlp and "`initializer`" in mlp


def test_a_report_without_runs_shows_the_command(tmp_path):
    assert provenance({}, tmp_path).endswith("## How this report was made\n\n    make it\n")
