"""The files of a run: complete lines, kept up to the step at which a run resumes."""

import errno
import fcntl
import json
import os
import signal
import socket

import pytest
from full_disk import files_of_at_most

from bn_keras import storage
from bn_keras.errors import StorageError, UsageError, WorkdirInUseError
from bn_keras.runs import metrics_writer
from bn_keras.runs.metrics_log import FINISHED
from bn_keras.runs.metrics_writer import MetricsWriter
from bn_keras.runs.workdir import Interface, Workdir
from bn_keras.training.build import build_data, build_model
from bn_keras.training.config import default_config
from configs import mnist_bn

INTERFACE = Interface((8, 8, 1), ("cat", "dog"))


@pytest.mark.parametrize("bytes_per_line, most", [(100, 34), (2_000, 25)])
def test_metrics_are_uploaded_to_a_bucket_from_time_to_time(
    bytes_per_line, most, memory_bucket, monkeypatch
):
    """Each second brings a line, for 1,000 seconds. A larger file is uploaded less often."""
    now, sizes = 0.0, []
    copy = metrics_writer.storage.copy

    def counted_copy(source, target):
        if target == run.metrics:
            sizes.append(os.path.getsize(source))
        return copy(source, target)

    run = Workdir(memory_bucket / "run")
    with monkeypatch.context() as patch:
        patch.setattr(metrics_writer.time, "monotonic", lambda: now)
        patch.setattr(metrics_writer.storage, "copy", counted_copy)
        with MetricsWriter(run, 32) as metrics:
            for step in range(1000):
                now += 1
                metrics.write(step, {"text": "x" * bytes_per_line})
            uploaded = Workdir(run.path).read_metrics()
            # A save makes the latest lines durable; a second one has nothing to upload.
            metrics.sync()
            assert Workdir(run.path).read_metrics().last_step == 999
            count = len(sizes)
            metrics.sync()
            assert len(sizes) == count <= most
    assert 0 < len(uploaded) < 1000
    assert sum(sizes[:-1]) <= 20_000 * 1000
    assert [line["step"] for line in run.read_metrics()] == list(range(1000))


def test_a_resumed_run_appends_to_its_metrics_in_a_bucket(memory_bucket):
    run = Workdir(memory_bucket / "run")
    for steps in ((1, 2, 3), (3, 4)):
        run.drop_metrics_after(2)
        with MetricsWriter(run, 32) as metrics:
            for step in steps:
                metrics.write(step, {})
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4]
    assert len([name for name in storage.list_folder(run.path) if name.startswith("events")]) == 2


def test_config_and_interface_are_read_as_they_were_written(tmp_path):
    config = default_config()
    Workdir(tmp_path / "new" / "run").create(config, INTERFACE)
    assert Workdir(tmp_path / "new" / "run").read_config() == config
    assert Workdir(tmp_path / "new" / "run").read_interface() == INTERFACE
    assert Workdir(tmp_path / "new" / "run").read_data_sizes() == (2, 0)
    assert {p.name for p in (tmp_path / "new" / "run").iterdir()} == {
        "config.json",
        "interface.json",
        "metrics.jsonl",
    }


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '{"input_shape": [8, 8, 1]}'])
def test_a_missing_or_damaged_interface_is_an_error_that_names_it(text, tmp_path):
    if text is not None:
        (tmp_path / "interface.json").write_text(text)
    with pytest.raises(UsageError, match="interface.json is missing or damaged"):
        Workdir(tmp_path).read_interface()
    assert Workdir(tmp_path).read_data_sizes() == (0, 0)


def test_only_the_location_of_the_data_may_differ(tmp_path):
    config = default_config()
    Workdir(tmp_path).create(config, INTERFACE)
    config.data.data_dir = "/elsewhere"
    run = Workdir(tmp_path)
    run.check(config)
    assert run.changes(config) == {"data.data_dir": ("", "/elsewhere")}
    # Other commands on the run look for the data where they are now.
    run.create(config, INTERFACE)
    assert Workdir(tmp_path).read_config().data.data_dir == "/elsewhere"
    assert not run.changes(config)


def test_a_relative_data_dir_is_saved_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = default_config()
    config.data.data_dir = "pictures"
    Workdir(tmp_path / "run").create(config, INTERFACE)
    assert Workdir(tmp_path / "run").read_config().data.data_dir == str(tmp_path / "pictures")
    assert config.data.data_dir == "pictures"
    assert not Workdir(tmp_path / "run").changes(config)
    config.data.data_dir = "gs://bucket/data"
    Workdir(tmp_path / "other").create(config, INTERFACE)
    assert Workdir(tmp_path / "other").read_config().data.data_dir == "gs://bucket/data"


def test_metrics_are_lines_of_json_with_step_and_examples(tmp_path):
    workdir = Workdir(tmp_path)
    with MetricsWriter(workdir, 32) as metrics:
        metrics.write(5, {"train/loss": 0.5})
        metrics.write(7, {"validation/accuracy": 1.0})
    assert [json.loads(line) for line in workdir.metrics.read_text().splitlines()] == [
        {"step": 5, "examples": 160, "train/loss": 0.5},
        {"step": 7, "examples": 224, "validation/accuracy": 1.0},
    ]


def test_an_incomplete_line_and_later_steps_are_dropped(tmp_path):
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


def test_a_run_is_finished_if_its_last_line_contains_the_hash(tmp_path):
    workdir = Workdir(tmp_path)
    assert not workdir.read_metrics().is_finished
    with MetricsWriter(workdir, 32) as metrics:
        metrics.write(1, {})
        assert not workdir.read_metrics().is_finished
        metrics.write(2, {FINISHED: "0" * 64})
    assert workdir.read_metrics().is_finished


def test_values_that_are_not_finite_become_null(tmp_path):
    workdir = Workdir(tmp_path)
    with MetricsWriter(workdir, 32) as metrics:
        metrics.write(1, {"validation/loss": float("inf"), "train/loss": float("nan")})
    assert workdir.read_metrics() == [
        {"step": 1, "examples": 32, "validation/loss": None, "train/loss": None}
    ]


def test_a_workdir_has_the_name_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Workdir(".").name == Workdir(f"{tmp_path}/").name == tmp_path.name
    assert Workdir("gs://bucket/runs/a/").name == "a"


@pytest.mark.parametrize("text", ["[1]", "{}", '{"model": {}}', '{"model"'])
def test_a_damaged_config_is_an_error_that_names_it(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="config.json (cannot be read|is not a config)") as caught:
        Workdir(tmp_path).read_config()
    assert "\n" not in str(caught.value)


# The readers of a run's config: evaluation, prediction, check and export build the network and open
# the data, and a resumed training compares it with its own.
READERS = {
    "network": lambda run: build_model(run.read_config(), (8, 8, 1), 2),
    "data": lambda run: build_data(run.read_config()),
    "train": lambda run: run.check(mnist_bn.get_config()),
}


@pytest.mark.parametrize(
    "key, readers",
    [
        ("model.variant", ["network", "train"]),
        ("batch_norm.synchronized", ["network", "train"]),
        ("batch_norm.epsilon", ["network", "train"]),
        ("train.precision", ["network", "train"]),
        ("data.max_bad_examples", ["data", "train"]),
        ("seed", ["data", "train"]),
        ("population.when", ["train"]),
    ],
)
def test_a_key_that_an_older_version_did_not_save_is_named(key, readers, tmp_path):
    run = Workdir(tmp_path)
    config = mnist_bn.get_config()
    run.create(config, INTERFACE)
    older = config.to_dict()
    section = older
    *sections, name = key.split(".")
    for part in sections:
        section = section[part]
    del section[name]
    (tmp_path / "config.json").write_text(json.dumps(older))
    for reader in readers:
        with pytest.raises(UsageError, match=f"config.json has no {key}: an older version"):
            READERS[reader](run)


def test_a_saved_config_equals_the_original(tmp_path):
    config = default_config()
    Workdir(tmp_path).create(config, INTERFACE)
    read = Workdir(tmp_path).read_config()
    assert read.model == config.model and config.model == read.model
    assert read.copy_and_resolve_references() == config
    assert not hasattr(read, "_repr_html_")
    with config.unlocked():
        config.model.dropout = 0.1
    assert read != config and read.model != config.model and config.model != read.model


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, ',
        '{"step": "2"}',
        "[2]",
        '{"step": 2, "validation/accuracy": null}',
        '{"step": 2, "validation/accuracy": "0.5"}',
    ],
)
def test_a_damaged_line_of_metrics_is_named_and_kept(line, tmp_path):
    config = default_config()
    workdir = Workdir(tmp_path)
    workdir.create(config, INTERFACE)
    damaged = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    workdir.metrics.write_text(damaged)
    with pytest.raises(UsageError, match="line 2 of .*metrics.jsonl is damaged"):
        workdir.check(config)
    assert workdir.metrics.read_text() == damaged


def test_a_full_disk_keeps_the_lines_written_before(tmp_path):
    run = Workdir(tmp_path)
    with MetricsWriter(run, 32) as metrics:
        metrics.write(1, {"longer than the first event": "x" * 200})
    failed = "the metrics of step 2 in .* cannot be written: File too large; everything written"
    with (
        files_of_at_most(run.metrics.stat().length + 10),
        pytest.raises(StorageError, match=failed) as caught,
        MetricsWriter(run, 32) as metrics,
    ):
        metrics.write(2, {"train/loss": 0.5})
    assert "\n" not in str(caught.value)
    assert not run.metrics.read_text().endswith("\n")
    assert run.read_metrics().last_step == 1
    run.drop_metrics_after(1)
    with MetricsWriter(run, 32) as metrics:
        metrics.write(2, {})
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_a_disk_too_full_for_the_events_is_reported(tmp_path):
    run = Workdir(tmp_path)
    values = {f"train/{i}": 0.5 for i in range(50)}
    with pytest.raises(StorageError, match="metrics of step 3 in .*File too large"):
        with MetricsWriter(run, 32) as metrics:
            metrics.write(1, values)
            (events,) = tmp_path.glob("events.*")
            with files_of_at_most(max(events.stat().st_size, run.metrics.stat().length * 3)):
                metrics.write(2, {})
                metrics.write(3, values)


def test_a_full_disk_keeps_the_lines_that_a_resumed_run_needs(tmp_path):
    run = Workdir(tmp_path)
    with MetricsWriter(run, 32) as metrics:
        for step in range(100):
            metrics.write(step, {})
    with files_of_at_most(50), pytest.raises(StorageError, match="metrics.jsonl cannot be written"):
        run.drop_metrics_after(50)
    assert run.read_metrics().last_step == 99


def acquire_lock(path):
    """Acquires and releases the lock of an existing run, as a second process would."""
    with Workdir(path).locked():
        pass


def test_one_process_at_a_time_trains_in_a_workdir(tmp_path):
    Workdir(tmp_path).create(default_config(), INTERFACE)
    with Workdir(tmp_path).locked():
        with pytest.raises(UsageError, match="is in use") as caught:
            acquire_lock(tmp_path)
    message = str(caught.value)
    assert f"process {os.getpid()} on {socket.gethostname()}, since 2" in message
    assert "use another workdir" in message and "\n" not in message
    acquire_lock(tmp_path)


def test_a_run_copied_from_a_bucket_can_be_locked(tmp_path):
    Workdir(tmp_path).create(default_config(), INTERFACE)
    (tmp_path / "lock").unlink(missing_ok=True)
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "0123.claim").write_text("{}")
    with Workdir(tmp_path).locked(), pytest.raises(WorkdirInUseError):
        acquire_lock(tmp_path)
    acquire_lock(tmp_path)


def test_a_killed_process_releases_its_lock(tmp_path):
    Workdir(tmp_path).create(default_config(), INTERFACE)
    ready, locked = os.pipe()
    child = os.fork()
    if not child:
        with Workdir(tmp_path).locked():
            os.write(locked, b"!")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(UsageError, match=f"process {child} on"):
        acquire_lock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acquire_lock(tmp_path)


def test_a_new_run_is_locked_once_its_folder_exists(tmp_path):
    first, second = (Workdir(tmp_path / "run") for _ in range(2))
    with first.locked(), second.locked():
        assert not (tmp_path / "run").exists()
        first.create(default_config(), INTERFACE)
        with pytest.raises(UsageError, match=f"is in use: process {os.getpid()}"):
            second.create(default_config(), INTERFACE)
        with pytest.raises(UsageError, match="is in use"):
            acquire_lock(tmp_path / "run")
        # A run that is rolled back creates its folder again.
        first.create(default_config(), INTERFACE)
    acquire_lock(tmp_path / "run")


def test_a_run_that_another_process_started_and_ended_meanwhile_is_kept(tmp_path):
    late, other = Workdir(tmp_path), Workdir(tmp_path)
    with late.locked():
        with other.locked():
            other.create(default_config(), INTERFACE)
        with pytest.raises(UsageError, match="has started a run in .* meanwhile: start again"):
            late.create(default_config(), INTERFACE)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    Workdir(tmp_path).create(default_config(), INTERFACE)

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    acquire_lock(tmp_path)
    assert "cannot be locked (No locks available)" in caplog.text


@pytest.mark.parametrize(
    "accuracies, expected",
    [
        ((), 0),
        ((0.0,), 1),
        ((0.0, 0.0), 2),
        ((0.0, 0.5), 0),
        ((0.5, 0.4, 0.5), 2),
        ((0.0, 0.5, 0), 1),
    ],
)
def test_evaluations_since_the_best_are_counted_as_in_training(accuracies, expected, tmp_path):
    """In training, the best accuracy before the first evaluation is 0."""
    run = Workdir(tmp_path)
    with MetricsWriter(run, 32) as metrics:
        for step, accuracy in enumerate(accuracies, start=1):
            metrics.write(step, {"validation/accuracy": accuracy})
    assert run.read_metrics().evaluations_since_best == expected


def test_the_best_accuracy_is_that_of_evaluations_up_to_a_step(tmp_path):
    run = Workdir(tmp_path)
    assert run.read_metrics().best_accuracy == 0
    with MetricsWriter(run, 32) as metrics:
        for step, accuracy in ((1, 0.25), (2, 0.75), (3, 0.5)):
            metrics.write(step, {"train/accuracy": 0.9})
            metrics.write(step, {"validation/accuracy": accuracy})
    log = run.read_metrics()
    assert [log.up_to(step).best_accuracy for step in range(4)] == [0, 0.25, 0.75, 0.75]
    assert [line["validation/accuracy"] for line in log.evaluations(2)] == [0.75]
    assert log.evaluations(4) == []


def test_a_run_does_not_resume_on_other_data(tmp_path):
    config = mnist_bn.get_config()
    run = Workdir(tmp_path)
    run.create(config, Interface((8, 8, 1), ("a", "b"), 100))
    before = (tmp_path / "interface.json").read_text()
    for shape, names, count, message in (
        ((8, 8, 1), ("a", "b"), 99, r"num_train_examples \(100, now 99\)"),
        ((8, 8, 1), ("b", "a"), 100, "other class_names: use that data"),
        ((8, 8, 3), ("a", "b"), 100, "input_shape"),
    ):
        with pytest.raises(UsageError, match=message):
            Workdir(tmp_path).create(config, Interface(shape, names, count))
    assert (tmp_path / "interface.json").read_text() == before
    # A damaged file is written again.
    (tmp_path / "interface.json").write_text(before[:20])
    Workdir(tmp_path).create(config, Interface((8, 8, 1), ("a", "b"), 100))
    assert (tmp_path / "interface.json").read_text() == before
