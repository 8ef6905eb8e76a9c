"""`bn-keras info` prints what an issue needs."""

import json
import pathlib
import subprocess
import sys

import keras
import tensorflow as tf

import bn_keras
from launch import TRAIN_MODULES

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_info_has_versions_devices_and_the_settings_that_differ_from_the_schema():
    done = subprocess.run(
        [sys.executable, "-m", "launch.info", "--config=mnist_bn", "--config.seed=7", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    facts = json.loads(done.stdout)
    assert facts["bn_keras"].split(",")[0] == bn_keras.__version__
    assert facts["tensorflow"].startswith(f"{tf.__version__}, from tensorflow")
    assert facts["keras"] == keras.__version__
    assert "CPU" in facts["devices"] or "GPU" in facts["devices"]
    assert facts["config"] == "mnist_bn with seed=7"
    assert facts["seed"] == "7" and facts["model.name"] == "'mlp'"
    assert "train.precision" not in facts
    assert len(facts) > len(TRAIN_MODULES)
