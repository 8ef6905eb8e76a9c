"""The table of `make gpu-check`, on the CPU."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.job
ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*checks, preamble=""):
    program = f"""
import sys
sys.argv = ["gpu_check.py", *{checks!r}]
import gpu_check
{preamble}
sys.exit(gpu_check.main())"""
    folders = [str(ROOT / name) for name in ("tests/gpu", "tests", "benchmarks")]
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )


def test_the_table_has_a_row_for_each_check_and_says_what_a_cpu_cannot_show():
    done = run("training, float32", "inference of 70,000 rows", "synchronized replicas")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(
        r"^\| (.*?) \| (ok|FAILED|not shown) \| (.*?) \| [\d.]+ \|$", done.stdout, re.M
    )
    assert [(name, result) for name, result, _ in rows] == [
        ("training, float32", "ok"),
        ("inference of 70,000 rows", "ok"),
        ("synchronized replicas", "ok"),
    ]
    assert rows[2][2].startswith("2 replicas: largest relative difference")
    assert re.search(r"^- CPU: \d+ cores?, [\d.]+ GiB$", done.stdout, re.M)
    assert "There is no GPU." in done.stdout and "cannot show cuDNN's kernels" in done.stdout


def test_a_failed_check_is_in_the_table_and_in_the_status():
    """The reference's variance is doubled; with one GPU, replicas cannot be synchronized."""
    done = run(
        "training, float32",
        "synchronized replicas",
        preamble="gpu_check.reference.unbiased = lambda variance, count: 2 * variance\n"
        "gpu_check.GPUS.append(gpu_check.cpu())",
    )
    assert done.returncode == 1
    assert (
        "| training, float32 | FAILED | AssertionError: largest relative difference" in done.stdout
    )
    assert "| synchronized replicas | not shown | there is one GPU" in done.stdout
    assert "1 of 2 checks failed." in done.stdout


def test_an_unknown_check_is_an_error():
    done = run("speed")
    assert done.returncode == 2 and "error: unknown check 'speed': expected" in done.stderr
