"""Runs commands like `python -m launch.COMMAND`, but without importing TensorFlow each time."""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent


@dataclass(frozen=True)
class Result:
    """The end of a command: its exit status, output and errors."""

    status: int
    output: str
    errors: str

    @property
    def last_line(self):
        """The last line of the errors, where a command reports why it has failed."""
        return self.errors.strip().rpartition("\n")[2]


class Commands:
    """Runs commands in processes forked from one that has imported TensorFlow.

    Args:
      folder: working directory of the commands, with their output.
      environment: variables added to those of this process.
    """

    def __init__(self, folder, environment=None):
        paths = os.pathsep.join(map(os.fspath, (ROOT, TESTS)))
        self._environment = {"PYTHONPATH": paths} | (environment or {})
        self._output_folder = tempfile.TemporaryDirectory()
        self._numbers = itertools.count()
        self._outputs = {}
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "command_server.py")],
            env=os.environ | self._environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "ready\n"

    def close(self):
        """Ends the process in which the commands start."""
        self._process.communicate()
        self._output_folder.cleanup()

    def start(self, *arguments, **environment):
        """Starts a command; returns its process number."""
        output = os.path.join(self._output_folder.name, str(next(self._numbers)))
        number = self._ask(
            arguments=list(map(str, arguments)),
            output=output,
            environment=dict(os.environ) | self._environment | environment,
        )
        self._outputs[number] = output
        return number

    def wait(self, number):
        """Waits for the end of a command and returns its result."""
        status = self._ask(wait=number)
        output, errors = (
            pathlib.Path(f"{self._outputs[number]}.{ending}").read_text()
            for ending in ("out", "err")
        )
        return Result(status, output, errors)

    def run(self, *arguments, **environment):
        """Runs a command to its end and returns its result."""
        return self.wait(self.start(*arguments, **environment))

    def _ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@functools.cache
def _commands():
    return Commands(ROOT)


def launch(command, *arguments, **environment):
    """Runs a command in the checkout, with variables added to the environment of this process.

    TensorFlow's and Keras' own variables take no effect: both are imported already.
    """
    done = _commands().run(command, *arguments, **environment)
    return subprocess.CompletedProcess([command], done.status, done.output, done.errors)
