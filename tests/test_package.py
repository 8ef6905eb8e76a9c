"""What importing the package says, and what it gives."""

import subprocess
import sys

import pytest

import bn_keras


def test_public_names():
    assert set(bn_keras.__all__) <= set(dir(bn_keras))
    assert {"BatchNormalization", "BNInception", "SigmoidMLP"} <= set(bn_keras.__all__)


@pytest.mark.parametrize(
    "preparation, parts",
    [
        (
            "sys.modules['tensorflow'] = None",
            ["needs TensorFlow", "bn_keras[cpu]", "bn_keras[tpu]"],
        ),
        (
            "os.environ['KERAS_BACKEND'] = 'jax'",
            ["KERAS_BACKEND is 'jax'", "KERAS_BACKEND=tensorflow"],
        ),
    ],
)
def test_without_its_backend_it_says_what_to_do(preparation, parts):
    program = f"import os, sys; {preparation}; import bn_keras"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    for part in parts:
        assert part in last
