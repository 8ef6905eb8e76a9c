"""What can go wrong by the user's doing, apart from what is a bug in here."""


class UsageError(ValueError):
    """Something was asked for that can't be done.

    The message is one line: what was given, what is accepted, what to do. The launchers print
    it alone, without a traceback, and exit with status 2.
    """


class TrainingDivergedError(ArithmeticError):
    """The loss or a variable is no longer finite.

    The launchers print the message alone and exit with status 3.

    Attributes:
      step: the first step whose loss was not finite, counted from 1, or the one at which the
        network was found not to be.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple:
        # Exception's own leaves the step out when another process sends it.
        return type(self), (str(self), self.step)


class TrainingStoppedError(KeyboardInterrupt):
    """A signal stopped the training, which has been saved.

    Not an Exception, so that nothing takes it for the failure of one run among several. The
    launchers print the message alone and exit with status 128 + signum.

    Attributes:
      signum: SIGTERM or SIGINT.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.signum)


class WorkerLostError(ConnectionError):
    """Another worker of a training on several machines has ended, or can't be reached.

    The launchers print the message alone and exit with status 5.
    """
