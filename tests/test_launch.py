"""The commands as a user meets them: in a process of their own, from the checkout's root."""

import functools
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import tensorflow as tf
from absl import logging as absl_logging

from bn_keras.errors import (
    TrainingDivergedError,
    TrainingStoppedError,
    UsageError,
    WorkerLostError,
)
from launch import cli
from launch.command_error import CommandError

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIGITS = (
    "--config=configs/mnist_bn.py",
    "--config.data.name=digits",
    "--config.data.validation_split=validation",
    "--config.evaluation.global_batch_size=100",
)


def launch(command, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def assert_fails_on_one_line(done, status, *parts):
    assert done.returncode == status, done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("I")]
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in errors[0]


# None of these has to wait for TensorFlow.
@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--workdir=w"], ["--config is missing"]),
        (["--config=configs/bn_x5.py"], ["--workdir is missing"]),
        (["--config=configs/nope.py", "--workdir=w"], ["can't be loaded", "configs/nope.py"]),
        (
            ["--config=bn_keras/training/networks.py", "--workdir=w"],
            ["can't be loaded", "get_config"],
        ),
        ([*DIGITS, "--workdir=w", "--config.train.stepz=3"], ["'train.stepz'", "steps_per_loop"]),
        ([*DIGITS, "--workdir=w", "--config.trian.steps=3"], ["'trian.steps'", "train"]),
        ([*DIGITS, "--workdir=w", "--config.train.steps=many"], ["type int, not 'many'"]),
        ([*DIGITS, "--workdir=w", "--config.train.steps=1.5"], ["type int, not '1.5'"]),
        ([*DIGITS, "--workdir=w", "--config.train.l2=low"], ["type float, not 'low'"]),
        ([*DIGITS, "--workdir=w", "--config.data.mirror=maybe"], ["type bool, not 'maybe'"]),
        ([*DIGITS, "--workdir=w", "--config.train=3"], ["is a section", "global_batch_size"]),
        ([*DIGITS, "--workdir=w", "--stepz=3"], ["stepz"]),
        ([*DIGITS, "--workdir=w", "more"], ["unexpected argument 'more'"]),
        ([*DIGITS, "--workdir="], ["--workdir is empty"]),
        (
            [*DIGITS, "--workdir=w", "--dry_run=maybe"],
            ["--dry_run takes", "type bool, not 'maybe'"],
        ),
        ([*DIGITS, "--workdir=w", "--profile_steps=x"], ["--profile_steps takes", "int, not 'x'"]),
        ([*DIGITS, "--workdir=w", "--profile_steps=-1"], ["--profile_steps=-1"]),
        (["--config=mnst_bn", "--workdir=w"], ["no 'mnst_bn' (did you mean 'configs/mnist_bn.py'"]),
        (["--config=configs/bn_x30_ensemble.py:9", "--workdir=w"], ["error: no member '9' of"]),
    ],
)
def test_flags_that_cannot_be_meant(arguments, parts, tmp_path):
    done = launch("train", *arguments)
    assert_fails_on_one_line(done, 2, *parts)
    assert not (ROOT / "w").exists()


COMMANDS = sorted(p.stem for p in (ROOT / "launch").glob("*.py") if "cli.Command(" in p.read_text())
SUBCOMMANDS = [("tpu", name) for name in ("submit", "watch", "status", "logs", "delete")]


@functools.cache
def shown(*command):
    done = launch(*command, "--help")
    assert done.returncode == 0 and not done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [(name,) for name in COMMANDS] + SUBCOMMANDS, ids=" ".join)
def test_help_fits_a_screen_and_ends_with_an_example(command):
    lines = shown(*command).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    head, _, examples = shown(*command).partition("\nExample")
    for example in re.split(r"\n  (?=python)", examples.replace("\\\n", " "))[1:]:
        assert example.startswith("python -m launch." + " ".join(command))
        assert "\n" not in example.rstrip()
        for name in re.findall(r"--(\w+)(?==| |$)", example):
            assert f"--{name}" in head or name == "help"
        for file in re.findall("--config=([^ :]*)", example):
            assert (ROOT / file).is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_flag_with_its_default(command):
    pages = [shown(*c) for c in ([command], *SUBCOMMANDS) if c[0] == command]
    code = f"""
import json, launch.{command}
from absl import flags
mine = flags.FLAGS.get_key_flags_for_module("launch.{command}")
print(json.dumps({{flag.name: flag.default for flag in mine}}))"""
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    defaults = json.loads(listed.stdout)
    assert defaults
    for name, default in defaults.items():
        entry = re.search(rf"\n  --{name}[ =].*?(?=\n  --|\n\n)", "\n".join(pages), re.DOTALL)[0]
        given = ",".join(default) if isinstance(default, list) else str(default)
        told = " ".join(entry.split())
        assert f"Default: {given}." in told if default else "Default" not in told


def test_a_value_that_cannot_be_meant(tmp_path):
    done = launch("train", *DIGITS, f"--workdir={tmp_path / 'w'}", "--config.data.name=digitz")
    assert_fails_on_one_line(done, 2, "digitz")
    assert not (tmp_path / "w").exists()


def test_a_dry_run_shows_all_and_writes_nothing(tmp_path):
    workdir = tmp_path / "w"
    done = launch("train", "--config=configs/mnist_bn.py", f"--workdir={workdir}", "--dry_run")
    assert done.returncode == 0, done.stderr
    names = [line.split()[3] for line in done.stderr.splitlines()]
    assert names == ["config", "data", "devices", "workdir"]
    for part in (
        "100,010",
        "learning rate 0.1",
        "epochs of 60,000",
        "one step of 60",
        "Nothing was",
    ):
        assert part in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def unfiltered():
    yield
    absl_logging.get_absl_logger().removeFilter(cli._is_ours)


@pytest.mark.parametrize(
    "error, status",
    [
        (UsageError("no"), 2),
        (TrainingDivergedError("no", 7), 3),
        (WorkerLostError("no"), 5),
        (TrainingStoppedError("no", signal.SIGTERM), 143),
        (TrainingStoppedError("no", signal.SIGINT), 130),
        (tf.errors.ResourceExhaustedError(None, None, "no"), 2),
        (tf.errors.FailedPreconditionError(None, None, "no\n gs://bucket/x"), 2),
    ],
)
def test_what_ends_a_command_has_its_status(error, status, unfiltered):
    def main():
        raise error

    with pytest.raises(CommandError, match="no") as raised:
        with cli._bn_keras_errors():
            main()
    assert raised.value.status == status


def test_a_bug_keeps_its_traceback(unfiltered):
    def main():
        raise tf.errors.FailedPreconditionError(None, None, "no")

    with pytest.raises(tf.errors.FailedPreconditionError):
        with cli._bn_keras_errors():
            main()


def test_a_reader_that_has_had_enough():
    code = "from launch import cli; cli.Command('__main__', lambda: print('x' * 100_000), needs_tensorflow=False).run()"
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.wait() == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


def test_only_our_own_warnings_are_shown(unfiltered, caplog):
    with cli._bn_keras_errors():
        pass
    logger = absl_logging.get_absl_logger()
    for folder in (ROOT / "bn_keras", ROOT / "launch", pathlib.Path(tf.__file__).parent):
        for level in (logging.INFO, logging.WARNING, logging.ERROR):
            arguments = ("absl", level, str(folder / "x.py"), 1, f"{folder.name} {level}", (), None)
            logger.handle(logging.LogRecord(*arguments))
    ours = [f"{name} {level}" for name in ("bn_keras", "launch") for level in (20, 30, 40)]
    assert caplog.messages == [*ours, "tensorflow 40"]


def test_a_list_with_a_value_that_cannot_be_meant(tmp_path):
    done = launch("search", *DIGITS, f"--workdir={tmp_path / 'w'}", "--base_rates=0.1,high")
    assert_fails_on_one_line(done, 2, "--base_rates takes values of type float, not 'high'")


def test_divergence_has_its_own_status(tmp_path):
    done = launch(
        "train",
        *DIGITS,
        f"--workdir={tmp_path}",
        "--config.model.variant=baseline",
        "--config.schedule.base_rate=1e38",
    )
    assert_fails_on_one_line(done, 3, "not finite at step", "learning rate 1e+38")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run, and what its command said. Its moving statistics lag behind."""
    workdir = tmp_path_factory.mktemp("runs") / "a run"
    short = ("--config.train.steps=60", "--config.batch_norm.momentum=0.999")
    return workdir, launch("train", *DIGITS, *short, f"--workdir={workdir}")


def test_a_training_says_first_what_it_does_and_last_where_all_is(trained):
    workdir, done = trained
    assert done.returncode == 0 and not done.stdout, done.stderr
    lines = [line.split(maxsplit=3)[3] for line in done.stderr.splitlines()]
    names = [line.split()[0] for line in lines]
    assert names[:4] == ["config", "data", "devices", "workdir"]
    assert lines[0].endswith(", train.steps=60, batch_norm.momentum=0.999")
    assert lines[3] == f"workdir   {workdir}: new, to step 60"
    assert names[-3:] == ["run", "look", "next"]
    assert lines[-3] == f"run       {workdir}: metrics.jsonl, checkpoints, best"
    assert lines[-1] == f"next      python -m launch.evaluate '--workdir={workdir}'"


def test_an_evaluation_is_a_line_of_json(trained):
    workdir, _ = trained
    done = launch("evaluate", f"--workdir={workdir}", "--json")
    row = json.loads(done.stdout)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == last["step"] == 60
    assert row["accuracy"] == pytest.approx(last["validation/accuracy"])
    assert f"config    that of {workdir}" in done.stderr


def test_a_check_up_tells_by_its_status(trained):
    workdir, _ = trained
    done = launch("check", f"--workdir={workdir}", "--batches=0")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr
    # Nothing but data shows that the statistics lag.
    done = launch("check", f"--workdir={workdir}", "--batches=5", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["has_faults"], done.stderr
    assert {f["kind"] for f in report["findings"]} == {"stale"}
    assert report["population"]["num_batches"] == 5 and report["gap"] > 0


def test_another_backend_is_one_line(tmp_path):
    done = launch("evaluate", f"--workdir={tmp_path}", KERAS_BACKEND="jax")
    assert_fails_on_one_line(done, 2, "KERAS_BACKEND is 'jax'", "KERAS_BACKEND=tensorflow")
