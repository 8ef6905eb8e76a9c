"""Turns a first SIGTERM or SIGINT into a request to stop after the current loop of steps."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from absl import logging

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# When Slurm preempts a job, it sends SIGTERM twice within milliseconds.
_SECONDS_OF_ONE_REQUEST = 1.0


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
      signum: number of the signal that asked for it, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    @property
    def name(self) -> str:
        """Name of the signal, such as "SIGTERM"; "" without one."""
        return "" if self.signum is None else signal.Signals(self.signum).name

    def __bool__(self) -> bool:
        return self.signum is not None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT into a request until the block ends.

    A second signal ends the process immediately, with status 128 plus its number; SIGTERM only if
    it comes more than a second after the first signal. A thread listens for signals: Python's own
    handlers run in the main thread, which may be inside a kernel for minutes.
    Signals can only be caught in the main thread; in any other, the request is never made.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    listener = threading.Thread(target=_listen, args=(receiving, request), daemon=True)
    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    before = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sending.close()
        listener.join()
        receiving.close()


def _listen(receiving: socket.socket, request: StopRequest) -> None:
    requested_at = 0.0
    while received := receiving.recv(1):
        number = received[0]
        if number not in _SIGNALS:
            continue
        if request:
            repeated = time.monotonic() - requested_at < _SECONDS_OF_ONE_REQUEST
            if number == signal.SIGTERM and repeated:
                continue
            os._exit(128 + number)
        requested_at = time.monotonic()
        request.signum = number
        logging.warning(
            "%s: stopping after this loop of steps, then saving; a second signal stops immediately",
            request.name,
        )
