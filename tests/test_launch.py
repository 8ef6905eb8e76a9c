"""The commands as a user runs them, mostly in separate processes."""

import functools
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
import tensorflow as tf
from absl import logging as absl_logging
from commands import ROOT, launch
from parse_commands import parse_all

from bn_keras.errors import (
    BucketUnavailableError,
    StorageError,
    TrainingDivergedError,
    TrainingStoppedError,
    UsageError,
    WorkerLostError,
)
from bn_keras.training.config_files import config_names, load_config
from launch import cli
from launch.command_error import CommandError
from launch.config_flag import ConfigFlag, split_overrides
from launch.main import COMMANDS
from launch.training_command import locate_config

DIGITS = (
    "--config=mnist_bn",
    "--config.data.name=digits",
    "--config.data.validation_split=validation",
    "--config.evaluation.global_batch_size=100",
)


# `python -m launch.main` is `bn-keras`.
bn_keras = functools.partial(launch, "main")


def assert_fails_on_one_line(done, status, *parts):
    assert done.returncode == status, done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("I")]
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in errors[0]


# Flags.

# Arguments of `train`, and a part of the error.
FLAG_ERRORS = [
    ([], " is missing: see --help"),
    (["--workdir=w"], "--config is missing: see --help"),
    (["--config=bn_x5"], "--workdir is missing: see --help"),
    (["--config=bn_x5", "--workdir="], "--workdir is empty: see --help"),
    (["--config=bn_x5", "--wrkdir=w"], "unknown flag --wrkdir (did you mean '--workdir'?)"),
    (
        ["--config=bn_x5", "--workdir=w", "more"],
        "unexpected argument 'more': flags are written as --flag=value",
    ),
    (
        ["--config=bn_x5", "--workdir=w", "--dry_run=maybe"],
        "--dry_run=maybe is invalid: expected true or false",
    ),
    (
        ["--config=bn_x5", "--workdir=w", "--profile_steps=x"],
        "--profile_steps=x is invalid: expected a non-negative integer",
    ),
    (
        ["--config=bn_x5", "--workdir=w", "--profile_steps=-1"],
        "--profile_steps=-1 is invalid: expected a non-negative integer",
    ),
    (["--config=bn_x5", "--config=bn_x30", "--workdir=w"], "--config is repeated"),
    (["--config=bn_x5", "--workdir"], "--workdir has no value: expected --workdir=VALUE"),
]
CONFIG_ERRORS = [
    (["--config=configs/nope.py"], "no config 'configs/nope.py': expected a name, a Python file"),
    (["--config=mnst_bn"], "no config 'mnst_bn' (did you mean 'mnist_bn'?)"),
    (["--config=nonsense"], f"; the names are {', '.join(config_names())}\n"),
    (["--config=bn_keras/errors.py"], "'bn_keras/errors.py' has no function get_config()"),
    (["--config=runs/none/config.json"], "runs/none"),
    (["--config=runs/none/other.json"], "no config 'runs/none/other.json'"),
    (["--config=elsewhere/configs/bn_x5.py"], "no config 'elsewhere/configs/bn_x5.py'"),
    (["--config=bn_x5:3"], "config 'bn_x5' does not accept the argument '3'"),
    (["--config=bn_x30_ensemble:9"], "unknown ensemble member '9'"),
    (["--config=configs/bn_x30_ensemble.py:9"], "unknown ensemble member '9'"),
    ([*DIGITS, "--config.train.stepz=3"], "unknown config key 'train.stepz': train has ema, "),
    ([*DIGITS, "--config.trian.steps=3"], "unknown config key 'trian.steps': the config has batch"),
    ([*DIGITS, "--config.train.steps.x=3"], "'train.steps.x': train.steps has no keys"),
    ([*DIGITS, "--config.train.steps=many"], "--config.train.steps=many is invalid: expected an i"),
    ([*DIGITS, "--config.train.steps=1.5"], "--config.train.steps=1.5 is invalid: expected an int"),
    ([*DIGITS, "--config.train.steps"], "--config.train.steps is invalid: expected an integer"),
    ([*DIGITS, "--config.train.l2=low"], "--config.train.l2=low is invalid: expected a number"),
    ([*DIGITS, "--config.data.mirror=maybe"], "mirror=maybe is invalid: expected true or false"),
    ([*DIGITS, "--config.record.percentiles=x"], "expected numbers separated by commas"),
    (
        [*DIGITS, "--config.model.dropout=x"],
        "model.dropout=x is invalid: expected a number or None",
    ),
    ([*DIGITS, "--config.train.l2=None"], "train.l2=None is invalid: expected a number"),
    ([*DIGITS, "--config.model.modules="], "modules= is invalid: expected values separated by com"),
    ([*DIGITS, "--config.model.modules=None"], "expected values separated by commas, or () for n"),
    ([*DIGITS, "--noconfig.train.steps"], "--noconfig.train.steps is invalid: only boolean settin"),
    ([*DIGITS, "--config.train=3"], "--config.train is a section: override one of ema, epochs"),
]


@pytest.fixture(scope="module")
def errors():
    """The errors of all arguments above; one process parses them."""
    lines = [["train", *line] for line, _ in FLAG_ERRORS]
    lines += [["train", *line, "--workdir=w"] for line, _ in CONFIG_ERRORS]
    return dict(zip(map(tuple, lines), parse_all(lines), strict=True))


@pytest.mark.parametrize(
    "line, part",
    [(line, part) for line, part in FLAG_ERRORS]
    + [([*line, "--workdir=w"], part) for line, part in CONFIG_ERRORS],
)
def test_an_invalid_flag_is_reported_on_one_line(line, part, errors):
    parsed = errors["train", *line]
    assert parsed.status == 2
    assert parsed.error.startswith("error: ") and parsed.error.count("\n") == 1
    assert part in parsed.error


@pytest.mark.parametrize("line, part", FLAG_ERRORS[1:6])
def test_a_missing_or_unknown_flag_does_not_import_tensorflow(line, part):
    code = """
import os, runpy, sys
end = os._exit
def print_and_end(status):
    print({"tensorflow", "keras", "numpy"} & set(sys.modules), flush=True)
    end(status)
os._exit = print_and_end
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)"""
    command = [sys.executable, "-c", code, *line]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_fails_on_one_line(done, 2, part)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "arguments, part",
    [
        ([*DIGITS, "--config.train.steps=many"], "--config.train.steps=many is invalid"),
        ([*DIGITS, "--config.data.name=digitz"], "digitz"),
    ],
)
def test_an_invalid_config_creates_no_workdir(arguments, part, tmp_path):
    done = bn_keras("train", *arguments, f"--workdir={tmp_path / 'w'}")
    assert_fails_on_one_line(done, 2, part)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "command, part",
    [
        ("evaluate", "holds no run: it has no config.json"),
        ("check", "unknown flag --config.seed=1: this command has no --config"),
    ],
)
def test_an_override_without_a_config_is_an_error(command, part, tmp_path):
    done = launch(command, f"--workdir={tmp_path}", "--config.seed=1")
    assert_fails_on_one_line(done, 2, part)


def test_an_invalid_value_in_a_list_is_reported_on_one_line(tmp_path):
    done = launch("search", *DIGITS, f"--workdir={tmp_path / 'w'}", "--base_rates=0.1,high")
    assert_fails_on_one_line(done, 2, "'high' in --base_rates is invalid: expected a number")


def test_a_search_says_how_long_its_runs_are(tmp_path):
    choices = ("--initializers=he_normal", "--base_rates=0.1", "--seeds=0")
    # The data has no such split, which ends the command before it trains.
    settings = ("--config.train.epochs=3", "--config.data.train_split=none")
    done = launch("search", *DIGITS, *choices, *settings, f"--workdir={tmp_path}")
    assert_fails_on_one_line(done, 2, "no split 'none'")
    assert f"runs      1 in {tmp_path}, 3 epochs each" in done.stderr


def test_a_search_checks_all_settings_before_it_trains(tmp_path):
    choices = ("--initializers=he_normal,glorot_unifrom", "--base_rates=0.1", "--seeds=0")
    done = launch("search", *DIGITS, *choices, f"--workdir={tmp_path / 'search'}")
    assert_fails_on_one_line(done, 2, "unknown model.initializer 'glorot_unifrom'")
    assert not (tmp_path / "search").exists()


# The config.


def load(source, *arguments):
    overrides, others = split_overrides(arguments)
    flag = ConfigFlag()
    flag.load(str(source), overrides)
    return flag, others


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (["--config.train.steps=5"], "train.steps", 5),
        (["--config.train.steps", "5"], "train.steps", 5),
        (["-config.train.steps=5"], "train.steps", 5),
        (["--config.train.steps=4", "--config.train.steps=5"], "train.steps", 5),
        (["--config.train.l2", "1"], "train.l2", 1.0),
        (["--config.train.l2=1e-3"], "train.l2", 1e-3),
        (["--config.data.mirror"], "data.mirror", True),
        (["--config.data.mirror=false"], "data.mirror", False),
        (["--config.data.mirror", "false"], "data.mirror", False),
        (["--noconfig.data.mirror"], "data.mirror", False),
        (["--config.data.name="], "data.name", ""),
        (["--config.data.train_split=a=b"], "data.train_split", "a=b"),
        (["--config.record.percentiles=1,2"], "record.percentiles", (1, 2)),
        (["--config.record.percentiles=(1, 2)"], "record.percentiles", (1, 2)),
        (["--config.record.percentiles=1"], "record.percentiles", (1,)),
        (["--config.model.modules=3a"], "model.modules", ("3a",)),
        (["--config.model.modules=3a,3c"], "model.modules", ("3a", "3c")),
        # The default of the next two is None.
        (["--config.model.dropout=0.1"], "model.dropout", 0.1),
        (["--config.model.per_activation_bn=true"], "model.per_activation_bn", True),
        (["--config.model.dropout=None"], "model.dropout", None),
        (["--config.model.modules=()"], "model.modules", ()),
    ],
)
def test_an_override_has_the_type_of_its_setting(arguments, key, value):
    flag, others = load("bn_x5", *arguments, "--workdir=w")
    section, name = key.split(".")
    assert flag.value[section][name] == value
    assert type(flag.value[section][name]) is type(value)
    assert dict(flag.overrides) == {key: value} and others == ["--workdir=w"]
    assert flag.value.is_locked


def test_a_boolean_override_does_not_consume_the_next_flag():
    flag, others = load("bn_x5", "--config.data.mirror", "--config.seed=3", "--workdir=w")
    assert dict(flag.overrides) == {"data.mirror": True, "seed": 3} and others == ["--workdir=w"]


def test_the_log_names_the_config_and_its_overrides():
    flag, _ = load("bn_x5", "--config.train.steps=5", "--config.seed=3")
    assert str(flag) == "bn_x5 with train.steps=5, seed=3"
    assert str(load("bn_x5")[0]) == "bn_x5" and str(ConfigFlag()) == "none"


def test_steps_replace_the_epochs_of_a_config():
    flag, _ = load("folder_bn_x5", "--config.train.steps=5")
    assert (flag.value.train.steps, flag.value.train.epochs) == (5, 0)
    assert str(flag) == "folder_bn_x5 with train.steps=5, train.epochs=0.0"
    assert load("folder_bn_x5", "--config.train.epochs=3")[0].value.train.epochs == 3
    evaluation = load("folder_bn_x5", "--config.evaluation.every_steps=7")[0].value.evaluation
    assert (evaluation.every_steps, evaluation.every_epochs) == (7, 0)
    with pytest.raises(CommandError, match="steps=5 and train.epochs=3 are both given"):
        load("folder_bn_x5", "--config.train.steps=5", "--config.train.epochs=3")


@pytest.mark.parametrize("source", ["", "config.json"])
def test_a_run_is_a_config(source, tmp_path):
    config = load_config("mnist_bn").unlock()
    config.train.steps = 7
    workdir = tmp_path / "a run"
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json())
    flag, _ = load(workdir / source)
    assert flag.value.to_dict() == config.to_dict()
    flag, _ = load(workdir / source, "--config.model.dropout=0.1", "--config.train.l2=1")
    assert (flag.value.model.dropout, flag.value.train.l2, flag.value.train.steps) == (0.1, 1.0, 7)
    with pytest.raises(CommandError, match="dropout=x is invalid: expected a number"):
        load(workdir / source, "--config.model.dropout=x")


def test_a_name_is_a_config_of_the_package_beside_a_run_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "bn_x5").mkdir()
    (tmp_path / "bn_x5" / "config.json").write_text(load_config("bn_x30").to_json())
    monkeypatch.chdir(tmp_path)
    assert load("bn_x5")[0].value.model.variant == "bn_x5"
    assert load("./bn_x5/config.json")[0].value.model.variant == "bn_x30"


@pytest.mark.parametrize(
    "source", ["bn_x5", "bn_x5.py", "configs/bn_x5", "configs/bn_x5.py", ROOT / "configs/bn_x5.py"]
)
def test_a_config_of_the_package_has_the_same_names_in_any_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(source)[0].value == load_config("bn_x5")


@pytest.mark.parametrize(
    "source, is_path",
    [
        ("mine.py", True),
        ("mine.py:3", True),
        ("runs/one", True),
        ("runs/one/config.json", True),
        # A folder without a run, a run and a file, each with the name of a config.
        ("mnist_bn", False),
        ("bn_x5", False),
        ("bn_x30", False),
        ("configs/bn_x5", False),
        ("configs/bn_x5.py", False),
        ("bn_x30_ensemble:3", False),
        ("gs://bucket/run/config.json", False),
    ],
)
def test_a_job_elsewhere_loads_the_same_config(source, is_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/one", "mnist_bn", "bn_x5", "configs/bn_x5"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("mine.py", "runs/one/config.json", "bn_x5/config.json", "bn_x30"):
        (tmp_path / file).touch()
    assert locate_config(source) == (f"{tmp_path}/{source}" if is_path else source)


def write_config(folder, body):
    file = folder / "mine.py"
    file.write_text(
        "from bn_keras.training.config import default_config\n"
        f"from ml_collections import ConfigDict\n{body}\n"
    )
    return file


def test_a_config_in_any_folder_imports_those_of_the_package(tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("bn_keras_configs"):
            monkeypatch.delitem(sys.modules, name)
    # As in a checkout that is not installed: without the finder of an editable install.
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "ditable" not in repr(f)])
    file = write_config(
        tmp_path,
        "from bn_keras_configs import bn_x5\n"
        "def get_config(steps='7'):\n"
        "    config = bn_x5.get_config()\n"
        "    config.train.steps = int(steps)\n"
        "    return config",
    )
    assert load(file)[0].value.train.steps == 7
    assert load(f"{file}:9")[0].value.train.steps == 9
    assert load(file)[0].value.model.variant == "bn_x5"


@pytest.mark.parametrize(
    "body, part",
    [
        ("x = 1", r"has no function get_config\(\)"),
        ("import nowhere", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config(:", "cannot be loaded: SyntaxError: "),
        ("int('one')", "cannot be loaded: ValueError: "),
        ("open('nowhere')", "cannot be loaded: FileNotFoundError: "),
        ("def get_config():\n  return 1 / 0", "cannot be loaded: ZeroDivisionError: "),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n"
            "  ConfigDict().data.name = 'x'",
            "cannot be loaded: AttributeError: ",
        ),
        (
            "def get_config():\n  return 3",
            r"get_config\(\) of .* returns an object of type int: expected a C",
        ),
        ("def get_config(number):\n  return 3", "needs an argument: expected .*mine.py:ARGUMENT"),
        (
            "def get_config():\n  return ConfigDict({'seed': 1})",
            "has no batch_norm.epsilon, batch_norm.momentum, .* more: expected all keys of",
        ),
        (
            "def get_config():\n  c = default_config().unlock()\n  c.train.stepz = 1\n  return c",
            "has unknown keys: train.stepz",
        ),
        (
            "def get_config():\n  c = default_config().to_dict()\n  c['train']['steps'] = 'x'\n"
            "  return ConfigDict(c)",
            "has an invalid train.steps='x': expected int",
        ),
    ],
)
def test_an_invalid_config_file_is_explained(body, part, tmp_path):
    with pytest.raises(UsageError, match=part) as raised:
        load(write_config(tmp_path, body))
    assert "mine.py" in str(raised.value) and "\n" not in str(raised.value)


# `bn-keras`, and --help.


def test_bn_keras_lists_all_commands_on_a_screen():
    listed = [bn_keras(*arguments) for arguments in (["--help"], ["-h"], ["help"])]
    for done in listed:
        assert done.returncode == 0 and not done.stderr
        assert done.stdout == listed[0].stdout
    lines = listed[0].stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert re.findall(r"^  (\w+) ", listed[0].stdout, flags=re.MULTILINE) == list(COMMANDS)
    without = bn_keras()
    assert without.returncode == 2 and not without.stdout
    assert without.stderr == listed[0].stdout + "error: COMMAND is missing: see above\n"


def test_every_command_is_listed():
    modules = [
        ".".join(file.relative_to(ROOT / "launch").with_suffix("").parts).removesuffix(".__init__")
        for file in (ROOT / "launch").rglob("*.py")
        if re.search(r"^COMMAND = ", file.read_text(), flags=re.MULTILINE)
    ]
    assert sorted(COMMANDS) == sorted(modules)


def test_help_for_a_command_is_its_help():
    assert bn_keras("help", "crops").stdout == bn_keras("crops", "--help").stdout


def test_a_mistyped_command_gets_a_suggestion():
    done = bn_keras("trian", "--help-me")
    assert_fails_on_one_line(done, 2, "unknown command 'trian' (did you mean 'train'?): see bn-ker")
    assert_fails_on_one_line(bn_keras("zzz"), 2, "unknown command 'zzz': see bn-keras --help")


def test_bn_keras_prints_its_version():
    assert re.fullmatch(r"bn_keras \d+\.\d+\.\d+\n", bn_keras("--version").stdout)


def test_the_next_command_is_shown_as_this_one_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bn-keras train", "--workdir=w"])
    assert cli.command_line("evaluate") == ["bn-keras", "evaluate"]
    monkeypatch.setattr(sys, "argv", ["/checkout/launch/train.py"])
    assert cli.command_line("evaluate") == ["python", "-m", "launch.evaluate"]


SUBCOMMANDS = [("tpu", name) for name in ("submit", "watch", "status", "logs", "delete")]


@functools.cache
def shown(*command):
    done = bn_keras(*command, "--help")
    assert done.returncode == 0 and not done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [(name,) for name in COMMANDS] + SUBCOMMANDS, ids=" ".join)
def test_help_fits_a_screen_and_ends_with_examples(command):
    lines = shown(*command).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    head, _, examples = shown(*command).partition("\nExample")
    examples = re.split(r"\n  (?=bn-keras)", examples.replace("\\\n", " "))[1:]
    assert examples
    for example in examples:
        assert example.startswith("bn-keras " + " ".join(command))
        assert "\n" not in example.rstrip()
        for name in re.findall(r"--(\w+)(?==| |$)", example):
            assert f"--{name}" in head or name == "help"
        for name in re.findall(r"--config=(\S*)", example):
            assert name in config_names()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_flag_with_its_default(command):
    pages = [shown(*c) for c in ([command], *SUBCOMMANDS) if c[0] == command]
    code = f"""
import json, launch.{command}
from absl import flags
own = flags.FLAGS.get_key_flags_for_module("launch.{command}")
print(json.dumps({{flag.name: flag.default for flag in own}}))"""
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    defaults = json.loads(listed.stdout)
    assert defaults
    for name, default in defaults.items():
        entry = re.search(rf"\n  --{name}[ =].*?(?=\n  --|\n\n)", "\n".join(pages), re.DOTALL)[0]
        expected = ",".join(default) if isinstance(default, list) else str(default)
        text = " ".join(entry.split())
        assert f"Default: {expected}." in text if default else "Default" not in text


def test_help_of_a_module_is_that_of_the_command():
    assert launch("train", "--help").stdout == shown("train")


# Errors and exit statuses.


@pytest.fixture
def unfiltered():
    yield
    absl_logging.get_absl_logger().removeFilter(cli._is_own_record)


@pytest.mark.parametrize(
    "error, status",
    [
        (UsageError("no"), 2),
        (TrainingDivergedError("no", 7), 3),
        (WorkerLostError("no"), 138),
        (TrainingStoppedError("no", signal.SIGTERM), 143),
        (TrainingStoppedError("no", signal.SIGINT), 130),
        (tf.errors.ResourceExhaustedError(None, None, "no"), 2),
        (MemoryError("no"), 2),
        (tf.errors.FailedPreconditionError(None, None, "no\n gs://bucket/x"), 2),
        (tf.errors.AbortedError(None, None, "no\n gs://bucket/x"), 75),
        (BucketUnavailableError("no"), 75),
        (StorageError("no"), 2),
    ],
)
def test_an_error_that_ends_a_command_has_its_status(error, status, unfiltered):
    with pytest.raises(CommandError, match="no") as raised:
        with cli._reported_errors():
            raise error
    assert raised.value.status == status


def test_a_bug_keeps_its_traceback(unfiltered):
    with pytest.raises(tf.errors.FailedPreconditionError):
        with cli._reported_errors():
            raise tf.errors.FailedPreconditionError(None, None, "no")


PRINTING = "cli.Command('__main__', lambda: print('x' * 100_000), needs_tensorflow=False).run()"


@pytest.mark.parametrize(
    "arguments", [["-c", f"from launch import cli; {PRINTING}"], ["-m", "launch.main", "help"]]
)
def test_a_broken_pipe_ends_a_command_silently(arguments):
    command = [sys.executable, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.wait() == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


def test_only_own_warnings_are_logged(unfiltered, caplog):
    with cli._reported_errors():
        pass
    logger = absl_logging.get_absl_logger()
    for folder in (ROOT / "bn_keras", ROOT / "launch", pathlib.Path(tf.__file__).parent):
        for level in (logging.INFO, logging.WARNING, logging.ERROR):
            arguments = ("absl", level, str(folder / "x.py"), 1, f"{folder.name} {level}", (), None)
            logger.handle(logging.LogRecord(*arguments))
    own = [f"{name} {level}" for name in ("bn_keras", "launch") for level in (20, 30, 40)]
    assert caplog.messages == [*own, "tensorflow 40"]


def test_divergence_has_its_own_status(tmp_path):
    done = launch(
        "train",
        *DIGITS,
        f"--workdir={tmp_path}",
        "--config.model.variant=baseline",
        "--config.schedule.base_rate=1e38",
    )
    assert_fails_on_one_line(done, 3, "not finite at step", "learning rate 1e+38")


def test_another_backend_is_reported_on_one_line(tmp_path):
    command = [sys.executable, "-m", "launch.evaluate", f"--workdir={tmp_path}"]
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert_fails_on_one_line(done, 2, "KERAS_BACKEND is 'jax'", "KERAS_BACKEND=tensorflow")


# A training run.


def test_a_dry_run_describes_the_training_and_writes_nothing(tmp_path):
    workdir = tmp_path / "w"
    done = bn_keras("train", "--config=mnist_bn", f"--workdir={workdir}", "--dry_run")
    assert done.returncode == 0, done.stderr
    names = [line.split()[3] for line in done.stderr.splitlines()]
    assert names == ["config", "data", "devices", "workdir"]
    for part in (
        "100,010",
        "learning rate 0.1",
        "10 classes, 60,000 training images, 10,000 validation images\n",
        "epochs of 60,000 training images, as many images as 93,750 of the paper's steps\n",
        "one step with 60",
        "Nothing was written.",
    ):
        assert part in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_and_a_check_of_resuming_are_mutually_exclusive(tmp_path):
    modes = ("--dry_run", "--verify_resume")
    done = launch("train", *DIGITS, f"--workdir={tmp_path}", *modes)
    assert_fails_on_one_line(done, 2, "--dry_run and --verify_resume are mutually exclusive")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run with stale moving statistics, and the output of its command."""
    workdir = tmp_path_factory.mktemp("runs") / "a run"
    short = ("--config.train.steps=60", "--config.batch_norm.momentum=0.999")
    return workdir, launch("train", *DIGITS, *short, f"--workdir={workdir}")


def test_a_training_logs_its_plan_and_its_results(trained):
    workdir, done = trained
    assert done.returncode == 0 and not done.stdout, done.stderr
    lines = [line.split(maxsplit=3)[3] for line in done.stderr.splitlines()]
    names = [line.split()[0] for line in lines]
    assert names[:4] == ["config", "data", "devices", "workdir"]
    assert lines[0].endswith(", train.steps=60, batch_norm.momentum=0.999")
    assert lines[3] == f"workdir   {workdir}: new, to step 60"
    assert names[-5:] == ["finished", "result", "written", "curves", "evaluate"]
    assert re.fullmatch(r"finished  step 60: validation accuracy 0\.\d+, loss \d\.\d+", lines[-5])
    best = r"best validation accuracy \d+\.\d\d% at step 60 \(112 steps of 32\)"
    assert re.fullmatch(rf"result    {best}", lines[-4])
    assert lines[-3] == f"written   {workdir}: metrics.jsonl, checkpoints, best, classes"
    assert lines[-2] == f"curves    tensorboard '--logdir={workdir}'"
    assert lines[-1] == f"evaluate  python -m launch.evaluate '--workdir={workdir}'"


def test_a_finished_run_is_not_trained_again(trained):
    workdir, _ = trained
    done = bn_keras("train", f"--config={workdir}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert f"workdir   {workdir}: finished at step 60" in done.stderr


def test_a_finished_run_whose_last_loss_is_not_finite_is_reported(trained, tmp_path):
    """NaN and infinity are null in JSON."""
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    *lines, last = (workdir / "metrics.jsonl").read_text().splitlines()
    last = json.dumps(json.loads(last) | {"validation/loss": None})
    (workdir / "metrics.jsonl").write_text("\n".join([*lines, last, ""]))
    done = launch("train", f"--config={workdir}", f"--workdir={workdir}")
    assert done.returncode == 0 and "loss not finite" in done.stderr, done.stderr


def test_an_evaluation_is_a_line_of_json(trained):
    workdir, _ = trained
    done = launch("evaluate", f"--workdir={workdir}", "--json")
    row = json.loads(done.stdout)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == last["step"] == 60
    assert row["accuracy"] == pytest.approx(last["validation/accuracy"])
    assert re.search(rf"config    .*{re.escape(str(workdir))}", done.stderr)


def test_a_check_reports_faults_by_its_status(trained):
    workdir, _ = trained
    done = launch("check", f"--workdir={workdir}", "--batches=0")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr
    # Only data reveals stale statistics.
    done = launch("check", f"--workdir={workdir}", "--batches=5", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["has_faults"], done.stderr
    assert {f["kind"] for f in report["findings"]} == {"stale"}
    assert report["population"]["num_batches"] == 5 and report["gap"] > 0
