"""Names the process that holds the lock of a workdir, and the error that other processes raise."""

import datetime
import os
import socket

from etils import epath

from bn_keras.errors import WorkdirInUseError

UNKNOWN_HOLDER = "another process"


def describe_holder() -> str:
    """Returns this process, its machine and the time, for the lock that it holds from now on."""
    since = datetime.datetime.now().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since}"


def in_use_error(workdir: epath.Path, holder: str) -> WorkdirInUseError:
    """Returns the error of a process that finds a workdir locked by a holder."""
    return WorkdirInUseError(
        f"workdir {workdir} is in use: {holder} is training in it; wait until it ends, stop it, or"
        " use another workdir"
    )
