"""The files of a run: whole lines, kept up to the step that a run goes on from."""

import json

from bn_keras.workdir import MetricsWriter, Workdir
from configs import default


def test_the_config_comes_back_as_it_was(tmp_path):
    config = default.get_config()
    Workdir(tmp_path / "new" / "run").create(config)
    assert Workdir(tmp_path / "new" / "run").read_config() == config
    assert [p.name for p in (tmp_path / "new" / "run").iterdir()] == ["config.json"]


def test_only_the_place_of_the_data_may_differ(tmp_path):
    config = default.get_config()
    Workdir(tmp_path).create(config)
    config.data.data_dir = "/elsewhere"
    Workdir(tmp_path).check(config)


def test_metrics_are_lines_of_json_with_step_and_examples(tmp_path):
    workdir = Workdir(tmp_path)
    with MetricsWriter(workdir, 32) as metrics:
        metrics.write(5, {"train/loss": 0.5})
        metrics.write(7, {"validation/accuracy": 1.0})
    assert [json.loads(line) for line in workdir.metrics.read_text().splitlines()] == [
        {"step": 5, "examples": 160, "train/loss": 0.5},
        {"step": 7, "examples": 224, "validation/accuracy": 1.0},
    ]


def test_a_line_cut_short_and_later_steps_are_dropped(tmp_path):
    workdir = Workdir(tmp_path)
    with MetricsWriter(workdir, 32) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {})
    with workdir.metrics.open("a") as lines:
        lines.write('{"step": 4, "exam')
    assert [line["step"] for line in workdir.read_metrics()] == [1, 2, 3]
    workdir.drop_metrics_after(2)
    assert workdir.metrics.read_text().count("\n") == 2
    assert [line["step"] for line in workdir.read_metrics()] == [1, 2]


def test_a_run_is_finished_when_its_last_line_says_so(tmp_path):
    workdir = Workdir(tmp_path)
    assert not workdir.is_finished()
    with MetricsWriter(workdir, 32) as metrics:
        metrics.write(1, {})
        assert not workdir.is_finished()
        metrics.write(2, {Workdir.FINISHED: "0" * 64})
    assert workdir.is_finished()
