"""Runs tasks in parallel, each in a process with its own share of the machine's devices."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import tensorflow as tf

from bn_keras.cores import num_usable_cores, usable_cores
from bn_keras.errors import ProcessKilledError, TrainingStoppedError
from bn_keras.training.stop_signals import stop_requests

_POLL_SECONDS = 0.5


class Share(NamedTuple):
    """Share of the machine's devices that one process uses.

    Attributes:
      cores: indices of the CPU cores.
      accelerators: indices of the GPUs.
    """

    cores: tuple[int, ...]
    accelerators: tuple[int, ...]

    def restrict_process(self) -> None:
        """Restricts this process to the share; call it before TensorFlow uses any device."""
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)
        gpus = tf.config.list_physical_devices("GPU")
        tf.config.set_visible_devices([gpus[i] for i in self.accelerators], "GPU")


class Task(NamedTuple):
    """A function call that runs in its own process.

    Attributes:
      label: name of the task in messages.
      function: function that a new process can import by name.
      arguments: picklable arguments of the function.
    """

    label: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]


def divide_machine(distributions: Sequence[tuple[str, int]], limit: int = 0) -> list[Share]:
    """Divides the machine into equal shares, each large enough for any of the runs.

    A replica needs one accelerator or, on a machine without accelerators, one core. Cores are
    divided in either case, because the input pipeline needs them.

    Args:
      distributions: strategy and replicas of each training, as in config.distribution.
      limit: maximum number of shares; 0: no limit.

    Returns:
      One share for each training that can run at the same time, at least one.
    """
    cores, num_cores = usable_cores(), num_usable_cores()
    accelerators = list(range(len(tf.config.list_physical_devices("GPU"))))
    num_devices = len(accelerators) or num_cores
    needed = max((_count_devices(*d, len(accelerators)) for d in distributions), default=1)
    num_runs = len(distributions)
    count = max(1, min(num_devices // needed, num_cores, num_runs, limit or num_runs))
    return [Share(_part(cores, i, count), _part(accelerators, i, count)) for i in range(count)]


def _count_devices(strategy: str, replicas: int, num_accelerators: int) -> int:
    """Returns how many accelerators, or cores where there are none, a run needs."""
    if strategy == "one_device":
        return 1
    if strategy == "mirrored":
        return replicas or num_accelerators or 1
    # A TPU, or a worker among several machines, needs the whole machine.
    return max(num_accelerators, os.cpu_count() or 1)


def _part(devices: Sequence[int], index: int, count: int) -> tuple[int, ...]:
    size = len(devices) // count
    return tuple(devices[index * size : (index + 1) * size])


def run_tasks(tasks: Iterable[Task], shares: Iterable[Share]) -> None:
    """Runs tasks in processes, as many at a time as there are shares.

    On the first error, SIGTERM or SIGINT, the running processes receive SIGTERM once, no further
    task starts, and the call raises once they have ended. If this process dies in any other way,
    the running processes receive SIGTERM too.

    Raises:
      TrainingStoppedError: SIGTERM or SIGINT arrived.
      ProcessKilledError: a process was killed.
      Exception: the first error of a task.
    """
    waiting, free = deque(tasks), deque(shares)
    running: dict[connection.Connection, tuple[Task, Share, BaseProcess]] = {}
    error: BaseException | None = None
    with stop_requests() as stop_request:
        while running or (waiting and not error):
            while waiting and free and not error and not stop_request:
                task, share = waiting.popleft(), free.popleft()
                results, process = _start(task, share)
                running[results] = task, share, process
            ready = connection.wait(list(running), _POLL_SECONDS)
            for results in [results for results in running if results in ready]:
                task, share, process = running.pop(results)
                raised = _receive_error(results, task, process)
                free.append(share)
                if raised and not error:
                    error = raised
                    _terminate(process for _, _, process in running.values())
            if stop_request.signum is not None and not error:
                error = TrainingStoppedError(
                    f"stopped by {stop_request.name}; unfinished runs are saved, and the same"
                    " command resumes them",
                    stop_request.signum,
                )
                _terminate(process for _, _, process in running.values())
    if error:
        raise error


def _start(task: Task, share: Share) -> tuple[connection.Connection, BaseProcess]:
    """Starts a task; returns the connection that receives its error or None, and its process."""
    # A forked process could not use the TensorFlow state that it inherits.
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_task, args=(task, share, sender))
    process.start()
    # With the sending end open only in the new process, its death closes the connection.
    sender.close()
    return results, process


def _run_task(task: Task, share: Share, results: connection.Connection) -> None:
    """Runs a task in a new process, and sends back its error or None."""
    # In its own process group, this process receives Ctrl-C only through the parent's SIGTERM.
    with contextlib.suppress(AttributeError, PermissionError):
        os.setpgid(0, 0)
    threading.Thread(target=_terminate_with_parent, daemon=True).start()
    share.restrict_process()
    raised: BaseException | None = None
    try:
        task.function(*task.arguments)
    except (Exception, KeyboardInterrupt) as error:
        # Tracebacks cannot be pickled.
        error.add_note(traceback.format_exc())
        raised = error
    results.send(raised)


def _terminate_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _receive_error(
    results: connection.Connection, task: Task, process: BaseProcess
) -> BaseException | None:
    """Returns the error of a task that has ended, or None."""
    try:
        raised = results.recv()
    except EOFError:
        process.join()
        return _describe_end(task, process.exitcode or 0)
    process.join()
    return raised


def _describe_end(task: Task, exitcode: int) -> Exception:
    """Returns the error for a process that has ended without a result."""
    if exitcode == -signal.SIGKILL:
        return ProcessKilledError(
            f"the process of {task.label} was killed by SIGKILL, as when memory runs out: lower the"
            " number of processes (--parallel) and repeat the command, which resumes"
        )
    return RuntimeError(f"the process of {task.label} ended without a result (status {exitcode})")


def _terminate(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
