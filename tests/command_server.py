"""Starts commands and scripts in forked processes; see commands.py.

A forked process starts in milliseconds, because TensorFlow is already imported. TensorFlow allows a
fork before its first operation. Each line of standard input starts a command or waits for its end;
the answer is a line of JSON.
"""

import json
import os
import sys

# Slow, therefore imported before the forks.
import sklearn.datasets  # noqa: F401
from forked_command import run_and_exit

from bn_keras import report  # noqa: F401
from bn_keras.experiments import paper, run_all  # noqa: F401
from bn_keras.inference import evaluation, exporter, prediction, run_check  # noqa: F401
from bn_keras.pictures import augmented_input, crop_sheet  # noqa: F401


def start(arguments, output, environment):
    """Starts a command with its output in OUTPUT.out and OUTPUT.err; returns its process number."""
    child = os.fork()
    if child:
        return child
    for stream, ending in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{output}.{ending}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    run_and_exit(arguments)


def main():
    """Answers the lines of standard input."""
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = start(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
