"""The checkpoints of a run: all variables, identified by part and position in that part."""

import contextlib
import functools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath

from bn_keras import storage
from bn_keras.errors import UsageError
from bn_keras.storage import is_local, reason_of, writing

_FILE = re.compile(r"step-(\d+)\.(?:index|data-\d{5}-of-\d{5})")
# Entry of TensorFlow's own in each checkpoint.
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
# Errors of reading a damaged file: a wrong checksum, an early end, or a damaged length, which
# requests more memory than there is.
_DAMAGE_ERRORS = (tf.errors.OpError, ValueError, IndexError, MemoryError)


class Checkpoints:
    """The checkpoints of one run, named by step, in TensorFlow's format.

    Decisions:
      - Parts are saved as flat dictionaries of variables: an object-based checkpoint of a Keras
        model omits the state of its random generators (dropout's).
      - A checkpoint is written in a folder of its own, on this machine, and then moved into place.
        Its index is moved last, which commits it. Only then is an older checkpoint removed, the
        index before the data. An interrupted save leaves the earlier checkpoints intact; the next
        save removes its files.
      - A checkpoint counts only after its index lists all variables and its data has their size.
      - A checkpoint in a bucket is copied to this machine before it is read, which distinguishes
        damage from a bucket that does not answer.
      - TensorFlow stores a checksum of each tensor and each block of the index, and compares it
        when reading. Everything is read before the first variable changes.
      - The folder's contents are authoritative. The file `checkpoint` is written for
        tf.train.latest_checkpoint and never read here.
      - If replicas differ, the values of the first one are saved: merge them before.

    Args:
      folder: folder of the checkpoints; gs://... works as well.
      parts: variables by name of their part. `restore` accepts fewer parts than were saved.
      keep: how many of the latest checkpoints to keep.
      writes: False makes `save` do nothing, as for workers other than the chief.
      verify_owner: called before a save commits its checkpoint, and before it removes others;
        raises an error if another process now owns the folder.
    """

    def __init__(
        self,
        folder: epath.Path,
        parts: Mapping[str, Sequence[keras.Variable]],
        keep: int = 1,
        writes: bool = True,
        verify_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        # By position and name, not by path: paths contain numbers that Keras counts up across all
        # models of a process.
        self._parts = {
            part: {f"{i:04}.{v.name}": v for i, v in enumerate(variables)}
            for part, variables in parts.items()
        }
        self._keep = keep
        self._writes = writes
        self._verify_owner = verify_owner
        # Steps whose files do not count: damaged, or not before the step that is being saved.
        self._ignored: set[int] = set()

    @property
    def latest(self) -> str | None:
        """Path of the latest checkpoint, without file extension; None if there is none.

        Checkpoints that `restore` found to be damaged do not count.
        """
        steps = self._files().keys() - self._ignored
        return self._path(max(steps)) if steps else None

    @property
    def latest_step(self) -> int:
        """Step of the latest checkpoint; 0 if there is none."""
        return max(self._files().keys() - self._ignored, default=0)

    def save(self, step: int) -> None:
        """Saves a step, and removes old checkpoints.

        Existing checkpoints of this step and of later ones are removed as well: they are damaged,
        or the run has been rolled back.

        Raises:
          StorageError: the checkpoint cannot be written; the earlier ones are intact.
          WorkdirInUseError: see `verify_owner`.
        """
        if not self._writes:
            return
        files = self._files()
        self._ignored |= {other for other in files if other >= step}
        intact = "there is no earlier one"
        if earlier := files.keys() - self._ignored:
            intact = f"that of step {max(earlier)} is intact"
        with writing(
            f"the checkpoint of step {step} in {self._folder}",
            f"{intact}; fix the cause and start again",
        ):
            names = self._write(step)
            self._ignored.discard(step)
            files[step] = [self._folder / name for name in names]
            self._verify_owner()
            kept = set(sorted(files.keys() - self._ignored)[-self._keep :])
            storage.in_parallel(
                [
                    functools.partial(self._write_state, step),
                    *(functools.partial(_remove, files[old]) for old in files.keys() - kept),
                ]
            )
            self._ignored.clear()

    def restore(self) -> int:
        """Restores the latest checkpoint and returns its step; 0 if there is none.

        A damaged checkpoint is named in a warning, and the one before it is restored.

        Raises:
          UsageError: all checkpoints are damaged, or the latest intact one is of another network.
          StorageError: a file cannot be read.
        """
        reasons: list[str] = []
        while self.latest:
            step = self.latest_step
            path = self._path(step)
            try:
                values = self._read(step)
            except _DAMAGE_ERRORS as error:
                # Without files, it is not damaged: a run in progress has removed it meanwhile.
                if files := self._files().get(step):
                    self._ignored.add(step)
                    reason = f"{path} is damaged ({reason_of(error)})"
                    logging.warning("checkpoint %s: restoring the one before it", reason)
                    # Without an index, it is left from an interrupted save, and nothing is lost.
                    if any(file.suffix == ".index" for file in files):
                        reasons.append(reason)
                continue
            self._assign(values, path)
            return step
        if reasons:
            raise UsageError(
                f"checkpoint {', '.join(reasons)}, and there is no earlier one: restore a copy of"
                " it, or train in a new workdir"
            )
        return 0

    @property
    def _variables(self) -> dict[str, keras.Variable]:
        """The variables by their names in a checkpoint."""
        return {
            # TensorFlow doubles the dots of a name.
            f"{part}/{name.replace('.', '..')}/.ATTRIBUTES/VARIABLE_VALUE": variable
            for part, named in self._parts.items()
            for name, variable in named.items()
        }

    def _path(self, step: int) -> str:
        return os.fspath(self._folder / f"step-{step}")

    def _files(self) -> dict[int, list[epath.Path]]:
        """Returns the files of each step, the data before the index."""
        files: dict[int, list[epath.Path]] = {}
        for name in storage.list_folder(self._folder):
            if found := _FILE.fullmatch(name):
                files.setdefault(int(found[1]), []).append(self._folder / name)
        return files

    def _write(self, step: int) -> list[str]:
        """Writes a checkpoint, and returns the names of its files, the data before the index."""
        values = {
            part: {name: v.value for name, v in variables.items()}
            for part, variables in self._parts.items()
        }
        with storage.unfinished_folder(self._folder) as unfinished:
            with storage.literal_path(unfinished) as folder:
                path = os.fspath(folder / f"step-{step}")
                tf.train.Checkpoint(**values).write(path)
                self._verify(path)
            names = sorted(file.name for file in unfinished.glob("step-*.*"))
            # The index is last in sorted order.
            for name in names:
                if name.endswith(".index"):
                    self._verify_owner()
                storage.move(unfinished / name, self._folder / name)
        return names

    def _verify(self, path: str) -> None:
        """Raises OSError unless all variables are in the files just written.

        The values themselves are not read: their checksums are compared when they are restored.
        """
        reader = tf.compat.v1.train.NewCheckpointReader(path)
        # Each call converts all dtypes: 0.2 s of CPU time for every 500 variables.
        dtypes = reader.get_variable_to_dtype_map()
        saved = {
            name: (tuple(shape), dtypes[name].name)
            for name, shape in reader.get_variable_to_shape_map().items()
            if name != _OBJECT_GRAPH
        }
        folder, prefix = os.path.split(path)
        files = [os.path.join(folder, name) for name in os.listdir(folder)]
        num_bytes = sum(os.path.getsize(f) for f in files if f.startswith(f"{path}.data-"))
        expected = {key: _signature(v) for key, v in self._variables.items()}
        values_bytes = sum(
            math.prod(shape) * tf.as_dtype(dtype).size for shape, dtype in expected.values()
        )
        if saved != expected or num_bytes < values_bytes:
            raise OSError(
                f"{prefix} is incomplete: {len(saved)} of {len(expected)} variables and"
                f" {num_bytes:,} of {values_bytes:,} bytes were written"
            )

    def _write_state(self, step: int) -> None:
        text = f'model_checkpoint_path: "step-{step}"\n'
        storage.write_atomically(self._folder / "checkpoint", text)

    def _read(self, step: int) -> dict[str, np.ndarray]:
        with self._local_copy(step) as path:
            # tf.train.load_checkpoint would look for a folder of that name first.
            reader = tf.compat.v1.train.NewCheckpointReader(path)
            names = sorted(reader.get_variable_to_shape_map())
            return {name: reader.get_tensor(name) for name in names}

    @contextlib.contextmanager
    def _local_copy(self, step: int) -> Iterator[str]:
        """Yields a checkpoint's path on this machine, without file extension.

        A file that is missing is left to the reader.

        Raises:
          StorageError: a file exists, but cannot be read.
        """
        files = self._files().get(step, [])
        if is_local(self._folder):
            for file in files:
                # A missing permission is not damage.
                with storage.reading(file), contextlib.suppress(FileNotFoundError):
                    with file.open("rb") as opened:
                        opened.read(1)
            with storage.literal_path(self._folder) as folder:
                yield os.fspath(folder / f"step-{step}")
            return
        with tempfile.TemporaryDirectory(prefix="bn_keras_") as name:
            folder = epath.Path(name)
            with storage.reading(self._path(step)):
                storage.in_parallel(
                    functools.partial(storage.copy, file, folder / file.name) for file in files
                )
            yield os.fspath(folder / f"step-{step}")

    def _assign(self, values: Mapping[str, np.ndarray], path: str) -> None:
        variables = self._variables
        values = {k: v for k, v in values.items() if k.partition("/")[0] in self._parts}
        expected = {k: _signature(v) for k, v in variables.items()}
        saved = {k: (v.shape, v.dtype.name) for k, v in values.items()}
        if expected != saved:
            raise UsageError(
                f"checkpoint {path} does not fit this network: another network or another version"
                " of bn_keras wrote it"
            )
        for key, variable in variables.items():
            variable.assign(values[key])


def _signature(variable: keras.Variable) -> tuple[tuple[int, ...], str]:
    """Returns the shape and the name of the dtype of a variable."""
    return tuple(variable.shape), variable.dtype


def _remove(files: Sequence[epath.Path]) -> None:
    """Removes the files of a checkpoint, the index before the data."""
    for file in reversed(files):
        storage.remove(file)
