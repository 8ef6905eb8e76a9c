"""Runs commands of two workers each, one pair after the other, for test_multi_worker.

The workers are forked after TensorFlow is imported, which takes longer than these runs.
TensorFlow allows a fork before its first operation.
"""

import json
import os
import signal
import socket
import sys
import time

import tensorflow as tf
from forked_command import run_and_exit

import bn_keras.training.loop  # noqa: F401  (slow, therefore imported before the forks)
from bn_keras.training.step import Trainer

SECONDS_TO_END = 200


def main():
    """Reads the arguments of `run_pair` for each pair as JSON, and writes its results."""
    pairs = json.loads(sys.argv[1])
    print(json.dumps([run_pair(**pair) for pair in pairs]))


def run_pair(command, arguments, disturbed=1, signum=0, at_step=0, spoiled_step=0):
    """Starts two workers and waits until both have ended.

    Args:
      command: name of a command.
      arguments: arguments of each worker.
      disturbed: index of the worker that `signum` and `spoiled_step` apply to.
      signum: signal to this worker, sent in the loop that begins at or before `at_step` and
        ends after it.
      at_step: step of the signal.
      spoiled_step: step at which the images of this worker are NaN.

    Returns:
      For each worker: its "status", its output ("text"), and the "seconds" from the end of the
      first worker to its own.
    """
    addresses = free_addresses(len(arguments))
    workers = {}
    for index, own_arguments in enumerate(arguments):
        task = {"type": "worker", "index": index}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.dup2(writer, sys.stdout.fileno())
            os.dup2(writer, sys.stderr.fileno())
            signal.alarm(SECONDS_TO_END)
            if index == disturbed:
                disturb(signum, at_step, spoiled_step)
            run_and_exit([command, *own_arguments])
        os.close(writer)
        workers[child] = reader
    ends = {}
    while len(ends) < len(workers):
        child, status = os.wait()
        ends[child] = (os.waitstatus_to_exitcode(status), time.monotonic())
    first = min(moment for _, moment in ends.values())
    return [
        {
            "status": ends[child][0],
            "seconds": ends[child][1] - first,
            "text": open(reader).read(),
        }
        for child, reader in workers.items()
    ]


def disturb(signum, at_step, spoiled_step):
    train, compute_gradients = Trainer.train, Trainer.compute_gradients

    def interrupted(self, batches, num_steps):
        begin = int(self.optimizer.iterations.numpy())
        if signum and begin <= at_step < begin + num_steps:
            os.kill(os.getpid(), signum)
        return train(self, batches, num_steps)

    def spoiled(self, images, labels):
        now = tf.equal(self.optimizer.iterations.value, spoiled_step - 1)
        return compute_gradients(self, tf.where(now, float("nan"), images), labels)

    Trainer.train = interrupted
    if spoiled_step:
        Trainer.compute_gradients = spoiled


def free_addresses(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


if __name__ == "__main__":
    main()
