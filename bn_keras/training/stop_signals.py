"""A request to stop, by SIGTERM or SIGINT, that waits until it suits; a second one doesn't."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

from absl import logging

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
      signum: number of the signal that asked for it, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    @property
    def name(self) -> str:
        """Of the signal."""
        return signal.Signals(self.signum).name

    def __bool__(self) -> bool:
        return self.signum is not None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Takes SIGTERM and SIGINT for requests, until the block ends.

    A second signal ends the process at once, with 128 plus its number as the status. Python's own
    handlers wouldn't: they wait for the main thread, which may be in a kernel for minutes. So a
    thread listens. Outside of the main thread signals can't be caught, and no request ever comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    ours, kernels = socket.socketpair()
    kernels.setblocking(False)
    listener = threading.Thread(target=_listen, args=(ours, request), daemon=True)
    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    before = signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        kernels.close()
        listener.join()
        ours.close()


def _listen(signals: socket.socket, request: StopRequest) -> None:
    while received := signals.recv(1):
        number = received[0]
        if number not in _SIGNALS:
            continue
        if request:
            os._exit(128 + number)
        request.signum = number
        logging.warning(
            "%s: stops after this loop of steps and saves; a second one stops at once",
            request.name,
        )
