"""What of a run is saved: all variables, each under its part and its place in there."""

import os
import re
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath

from bn_keras.errors import UsageError
from bn_keras.runs.atomic_files import move, reason_of, write_atomically, writing

_FILE = re.compile(r"step-(\d+)\.(?:index|data-\d{5}-of-\d{5})")
# What reading a damaged file raises: of a checksum, of an end that comes too early and, where a
# length is damaged, of more memory than there is.
_DAMAGE = (tf.errors.OpError, ValueError, IndexError, MemoryError)


class Checkpoints:
    """The checkpoints of one run, named by step, in TensorFlow's format.

    Decisions:
      - Parts are saved as flat dictionaries of variables, since an object-based checkpoint of a
        Keras model leaves out the state of its random generators (dropout's).
      - A checkpoint is written in a folder of its own. Then it takes its place: the index last,
        without which it is none, and before an older one goes. Whatever ends a save leaves the
        earlier ones, and what is left of it goes with the next save.
      - TensorFlow has a checksum of each tensor and of each block of the index, and looks at it on
        reading. So all is read before the first variable changes.
      - What lies in the folder is what there is. The file `checkpoint` is there for
        tf.train.latest_checkpoint, and is not read here.
      - Of replicas that differ the first one's values are saved: have them agree before.

    Args:
      folder: where they lie; gs://... works as well.
      parts: variables by the name of their part. Whoever reads may ask for fewer parts.
      keep: how many of the latest stay.
      writes: False makes `save` do nothing, which is for workers other than the chief.
    """

    def __init__(
        self,
        folder: epath.Path,
        parts: Mapping[str, Sequence[keras.Variable]],
        keep: int = 1,
        writes: bool = True,
    ) -> None:
        self._folder = folder
        # Not by path: Keras counts its names up over all models of one process.
        self._parts = {
            part: {f"{i:04}.{v.name}": v for i, v in enumerate(variables)}
            for part, variables in parts.items()
        }
        self._keep = keep
        self._writes = writes
        self._damaged: set[int] = set()

    @property
    def latest(self) -> str | None:
        """Path of the latest one, without its endings; None where there is none.

        One that was found to be damaged is none.
        """
        steps = self._files().keys() - self._damaged
        return self._path(max(steps)) if steps else None

    @property
    def latest_step(self) -> int:
        """Step of the latest one; 0 where there is none."""
        return max(self._files().keys() - self._damaged, default=0)

    def save(self, step: int) -> None:
        """Saves a step, in the place of what there may be of it and of later ones.

        Those are damaged, or of a course that the run has gone back from.

        Raises:
          UsageError: it can't be written; the earlier ones are as they were.
        """
        if not self._writes:
            return
        self._damaged |= {other for other in self._files() if other >= step}
        intact = f"that of step {self.latest_step} is intact" if self.latest else "it is the first"
        with writing(
            f"the checkpoint of step {step} in {self._folder}",
            f"{intact}; mend that and start again",
        ):
            self._write(step)
            self._damaged.discard(step)
            self._remove_old()

    def restore(self) -> int:
        """Reads the latest one, if there is one, and gives its step, else 0.

        One that is damaged is named in a warning, and the one before it is read.

        Raises:
          UsageError: all of them are damaged, or the latest that isn't is of another network.
        """
        reasons = []
        while self.latest:
            step = self.latest_step
            path = self._path(step)
            try:
                values = self._read(step)
            except _DAMAGE as error:
                # A training that goes on meanwhile may have removed it.
                if files := self._files().get(step):
                    self._damaged.add(step)
                    reason = f"{path} is damaged ({reason_of(error)})"
                    logging.warning("checkpoint %s: the one before it is used", reason)
                    # Without an index it may be the first, of a save that was ended: none is lost.
                    if any(file.suffix == ".index" for file in files):
                        reasons.append(reason)
                continue
            self._assign(values, path)
            return step
        if reasons:
            raise UsageError(
                f"checkpoint {', '.join(reasons)}, and there is no earlier one: put a copy of it"
                " back, or train in a new workdir"
            )
        return 0

    def _path(self, step: int) -> str:
        return os.fspath(self._folder / f"step-{step}")

    def _files(self) -> dict[int, list[epath.Path]]:
        """Gives the files of each step, the data first."""
        files = {}
        for file in sorted(self._folder.iterdir()) if self._folder.exists() else ():
            if name := _FILE.fullmatch(file.name):
                files.setdefault(int(name[1]), []).append(file)
        return files

    def _write(self, step: int) -> None:
        unfinished = self._folder / "unfinished"
        unfinished.rmtree(missing_ok=True)
        unfinished.mkdir(parents=True)
        values = {
            part: {name: v.value for name, v in variables.items()}
            for part, variables in self._parts.items()
        }
        try:
            tf.train.Checkpoint(**values).write(os.fspath(unfinished / f"step-{step}"))
            # The data before the index.
            for file in sorted(unfinished.glob("step-*.*")):
                move(file, self._folder / file.name)
        finally:
            unfinished.rmtree(missing_ok=True)
        write_atomically(self._folder / "checkpoint", f'model_checkpoint_path: "step-{step}"\n')

    def _remove_old(self) -> None:
        files = self._files()
        kept = sorted(files.keys() - self._damaged)[-self._keep :]
        for step in files.keys() - set(kept):
            # The index before the data.
            for file in reversed(files[step]):
                file.unlink()
            self._damaged.discard(step)

    def _read(self, step: int) -> dict[str, np.ndarray]:
        for file in self._files().get(step, ()):
            # That it may not be read is no damage; that it is gone shows below.
            try:
                with file.open("rb") as opened:
                    opened.read(1)
            except (FileNotFoundError, tf.errors.NotFoundError):
                continue
            except (OSError, tf.errors.OpError) as error:
                raise UsageError(f"{file} can't be read: {reason_of(error)}") from None
        # tf.train.load_checkpoint would look for a folder of that name first.
        reader = tf.compat.v1.train.NewCheckpointReader(self._path(step))
        return {key: reader.get_tensor(key) for key in sorted(reader.get_variable_to_shape_map())}

    def _assign(self, values: Mapping[str, np.ndarray], path: str) -> None:
        variables = {
            # TensorFlow doubles the dots of a name.
            f"{part}/{name.replace('.', '..')}/.ATTRIBUTES/VARIABLE_VALUE": variable
            for part, named in self._parts.items()
            for name, variable in named.items()
        }
        values = {k: v for k, v in values.items() if k.partition("/")[0] in self._parts}
        ours = {k: (tuple(v.shape), v.dtype) for k, v in variables.items()}
        theirs = {k: (v.shape, v.dtype.name) for k, v in values.items()}
        if ours != theirs:
            raise UsageError(
                f"checkpoint {path} does not fit this network: it was written by another network"
                " or another version of bn_keras"
            )
        for key, variable in variables.items():
            variable.assign(values[key])
