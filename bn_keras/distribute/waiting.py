"""Logs long waits for other processes, and lets a signal end them."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from absl import logging

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SECONDS_TO_FIRST_REPORT = 30.0
_SECONDS_BETWEEN_REPORTS = 60.0
# Slurm and Kubernetes kill a process 30 seconds after SIGTERM by default.
_GRACE_SECONDS = 20.0
_SECONDS_BETWEEN_CHECKS = 0.2

# The operating system's handlers, beneath Python's. Python reports a signal to its listener from
# the first; these two functions of its C API read and set it from any thread.
_get_handler = ctypes.pythonapi.PyOS_getsig
_get_handler.argtypes, _get_handler.restype = (ctypes.c_int,), ctypes.c_void_p
_set_handler = ctypes.pythonapi.PyOS_setsig
_set_handler.argtypes, _set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p


@contextlib.contextmanager
def waiting_for(describe: Callable[[], str]) -> Iterator[None]:
    """Logs a long wait, and ends the process if a signal arrives and the wait does not end.

    TensorFlow waits inside its kernels, where Python's signal handlers do not run; when it connects
    workers, it also replaces the handler of SIGTERM by one that only notes the signal. As the first
    process of a container, Python ignores SIGTERM altogether. Therefore a thread listens for
    signals until the block ends, and restores the handlers that report them to it.

    SIGTERM and SIGINT end the process with status 128 plus their number: immediately if nothing
    else listens for signals, as before a run. Otherwise the listener gets the signal, and the
    process ends if the wait lasts another 20 seconds: the other processes may be gone.

    Outside the main thread, where Python cannot listen for signals, the wait is only reported.

    Args:
      describe: returns whom the process waits for, such as "worker 1 (host:2222)"; called in the
        thread, for each report.
    """
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    listens = threading.current_thread() is threading.main_thread()
    listener = -1
    if listens:
        listener = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
    handlers = {}
    if listens and listener == -1:
        handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    system_handlers = {n: _get_handler(n) for n in _SIGNALS} if listens else {}
    arguments = (receiving, listener, system_handlers, describe)
    watcher = threading.Thread(target=_watch, args=arguments, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        sending.shutdown(socket.SHUT_WR)
        watcher.join()
        if listens:
            signal.set_wakeup_fd(listener, warn_on_full_buffer=False)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sending.close()
        receiving.close()


def _watch(
    receiving: socket.socket,
    listener: int,
    system_handlers: Mapping[int, int | None],
    describe: Callable[[], str],
) -> None:
    """Reports the wait and ends the process on a signal, until the other end is closed.

    Args:
      receiving: socket that receives the numbers of signals.
      listener: file descriptor of the listener for signals outside this wait; -1 without one.
      system_handlers: the operating system's handlers to restore, by signal.
      describe: see `waiting_for`.
    """
    began = time.monotonic()
    report_at = began + _SECONDS_TO_FIRST_REPORT
    end_at, signum = float("inf"), 0
    while True:
        for number, handler in system_handlers.items():
            if _get_handler(number) != handler:
                _set_handler(number, handler)
        if select.select([receiving], [], [], _SECONDS_BETWEEN_CHECKS)[0]:
            received = receiving.recv(1)
            if not received:
                return
            if listener != -1:
                os.write(listener, received)
            if received[0] in _SIGNALS and not signum:
                signum = received[0]
                end_at = time.monotonic() + (0.0 if listener == -1 else _GRACE_SECONDS)
        now = time.monotonic()
        if now >= end_at:
            name = signal.Signals(signum).name
            logging.error("%s: ending while waiting for %s", name, describe())
            os._exit(128 + signum)
        if now >= report_at:
            logging.warning("waiting for %s, for %.0f seconds so far", describe(), now - began)
            report_at = now + _SECONDS_BETWEEN_REPORTS
