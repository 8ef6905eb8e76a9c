"""The processes of a multi-worker training: the only module that reads TF_CONFIG."""

import contextlib
import dataclasses
import json
import os
import reprlib
import socket
import time
from collections.abc import Iterator

from absl import logging

from bn_keras.errors import UsageError
from bn_keras.text import first_of

# Machines that are requested together may become available minutes apart.
_MEETING_TIMEOUT_SECONDS = 600.0
_SECONDS_BETWEEN_ATTEMPTS = 0.2
_CONNECTION_TIMEOUT_SECONDS = 5.0
_JOBS = ("chief", "worker")
_EXAMPLE = (
    '{"cluster": {"worker": ["HOST1:2222", "HOST2:2222"]}, "task": {"type": "worker", "index": 0}}'
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """All workers, and the position of this process among them.

    Attributes:
      addresses: HOST:PORT of each worker, the chief first.
      index: position of this process in `addresses`.
    """

    addresses: tuple[str, ...]
    index: int

    @classmethod
    def from_environment(cls) -> "Cluster":
        """Reads TF_CONFIG, in TensorFlow's format.

        Raises:
          UsageError: TF_CONFIG is not set or invalid.
        """
        text = os.environ.get("TF_CONFIG")
        if not text:
            raise UsageError(
                "distribution.strategy is multi_worker, but TF_CONFIG is not set: set it for each"
                f" process, for example TF_CONFIG='{_EXAMPLE}'"
            )
        try:
            addresses, task = _parse(text)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UsageError(
                f"TF_CONFIG={_shortened(text)} is invalid: expected JSON with the HOST:PORT of each"
                f" worker and the task of this process, for example {_EXAMPLE}"
            ) from None
        workers = list(addresses.values())
        if repeated := [address for address in workers if workers.count(address) > 1]:
            raise UsageError(
                f"TF_CONFIG lists {repeated[0]} more than once: expected a different address for"
                " each worker"
            )
        if task not in addresses:
            expected = first_of([f"{job} {index}" for job, index in addresses])
            raise UsageError(
                f"unknown task {task[0]} {task[1]} in TF_CONFIG: expected one of {expected}"
            )
        return cls(tuple(workers), list(addresses).index(task))

    def meet(self) -> None:
        """Waits until every other worker listens at its address.

        Meanwhile, this worker listens at its own address. Later workers find it there, and its port
        is known to be free before TensorFlow's server uses it. TensorFlow would wait as well, but
        does not report which workers are missing, and its chief waits forever.

        Raises:
          UsageError: the port of this worker is in use, or another worker did not start in time.
        """
        with self._listening():
            missing = [a for i, a in enumerate(self.addresses) if i != self.index]
            logging.info(
                "worker %d of %d: waiting for %s",
                self.index,
                len(self.addresses),
                first_of(missing),
            )
            deadline = time.monotonic() + _MEETING_TIMEOUT_SECONDS
            while missing := [address for address in missing if not _is_listening(address)]:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"no process listens at {first_of(missing)} of TF_CONFIG after"
                        f" {_MEETING_TIMEOUT_SECONDS:.0f} seconds: start one process for each"
                        " worker, and check that the machines reach each other at these ports"
                    )
                time.sleep(_SECONDS_BETWEEN_ATTEMPTS)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        address = self.addresses[self.index]
        dualstack = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dualstack else socket.AF_INET
        try:
            server = socket.create_server(
                ("", _split(address)[1]), family=family, dualstack_ipv6=dualstack
            )
        except OSError as error:
            raise UsageError(
                f"worker {self.index} cannot listen at its address {address} of TF_CONFIG"
                f" ({error.strerror}): stop the process that uses this port, or set another port"
            ) from None
        with server:
            yield


def _parse(text: str) -> tuple[dict[tuple[str, int], str], tuple[str, int]]:
    """Returns the address of each task, and the task of this process.

    Raises:
      AttributeError, KeyError, TypeError, ValueError: the text is no valid TF_CONFIG.
    """
    values = json.loads(text)
    jobs, task = values["cluster"], values["task"]
    addresses = {
        (job, index): address for job in _JOBS for index, address in enumerate(jobs.get(job, ()))
    }
    for address in addresses.values():
        _split(address)
    if not addresses or set(jobs) - set(_JOBS):
        raise ValueError("expected workers only")
    return addresses, (task["type"], int(task["index"]))


def _split(address: str) -> tuple[str, int]:
    """Returns the host and the port of an address; raises ValueError if either is missing."""
    host, _, port = address.rpartition(":")
    if not host or not 0 < int(port) < 2**16:
        raise ValueError("expected HOST:PORT")
    return host.strip("[]"), int(port)


def _shortened(text: str) -> str:
    """Returns the text in quotes, with "..." in place of the middle if it is long."""
    shortened = reprlib.Repr()
    shortened.maxstring = 100
    return shortened.repr(text)


def _is_listening(address: str) -> bool:
    try:
        socket.create_connection(_split(address), timeout=_CONNECTION_TIMEOUT_SECONDS).close()
    except (OSError, UnicodeError):  # UnicodeError: an invalid host name
        return False
    return True
