"""The report says what the runs' files say, and nothing else."""

import pytest

from bn_keras.report import (
    Run,
    figure_3,
    figure_3_row,
    paper_order,
    plot_curves,
    write_report,
)
from bn_keras.workdir import MetricsWriter, Workdir
from configs import digits_inception, networks

TITLES = [network.title for network in networks.NETWORKS.values()]


def run(title, accuracies, losses=(2.0, 1.0), diverged=False):
    lines = [{"step": 10 * i, "validation/accuracy": a} for i, a in enumerate(accuracies, 1)]
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
        lines.append({"step": 17, Workdir.DIVERGED: True})
    return Run(title, digits_inception.get_config(), lines)


def as_in_the_paper():
    curves = [(0.5, 0.8, 0.79, 0.8), (0.5, 0.7, 0.82), (0.81, 0.83), (0.7, 0.9), (0.6, 0.75)]
    return [run(title, accuracies) for title, accuracies in zip(TITLES, curves, strict=True)]


def test_what_a_run_says_of_itself():
    one = run("BN-x5", (0.5, 0.8, 0.7), losses=(2.0, 0.5, 0.75))
    assert one.best_accuracy == 0.8 and one.lowest_loss == 0.5
    assert one.steps_to_accuracy(0.5) == 10 and one.steps_to_accuracy(0.8) == 20
    assert one.steps_to_accuracy(0.81) is None
    assert one.steps_to_loss(1.0) == 20 and one.steps_to_loss(0.1) is None
    # 30 steps of 32 examples at 64 images a second.
    assert one.seconds == pytest.approx(15.0)
    assert one.diverged_at is None
    assert run("x", (), (), diverged=True).diverged_at == 17


def test_a_run_alone_has_its_row_in_words():
    alone = run("x", (0.5, 0.8, 0.7))
    assert figure_3_row(alone) == "best accuracy 80.00% after 20 steps"
    for name, target, batch, rest in (
        ("digits", 0.5, 64, " (40 of 32), 50.0% after 10 steps (20 of 32)"),
        ("digits", 0.9, 32, ", 90.0% never"),
        ("imagenet2012", 0.0, 32, ", 72.2% after 20 steps"),
    ):
        config = digits_inception.get_config().copy_and_resolve_references()
        config.data.name = name
        config.train.until_accuracy, config.train.global_batch_size = target, batch
        aimed = Run("x", config, alone.metrics)
        assert figure_3_row(aimed) == f"best accuracy 80.00% after 20 steps{rest}"


def test_the_table_has_a_row_a_network():
    runs = as_in_the_paper()
    runs[4] = run("BN-x5-Sigmoid", (0.6,), diverged=True)
    header, rule, *rows = figure_3(runs).splitlines()
    assert "steps to 80.0%" in header and set(rule) == set("|- ")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [
        ["Inception", "20", "80.0%"],
        ["BN-Baseline", "30", "82.0%"],
        ["BN-x5", "10", "83.0%"],
        ["BN-x30", "20", "90.0%"],
        ["BN-x5-Sigmoid", "never", "60.0% (diverged at step 17)"],
    ]
    assert len({len(line) for line in (header, rule, *rows)}) == 1


def test_the_order_is_compared_with_the_papers():
    runs = as_in_the_paper()
    runs[1] = run("BN-Baseline", (0.5, 0.85))
    assert sum(line.startswith("- As in the paper") for line in paper_order(runs)) == 5
    runs[1] = run("BN-Baseline", (0.81,))
    runs[3] = run("BN-x30", (0.1, 0.1))
    otherwise = [line for line in paper_order(runs) if line.startswith("- Not so here")]
    assert [line.split(": ")[1].split(" ")[0] for line in otherwise] == [
        "BN-x5",
        "BN-x30",
        "BN-x30",
    ]
    assert all(line.endswith(".") for line in otherwise)


def test_a_network_that_never_gets_there_is_not_sooner_than_another():
    runs = as_in_the_paper()
    runs[1], runs[2] = run("BN-Baseline", (0.1,)), run("BN-x5", (0.1,))
    lines = paper_order(runs)
    assert lines[0].startswith("- Not so here") and lines[1].startswith("- Not so here")


def test_the_report_is_written_from_workdirs(tmp_path):
    runs = []
    for given in as_in_the_paper():
        workdir = Workdir(tmp_path / given.title)
        workdir.create(given.config, (8, 8, 1), "0123456789")
        with MetricsWriter(workdir, 32) as metrics:
            for line in given.metrics:
                metrics.write(line["step"], {k: v for k, v in line.items() if k != "step"})
        runs.append(Run.read(given.title, tmp_path / given.title))
    summary = write_report(runs, tmp_path, "python -m launch.reproduce")
    text = (tmp_path / "report.md").read_text()
    assert figure_3(runs) in summary and summary in text
    assert "`python -m launch.reproduce`" in text and "(accuracy.png)" in text
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_numbers_is_no_error(tmp_path):
    runs = [run(title, (), ()) for title in TITLES]
    assert "never" in figure_3(runs)
    plot_curves(runs, tmp_path / "plot.png")


def test_a_tie_is_no_best_accuracy():
    runs = as_in_the_paper()
    runs[2] = run("BN-x5", (0.81, 0.9))
    assert "- Not so here, otherwise than in the paper: BN-x30 alone has the best accuracy." in (
        paper_order(runs)
    )
