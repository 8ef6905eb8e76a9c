"""Runs the commands of a run in processes that receive signals at random times; see test_resume.

The processes are forked after TensorFlow is imported, because the import takes longer than such a
training. TensorFlow allows a fork before its first operation. Signals, statuses and output are
those of any other process.
"""

import functools
import itertools
import json
import os
import random
import signal
import sys
import threading

from forked_command import run_and_exit

from bn_keras.inference import evaluation  # noqa: F401
from bn_keras.training.step import Trainer


def launch(command, *arguments, output=os.devnull, before=lambda: None):
    """Runs a command in a forked process and returns its exit status."""
    child = os.fork()
    if not child:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
        before()
        run_and_exit([command, *arguments])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def schedule_signal(number, loop, seconds):
    """Sends this process a signal some seconds after the given loop of steps begins."""
    loops = itertools.count()
    train = Trainer.train

    def train_and_send(self, *arguments):
        if next(loops) == loop:
            threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
        return train(self, *arguments)

    Trainer.train = train_and_send


def main(folder, seed, *arguments):
    random.seed(int(seed))
    signals = [signal.SIGTERM, signal.SIGKILL, signal.SIGINT]
    random.shuffle(signals)
    unbroken, killed = (f"--workdir={folder}/{name}" for name in ("unbroken", "killed"))
    statuses = [launch("train", unbroken, *arguments)]
    for number in signals:
        # The signal arrives in that loop or between it and later ones.
        send = functools.partial(
            schedule_signal, number, random.randint(1, 12), random.uniform(0, 0.02)
        )
        statuses.append(launch("train", killed, *arguments, before=send))
    statuses.append(launch("train", killed, *arguments))
    statuses.append(launch("evaluate", killed, "--best", "--json", output=f"{folder}/best.json"))
    print(json.dumps({"signals": signals, "statuses": statuses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
