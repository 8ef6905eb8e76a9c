"""The processes of one training on several machines, as the environment's TF_CONFIG names them."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

from absl import logging

from bn_keras.errors import UsageError

# In which the other processes have to be there: machines asked for together come minutes apart.
_SECONDS_TO_MEET = 600.0
_SECONDS_BETWEEN_TRIES = 0.2
_SECONDS_TO_ANSWER = 5.0
_JOBS = ("chief", "worker")
_EXAMPLE = (
    '{"cluster": {"worker": ["HOST1:2222", "HOST2:2222"]}, "task": {"type": "worker", "index": 0}}'
)


class Cluster(NamedTuple):
    """All workers, and which of them this process is.

    Attributes:
      addresses: HOST:PORT of each worker in their order, the chief's first.
      index: of this process among them.
    """

    addresses: tuple[str, ...]
    index: int

    @classmethod
    def from_environment(cls) -> "Cluster":
        """Reads TF_CONFIG, whose form is TensorFlow's.

        Raises:
          UsageError: it is not set, or can't be meant.
        """
        text = os.environ.get("TF_CONFIG")
        if not text:
            raise UsageError(
                "distribution.strategy is multi_worker, but TF_CONFIG is not set: give each process"
                f" its own, such as TF_CONFIG='{_EXAMPLE}'"
            )
        try:
            addresses, task = _parse(text)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UsageError(
                f"TF_CONFIG is {text!r}: it has to be JSON that names a cluster of workers, each"
                f" with HOST:PORT, and this process' task, such as {_EXAMPLE}"
            ) from None
        if len(set(addresses.values())) < len(addresses):
            raise UsageError(f"TF_CONFIG is {text!r}: two workers have the same address")
        if task not in addresses:
            accepted = ", ".join(f"{job} {index}" for job, index in addresses)
            raise UsageError(
                f"the task in TF_CONFIG is {task[0]} {task[1]}: the cluster has {accepted}"
            )
        return cls(tuple(addresses.values()), list(addresses).index(task))

    def meet(self) -> None:
        """Waits until every other worker's process listens at its address.

        This one listens too, so that TensorFlow's server takes over a port that is known to be
        free, and workers that come later find it. TensorFlow would wait too, but without saying for
        whom, and no timeout that it takes ends the chief's wait.

        Raises:
          UsageError: this worker's port is taken, or another worker didn't come.
        """
        with self._listening():
            missing = [a for i, a in enumerate(self.addresses) if i != self.index]
            deadline = time.monotonic() + _SECONDS_TO_MEET
            logging.info(
                "worker %d of %d: waits for %s", self.index, len(self.addresses), ", ".join(missing)
            )
            while missing := [address for address in missing if not _answers(address)]:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"no process listens at {', '.join(missing)} of TF_CONFIG, after"
                        f" {_SECONDS_TO_MEET:.0f} seconds: start one for each worker, and see that"
                        " the machines reach each other at these ports"
                    )
                time.sleep(_SECONDS_BETWEEN_TRIES)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        address = self.addresses[self.index]
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            server = socket.create_server(
                ("", _split(address)[1]), family=family, dualstack_ipv6=both
            )
        except OSError as error:
            raise UsageError(
                f"worker {self.index} can't listen at its address {address} of TF_CONFIG"
                f" ({error.strerror}): end what has that port, or give another one"
            ) from None
        with server:
            yield


def _parse(text: str) -> tuple[dict[tuple[str, int], str], tuple[str, int]]:
    """Gives the address of each task, and which task this is; raises what comes up if it can't."""
    given = json.loads(text)
    jobs, task = given["cluster"], given["task"]
    addresses = {
        (job, index): address for job in _JOBS for index, address in enumerate(jobs.get(job, ()))
    }
    for address in addresses.values():
        _split(address)
    if not addresses or set(jobs) - set(_JOBS):
        raise ValueError
    return addresses, (task["type"], int(task["index"]))


def _split(address: str) -> tuple[str, int]:
    """Gives host and port; raises ValueError if there aren't both."""
    host, _, port = address.rpartition(":")
    if not host or not 0 < int(port) < 2**16:
        raise ValueError
    return host.strip("[]"), int(port)


def _answers(address: str) -> bool:
    try:
        socket.create_connection(_split(address), timeout=_SECONDS_TO_ANSWER).close()
    # UnicodeError: no name of a host.
    except (OSError, UnicodeError):
        return False
    return True
