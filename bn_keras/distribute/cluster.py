"""The workers of a multi-worker training, and how they meet at the start."""

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Iterator

from absl import logging

from bn_keras.distribute.waiting import waiting_for
from bn_keras.errors import UsageError, WorkerLostError
from bn_keras.text import first_of

# Machines that are requested together may become available minutes apart.
_MEETING_TIMEOUT_SECONDS = 600.0
_SECONDS_BETWEEN_ATTEMPTS = 0.2
_CONNECTION_TIMEOUT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """All workers, and the position of this process among them.

    Attributes:
      addresses: HOST:PORT of each worker, the chief first.
      index: position of this process in `addresses`.
      source: what describes the cluster, for messages: "TF_CONFIG", "Slurm" or "SkyPilot".
    """

    addresses: tuple[str, ...]
    index: int
    source: str = "TF_CONFIG"

    def __str__(self) -> str:
        """Returns this worker and its cluster, such as "worker 0 of 2 (TF_CONFIG: a:1, b:1)"."""
        addresses = first_of(self.addresses)
        return f"worker {self.index} of {len(self.addresses)} ({self.source}: {addresses})"

    def name(self, index: int) -> str:
        """Returns a worker's index and address, such as "worker 1 (host:2222)"."""
        return f"worker {index} ({self.addresses[index]})"

    @property
    def others(self) -> list[int]:
        """Indices of all other workers."""
        return [index for index in range(len(self.addresses)) if index != self.index]

    def describe_others(self) -> str:
        """Names the other workers, or only those that do not answer if there are any."""
        silent = [i for i in self.others if not _is_listening(self.addresses[i], 1.0)]
        names = first_of([self.name(i) for i in silent or self.others])
        return f"{names}, which cannot be reached" if silent else names

    def bypass_proxies(self) -> None:
        """Excludes the workers' hosts from the proxies that gRPC reads from the environment.

        Otherwise, with `http_proxy` set, the workers would wait for each other forever.
        """
        hosts = [split_address(address)[0] for address in self.addresses]
        # gRPC reads the first of these that is set.
        for variable in ("no_grpc_proxy", "no_proxy"):
            listed = [host for host in os.environ.get(variable, "").split(",") if host]
            if listed or variable == "no_proxy":
                os.environ[variable] = ",".join(dict.fromkeys([*listed, *hosts]))

    def meet(self) -> None:
        """Waits until every other worker listens at its address.

        Meanwhile, this worker listens at its own address. Later workers find it there, and its port
        is known to be free before TensorFlow's server uses it. TensorFlow would wait as well, but
        does not report which workers are missing, and its chief waits forever.

        Raises:
          UsageError: the port of this worker is in use.
          WorkerLostError: another worker did not start in time.
        """
        if not self.others:
            return
        missing = self.others

        def describe() -> str:
            return first_of([self.name(index) for index in missing])

        with self._listening(), waiting_for(describe):
            logging.info("%s: waiting for %s", self, describe())
            deadline = time.monotonic() + _MEETING_TIMEOUT_SECONDS
            while missing := [i for i in missing if not _is_listening(self.addresses[i])]:
                if time.monotonic() > deadline:
                    raise WorkerLostError(
                        f"{describe()} did not start within {_MEETING_TIMEOUT_SECONDS:.0f}"
                        f" seconds: start every worker of {self.source}, and check that the"
                        " machines reach each other at these ports"
                    )
                time.sleep(_SECONDS_BETWEEN_ATTEMPTS)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        address = self.addresses[self.index]
        dualstack = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dualstack else socket.AF_INET
        try:
            server = socket.create_server(
                ("", split_address(address)[1]), family=family, dualstack_ipv6=dualstack
            )
        except OSError as error:
            raise UsageError(
                f"worker {self.index} cannot listen at its address {address} of {self.source}"
                f" ({error.strerror}): stop the process that uses this port, or set another port"
            ) from None
        with server:
            yield


def split_address(address: str) -> tuple[str, int]:
    """Returns the host, without brackets, and the port of an address.

    Raises:
      ValueError: the host or the port is missing or invalid.
    """
    host, _, port = address.rpartition(":")
    if not host or not 0 < int(port) < 2**16:
        raise ValueError("expected HOST:PORT")
    return host.strip("[]"), int(port)


def _is_listening(address: str, timeout_seconds: float = _CONNECTION_TIMEOUT_SECONDS) -> bool:
    try:
        socket.create_connection(split_address(address), timeout=timeout_seconds).close()
    except (OSError, UnicodeError):  # UnicodeError: an invalid host name
        return False
    return True
