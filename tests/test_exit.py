"""A command that fails ends its process, whatever its threads and child processes do."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing, sys, threading, time
from launch import cli
from launch.command_error import CommandError

def go_on(name):
    print(name + " runs\\n", end="", flush=True)
    time.sleep({seconds})
    print(name + " went on\\n", end="", flush=True)

def main():
    threading.Thread(target=go_on, args=["thread"]).start()
    child = multiprocessing.get_context("fork").Process(target=go_on, args=["child"])
    child.start()
    time.sleep(0.5)
    {failure}

print("unflushed", end=" ")
cli.Command(__name__, main, needs_tensorflow=False).run()
"""


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        ("raise RuntimeError('planted')", 1, "RuntimeError: planted"),
        ("raise CommandError('refused', 3)", 3, "error: refused"),
        ("raise KeyboardInterrupt", 130, "error: interrupted"),
        ("sys.exit('by hand')", 1, "by hand"),
    ],
)
def test_a_failed_command_ends_at_once_with_its_status(failure, status, message):
    script = SCRIPT.format(failure=failure, seconds=2)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == status
    assert message in done.stderr
    # The output of both is complete only after both have ended.
    assert "unflushed " in done.stdout and "thread runs\n" in done.stdout
    assert "went on" not in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_full_disk_behind_standard_output_is_reported_on_one_line(lines):
    script = f"""
from launch import cli
cli.Command(__name__, lambda: print("text\\n" * {lines}), needs_tensorflow=False).run()
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(("status", "expected"), [(2, "2\n"), (3, "3\n"), (75, None)])
def test_the_status_of_an_error_that_would_recur_is_written_to_a_file(status, expected, tmp_path):
    script = SCRIPT.format(failure=f"raise CommandError('refused', {status})", seconds=0)
    file = tmp_path / "status"
    environment = os.environ | {"BN_KERAS_STATUS_FILE": str(file)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert done.returncode == status
    assert (file.read_text() if file.exists() else None) == expected


def test_a_command_that_succeeds_waits_for_its_threads():
    script = SCRIPT.format(failure="", seconds=1)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert "thread went on" in done.stdout and "child went on" in done.stdout
