"""The experiments consist of the paper's runs, and one command trains and reports them."""

import itertools
import json
import pathlib
import subprocess
import sys

import pytest
from commands import launch

from bn_keras.experiments.paper import (
    EXPERIMENTS,
    SCALES,
    Trial,
    estimate_core_hours,
    get_trials,
)
from bn_keras.text import format_duration
from bn_keras.training.config import check_config
from configs import bn_x30, cifar10_inception, inception, mnist_bn


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_has_a_valid_config_of_its_own(scale):
    runs = get_trials(EXPERIMENTS, scale, seeds=2)
    for trial, config in runs.items():
        check_config(config)
        assert config.seed == trial.seed
    folders = {str(trial).lower() for trial in runs}
    assert len(folders) == len(runs)
    # No network is trained twice under two titles.
    same = [
        (a, b) for (a, one), (b, other) in itertools.combinations(runs.items(), 2) if one == other
    ]
    assert same == []


def test_the_imagenet_scale_is_the_papers():
    runs = get_trials(["figure2"], "imagenet", seeds=1)
    assert [trial.title for trial in runs] == [
        "Inception",
        "BN-Baseline",
        "BN-x5",
        "BN-x30",
        "BN-x5-Sigmoid",
    ]
    assert list(runs.values())[0] == inception.get_config()
    assert list(runs.values())[3] == bn_x30.get_config()
    for scale in ("cifar10", "imagenet"):
        figure_1 = get_trials(["figure1"], scale, seeds=3)
        assert [str(trial) for trial in figure_1][:2] == ["with BN seed 0", "without BN seed 0"]
        config = figure_1[Trial("with BN", 2)].copy_and_resolve_references()
        config.seed = 0
        assert config == mnist_bn.get_config()


def test_experiments_share_common_runs():
    five = get_trials(["figure2", "figure3"], "cifar10", seeds=3)
    assert len(five) == 15
    with_claims = get_trials(["figure2", "figure3", "claims"], "cifar10", seeds=3)
    assert with_claims.items() > five.items()
    assert five[Trial("Inception", 0)] == cifar10_inception.get_config()


def test_long_runs_are_ordered_by_seed_and_short_ones_share_their_graph():
    by_seed = [trial.seed for trial in get_trials(["figure3"], "cifar10", seeds=2)]
    assert by_seed == [0] * 5 + [1] * 5
    by_title = [trial.seed for trial in get_trials(["figure3"], "digits", seeds=2)]
    assert by_title == [0, 1] * 5


def test_core_hours_are_estimated_where_a_rate_was_measured():
    config = cifar10_inception.get_config()
    # A million images at 270 a second.
    assert estimate_core_hours(config) == pytest.approx(1.03, abs=0.01)
    assert estimate_core_hours(mnist_bn.get_config()) < 0.1
    assert estimate_core_hours(inception.get_config()) is None


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (1e-6, "1 s"),
        (14.4, "14 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
    ]
    + [(4444416, "1,234 h 34 min")],
)
def test_a_short_time_does_not_round_to_nothing(seconds, text):
    assert format_duration(seconds) == text


def test_ensemble_members_have_fixed_seeds():
    members = get_trials(["figure4"], "digits", seeds=5)
    assert [trial.seed for trial in members] == [1, 2, 3, 4, 5, 6]


def test_the_statistical_batch_sizes_are_compared_after_5_epochs_of_cifar10():
    configs = get_trials(["batch_size"], "cifar10", seeds=3).values()
    full = cifar10_inception.get_config()
    for config in configs:
        assert config.train.steps * config.train.global_batch_size == pytest.approx(250e3, rel=1e-3)
        assert config.schedule.decay_epochs == pytest.approx(full.schedule.decay_epochs / 4 / 6)
    assert len(configs) == 5


def test_the_command_lists_all_scales_without_importing_the_package():
    code = """
import json, sys
from absl import flags
import launch.reproduce
scales = flags.FLAGS["scale"].parser.enum_values
print(json.dumps([scales, "bn_keras" in sys.modules, "tensorflow" in sys.modules]))"""
    root = pathlib.Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert json.loads(done.stdout) == [list(SCALES), False, False], done.stderr


def reproduce(workdir, *arguments):
    return launch("reproduce", *arguments, "--scale=digits", "--steps=20", f"--workdir={workdir}")


def test_a_dry_run_only_lists_the_runs(tmp_path):
    done = reproduce(tmp_path / "runs", "figure1", "claims", "--dry_run")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()[1:3], done.stdout.splitlines()[-1]
    assert [line.split(" seed")[0] for line in first] == ["with BN", "without BN"]
    # An estimate for each, and their total.
    num_runs = len(get_trials(["figure1", "claims"], "digits", 1))
    assert len(done.stdout.splitlines()) == num_runs + 1 and last.split("  ")[-1] in done.stderr
    assert f"{num_runs} runs in" in done.stderr and not any(tmp_path.iterdir())


def test_the_runs_that_have_ended_are_reported(tmp_path):
    workdir = tmp_path / "runs"
    for arguments, expected in (
        (["--report_only"], f"no run in {workdir} has ended"),
        (["--report_only", "--dry_run"], "--dry_run and --report_only are mutually exclusive"),
    ):
        refused = reproduce(workdir, "figure1", *arguments)
        assert refused.returncode == 2 and expected in refused.stderr.splitlines()[-1]
        assert not any(tmp_path.iterdir())
    trained = reproduce(workdir, "figure1", "--parallel=1")
    assert trained.returncode == 0, trained.stderr
    report = workdir / "report.md"
    assert "## Figure 1" in report.read_text()
    report.unlink()
    # figure3 has no finished run, and claims says so of each claim.
    again = reproduce(workdir, "figure1", "figure3", "claims", "--report_only")
    assert again.returncode == 0, again.stderr
    assert "left out: figure3: " in again.stderr and "reporting 2 of " in again.stderr
    text = report.read_text()
    assert "## Figure 1" in text and "## Figure 3" not in text and "with BN (seed 0)" in text
