"""Errors that the package raises on purpose. Anything else is a bug.

Each message is one line. The commands print it without a traceback and exit with `status`, which
docs/commands.md documents.
"""

from typing import Any, ClassVar


class ReportedError(Exception):
    """Base class of errors whose message is for the user, on one line.

    Attributes:
      status: exit status of a command that fails with this error.
    """

    status: ClassVar[int] = 2


class UsageError(ReportedError, ValueError):
    """An invalid argument, setting or file that the user can correct.

    The message says which value is invalid, what is accepted and what to do.
    """


class StorageError(ReportedError, OSError):
    """A file cannot be written or read: a full disk, missing permissions, a missing bucket."""


class BucketUnavailableError(StorageError):
    """A bucket does not answer, even after several minutes; the same command may succeed later."""

    # EX_TEMPFAIL of sysexits.h: jobs retry it.
    status = 75


class WorkdirInUseError(UsageError):
    """Another process trains in the workdir."""


class AgreementError(ReportedError, ArithmeticError):
    """The outputs of a converted, folded or exported network differ from the original's."""


class ResumeError(ReportedError, RuntimeError):
    """A resumed run differs from an uninterrupted one."""


class TrainingDivergedError(ReportedError, ArithmeticError):
    """The loss or a variable is no longer finite.

    Attributes:
      step: first step with a non-finite loss, counted from 1, or the step after which a variable
        was found to be non-finite.
    """

    status = 3

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception.__reduce__ would drop the step when a process sends the error to another one.
        return type(self), (str(self), self.step)


class WorkerLostError(ReportedError, ConnectionError):
    """Another worker of a multi-worker training has ended, or cannot be reached.

    Restart all workers. The status, 128 + SIGUSR1, is the one that Kubeflow's TFJob retries in all
    of its versions: tf-operator reserved it for this purpose, training-operator retries any status
    from 128 on.
    """

    status = 138


class ProcessKilledError(ReportedError, RuntimeError):
    """A process of several runs was killed, probably because memory ran out."""


class TrainingStoppedError(KeyboardInterrupt):
    """A signal stopped the training after its state was saved.

    This is not an Exception: code that handles the failure of one of several runs must not catch
    it.

    Attributes:
      signum: SIGTERM or SIGINT.
      status: exit status of a command that this error ends, 128 + signum.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
        self.status = 128 + signum

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.signum)
