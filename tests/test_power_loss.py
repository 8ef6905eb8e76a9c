"""A run on this machine is usable after a loss of power at any moment."""

import os
import threading

from small import small_mlp
from usable_runs import check_usable, without_times

from bn_keras.runs.workdir import Workdir
from bn_keras.training.loop import train_and_evaluate


class Disk:
    """A disk on which only what was flushed outlives a loss of power.

    The content of a file is that of its last flush. Its name may be as it is, or as it was when its
    folder was last flushed: a file system may write a new name at any time.

    Args:
      folder: folder whose files are followed.

    Attributes:
      operations: renames, flushes and removals of files, in order.
      states: contents by path after each operation, for either of the two cases.
    """

    def __init__(self, folder, monkeypatch):
        self._folder = str(folder)
        self._flushed = {}
        self._named = {}
        self._lock = threading.Lock()  # A save writes and removes files in several threads.
        self.operations = []
        self.states = []
        for name in ("fsync", "replace", "remove"):
            monkeypatch.setattr(os, name, self._follow(name, getattr(os, name)))

    def _follow(self, name, function):
        def followed(*arguments):
            paths = [
                os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else os.path.abspath(a)
                for a in arguments
            ]
            if not paths[0].startswith(self._folder):
                return function(*arguments)
            with self._lock:
                function(*arguments)
                getattr(self, f"_{name}")(*paths)
                self.operations.append((name, *(os.path.relpath(p, self._folder) for p in paths)))
                names = {path: self._flushed.get(path, b"") for path in self._paths()}
                self.states += [names, dict(self._named)]

        return followed

    def _paths(self):
        return [
            os.path.join(parent, n) for parent, _, names in os.walk(self._folder) for n in names
        ]

    def _fsync(self, path):
        if os.path.isdir(path):
            self._named = {p: c for p, c in self._named.items() if os.path.dirname(p) != path}
            for name in (p for p in self._paths() if os.path.dirname(p) == path):
                self._named[name] = self._flushed.get(name, b"")
            return
        with open(path, "rb") as file:
            self._flushed[path] = file.read()
        if path in self._named:
            self._named[path] = self._flushed[path]

    def _replace(self, source, target):
        self._flushed[target] = self._flushed.pop(source, b"")

    def _remove(self, path):
        self._flushed.pop(path, None)


def test_every_state_of_a_disk_is_usable(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(run, patch)
        train_and_evaluate(small_mlp(), run)
    expected = without_times(Workdir(run).read_metrics())
    steps = []
    for number, contents in enumerate(disk.states):
        copied = tmp_path / str(number)
        copied.mkdir()
        for path, content in contents.items():
            place = copied / os.path.relpath(path, run)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        steps.append(check_usable(copied, expected))
    # Once saved, a step is never lost, whether or not the latest names were written.
    for case in (steps[::2], steps[1::2]):
        assert case == sorted(case)
        assert {latest for latest, _ in case} == {0, 25, 50, 60}
        assert {best for _, best in case} == {0, 20, 40, 60}


def test_a_save_flushes_renames_and_removes_in_this_order(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(run, patch)
        train_and_evaluate(small_mlp(**{"evaluation.every_steps": 60}), run)
    data, index = "step-50.data-00000-of-00001", "step-50.index"
    moves = [
        operation
        for name in (data, index)
        for operation in (
            ("fsync", f"checkpoints/unfinished/{name}"),
            ("replace", f"checkpoints/unfinished/{name}", f"checkpoints/{name}"),
            ("fsync", "checkpoints"),
        )
    ]
    begin = disk.operations.index(moves[0])
    assert disk.operations[begin - 1] == ("fsync", "metrics.jsonl")
    assert disk.operations[begin : begin + len(moves)] == moves
    removed = [operation for operation in disk.operations if operation[0] == "remove"]
    assert [os.path.basename(path) for _, path in removed] == [
        "step-0.index",
        "step-0.data-00000-of-00001",
    ]
    last_index = ("replace", "checkpoints/unfinished/step-60.index", "checkpoints/step-60.index")
    assert disk.operations.index(last_index) < disk.operations.index(removed[0])
