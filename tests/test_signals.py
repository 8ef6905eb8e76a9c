"""A first signal asks the training to stop; a second one ends the process at once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from bn_keras.training import stop_signals
from bn_keras.training.stop_signals import stop_requests

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


def wait_for(request):
    end = time.monotonic() + 10
    while not request and time.monotonic() < end:
        time.sleep(0.01)


@BOTH
def test_a_signal_is_a_request_and_the_handlers_are_restored(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with stop_requests() as request:
        assert not request
        os.kill(os.getpid(), number)
        wait_for(request)
        assert request and request.signum == number and request.name == number.name
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert signal.set_wakeup_fd(-1) == -1


def test_other_signals_are_ignored():
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(request)
            assert request.name == "SIGTERM"
    finally:
        signal.signal(signal.SIGUSR1, handler)


def test_a_thread_receives_no_requests_and_changes_no_handlers():
    found = []

    def look():
        with stop_requests() as request:
            found.extend([bool(request), signal.getsignal(signal.SIGINT)])

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [False, before]


def test_sigterm_twice_at_once_is_one_request():
    """Slurm sends it so when it preempts a job; the training must still be saved."""
    with stop_requests() as request:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(request)
        time.sleep(0.1)
        assert request.signum == signal.SIGTERM


@BOTH
def test_a_second_signal_ends_a_process_inside_a_kernel(number):
    """Python calls no handler there; a hash that takes minutes stands for the kernel."""
    program = f"""
import hashlib, importlib.util
spec = importlib.util.spec_from_file_location("signals", {stop_signals.__file__!r})
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
with signals.stop_requests() as request:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert f"{number.name}: stopping after this loop" in process.stderr.readline()
        if number == signal.SIGTERM:
            time.sleep(stop_signals._SECONDS_OF_ONE_REQUEST)
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
