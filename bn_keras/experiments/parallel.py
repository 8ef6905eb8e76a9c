"""Several trainings at a time, each in a process and on devices of its own."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import NamedTuple

import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras.errors import TrainingStoppedError
from bn_keras.runs import environment
from bn_keras.training.stop_signals import stop_requests

_SECONDS_BETWEEN_LOOKS = 0.5


class Share(NamedTuple):
    """The part of this machine that one of several trainings has.

    Attributes:
      cores: numbers of the CPU's.
      accelerators: numbers of the GPUs.
    """

    cores: tuple[int, ...]
    accelerators: tuple[int, ...]

    def take(self) -> None:
        """Keeps this process, in which TensorFlow has not done anything yet, to the share."""
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)
        gpus = tf.config.list_physical_devices("GPU")
        tf.config.set_visible_devices([gpus[i] for i in self.accelerators], "GPU")


class Task(NamedTuple):
    """What a process of its own does.

    Attributes:
      label: what messages call it.
      function: importable by its name, since a new process imports it; gets the arguments.
      arguments: that can be pickled.
    """

    label: str
    function: Callable[..., None]
    arguments: tuple


def shares(configs: Sequence[ConfigDict], limit: int = 0) -> list[Share]:
    """Divides the machine among trainings, which all have devices enough where there are several.

    A replica takes one accelerator or, where there are none, one core. The cores are divided in
    any case, since input takes them.

    Args:
      configs: of the trainings that are due.
      limit: of how many go on at a time; 0 is none.

    Returns:
      As many shares as trainings go side by side; a single one has everything.
    """
    cores = environment.cores()
    accelerators = list(range(len(tf.config.list_physical_devices("GPU"))))
    devices = accelerators or cores
    needed = max((_devices_needed(config, len(accelerators)) for config in configs), default=1)
    count = min(len(devices) // needed, len(cores), len(configs), limit or len(configs))
    count = max(1, count)
    return [Share(_part(cores, i, count), _part(accelerators, i, count)) for i in range(count)]


def run_side_by_side(tasks: Sequence[Task], parts: Sequence[Share]) -> None:
    """Runs tasks in processes, as many at a time as there are shares.

    SIGTERM and SIGINT go on to the processes once, which end as they see fit; no further task is
    begun. If this process ends in any other way, they get SIGTERM.

    Raises:
      TrainingStoppedError: a signal came.
      Exception: what a task raised; the others have been stopped by SIGTERM before.
    """
    # A forked process can't use what this one's TensorFlow has begun.
    context = multiprocessing.get_context("spawn")
    waiting, free = deque(tasks), deque(parts)
    running: dict[connection.Connection, tuple[Task, Share, multiprocessing.Process]] = {}
    error = None
    with stop_requests() as stop_request:
        while running or (waiting and not error and not stop_request):
            while waiting and free and not error and not stop_request:
                task, share = waiting.popleft(), free.popleft()
                results, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(task, share, sender))
                process.start()
                # The process has the only end that is left, so that its own end shows here.
                sender.close()
                running[results] = (task, share, process)
            for results in connection.wait(list(running), _SECONDS_BETWEEN_LOOKS):
                task, share, process = running.pop(results)
                raised = _result(results, task)
                process.join()
                free.append(share)
                if raised and not error:
                    error = raised
                    _stop(process for _, _, process in running.values())
            if stop_request and not error:
                error = TrainingStoppedError(
                    f"stopped by {stop_request.name}, and what was going on is saved: the same"
                    " command goes on from there",
                    stop_request.signum,
                )
                _stop(process for _, _, process in running.values())
    if error:
        raise error


def _work(task: Task, share: Share, results: connection.Connection) -> None:
    """What a process does: the task, whose error it sends back, or None."""
    # Of a group of its own, so that Ctrl-C comes from the one that began it, and once.
    with contextlib.suppress(AttributeError, PermissionError):
        os.setpgid(0, 0)
    threading.Thread(target=_follow_parent, daemon=True).start()
    share.take()
    raised = None
    try:
        task.function(*task.arguments)
    except (Exception, KeyboardInterrupt) as error:
        # A traceback doesn't go through the pipe.
        error.add_note(traceback.format_exc())
        raised = error
    results.send(raised)


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _result(results: connection.Connection, task: Task) -> BaseException | None:
    try:
        return results.recv()
    except EOFError:
        return RuntimeError(f"the process of {task.label} has ended without a result")


def _stop(processes: Sequence[multiprocessing.Process]) -> None:
    for process in processes:
        process.terminate()


def _devices_needed(config: ConfigDict, num_accelerators: int) -> int:
    strategy, replicas = config.distribution.strategy, config.distribution.replicas
    if strategy == "one_device":
        return 1
    if strategy == "mirrored":
        return replicas or num_accelerators or 1
    # Of a TPU, and of several machines, there is nothing to divide.
    return max(num_accelerators, os.cpu_count() or 1)


def _part(whole: Sequence[int], index: int, count: int) -> tuple[int, ...]:
    size = len(whole) // count
    return tuple(whole[index * size : (index + 1) * size])
