"""A run killed at any moment and resumed equals an uninterrupted one, to the bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from bn_keras.runs.workdir import Workdir

TESTS = pathlib.Path(__file__).resolve().parent
STATUSES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}
STEPS = 240
# Seed of the order and the times of the signals.
SEED = "1"


def lines_without_times(workdir):
    lines = Workdir(workdir).read_metrics()
    return [{k: v for k, v in line.items() if k != "train/images_per_second"} for line in lines]


@pytest.mark.job
def test_a_run_killed_by_every_signal_equals_an_uninterrupted_one(tmp_path):
    """With dropout, distortions and, on two replicas, unsynchronized BN."""
    done = subprocess.run(
        [
            *(sys.executable, TESTS / "forked_trainings.py", tmp_path, SEED),
            "--config=configs/digits_bn_x5.py",
            # Building the graph takes most of a short run.
            "--config.model.modules=3a",
            "--config.model.width=0.03",
            "--config.model.dropout=0.3",
            "--config.data.distortion=0.5",
            f"--config.train.steps={STEPS}",
            "--config.train.steps_per_loop=4",
            "--config.train.global_batch_size=8",
            "--config.evaluation.every_steps=50",
            "--config.checkpoint.every_steps=10",
            "--config.distribution.strategy=mirrored",
            "--config.distribution.replicas=2",
        ],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["statuses"] == [0, *(STATUSES[s] for s in told["signals"]), 0, 0], done.stderr

    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    lines = lines_without_times(killed)
    assert lines == lines_without_times(unbroken)
    assert len(lines[-1]["variables_sha256"]) == 64
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps[-1] == STEPS and len(set(steps)) == len(steps)
    assert done.stderr.count(f"workdir   {killed}: resuming from step") == 3
    assert f"python -m launch.evaluate --workdir={killed}\n" in done.stderr

    # The best network is the same, too.
    evaluations = [line for line in lines if "validation/accuracy" in line]
    best = max(evaluations, key=lambda line: line["validation/accuracy"])
    (data,) = (killed / "best").glob("step-*.data*")
    assert data.read_bytes() == (unbroken / "best" / data.name).read_bytes()
    evaluated = json.loads((tmp_path / "best.json").read_text())
    assert evaluated["step"] == best["step"]
    assert evaluated["accuracy"] == pytest.approx(best["validation/accuracy"])
