"""What ends a command before it has done what it was asked for."""


class CommandError(Exception):
    """The command can't go on, and this is no bug.

    The message is one line, which is all that is printed. Unlike bn_keras.errors, this is at hand
    without TensorFlow.

    Attributes:
      status: that the command exits with; launch/cli.py has the list.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status
