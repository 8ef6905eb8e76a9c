"""The folder of a run: its config, its metrics and its checkpoints, local or in a bucket."""

import contextlib
import datetime
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import tensorflow as tf
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from bn_keras.errors import UsageError
from bn_keras.runs.atomic_files import is_local, write_atomically, writing

try:
    import fcntl
except ImportError:
    # On Windows.
    fcntl = None

# What the config of a run has at least.
_SECTIONS = ("model", "batch_norm", "data", "train")
# What may differ between two starts of one run: where the data lies doesn't change what it is.
_LOCATIONS = ("data.data_dir",)


class Workdir:
    """Opens the folder of one run, new or begun before.

    Nothing is written before `create`, so that a run that can't start leaves nothing behind.

    Args:
      path: of the folder; gs://... works as well.

    Attributes:
      writes: whether this process writes in it. Of several workers the chief alone does; what the
        others would write goes nowhere.
    """

    # Stands in the last line of a finished run's metrics: a hash over all of its variables.
    FINISHED = "variables_sha256"
    # Stands in the line of the step at which a run's loss stopped being finite.
    DIVERGED = "diverged"
    # Stands in the line of the step from which a diverged run went on with a lower rate: 1 the
    # first time, and one more each further time.
    RETRY = "retry"

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = epath.Path(path)
        self.writes = True
        self.checkpoints = self.path / "checkpoints"
        # The network as it was evaluated at the end, where that isn't how it was trained.
        self.finished = self.path / "finished"
        # The network of the evaluation with the highest accuracy, as it was evaluated.
        self.best = self.path / "best"
        self.metrics = self.path / "metrics.jsonl"
        self._config = self.path / "config.json"
        self._interface = self.path / "interface.json"
        self._environment = self.path / "environment.json"
        self._lock = _Lock(self.path / "lock")
        self._create_takes_lock = False

    def check(self, config: ConfigDict) -> None:
        """Raises UsageError if the folder holds a run of another config, or something else."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"workdir {self.path} is a file: name a folder")
        if not self._config.exists():
            return
        self.read_metrics()
        before, now = _flat(self.read_config()), _flat(config)
        missing = sorted(now.keys() - before.keys())
        if missing:
            raise _lacking(self._config, ", ".join(missing))
        differing = [
            f"{key}={before[key]!r} (now {now.get(key)!r})"
            for key in sorted(before)
            if before[key] != now.get(key) and key not in _LOCATIONS
        ]
        if differing:
            raise UsageError(
                f"workdir {self.path} holds a run of another config, with {', '.join(differing)}:"
                " give another workdir, or the same config to go on with that run"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training in the folder until the block ends.

        A run that was begun is locked from here on, a new one from `create` on: before, there is
        nothing that two could spoil. The lock is the kernel's and goes with the process, however
        that ends. In a bucket, on Windows and on file systems without locks there is none; there
        it is for the user to see that only one process trains.

        Raises:
          UsageError: another process has the lock; from `create`, it had it in the meantime.
        """
        begun = self._config.exists()
        self._create_takes_lock = self.writes and not begun
        try:
            if self.writes and begun:
                self._lock.take()
            yield
        finally:
            self._create_takes_lock = False
            self._lock.release()

    def create(
        self,
        config: ConfigDict,
        input_shape: Sequence[int],
        class_names: Sequence[str],
        num_train_examples: int = 0,
    ) -> None:
        """Makes the folder and writes into it what the run is; keeps what is there of it.

        Args:
          config: of the run.
          input_shape: (height, width, channels) of what its network is fed.
          class_names: one a logit, in their order.
          num_train_examples: by which their order goes, and the schedule.

        Raises:
          UsageError: the folder can't be written, `locked` fails, or the run was begun on other
            data.
        """
        interface = {
            "input_shape": list(input_shape),
            "class_names": list(class_names),
            "num_train_examples": num_train_examples,
        }
        contents = {self._config: config.to_dict()}
        if not self._has_same(interface):
            contents[self._interface] = interface
        if not self.writes:
            return
        with writing(f"workdir {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            if self._create_takes_lock:
                self._create_takes_lock = False
                self._lock.take()
                if self._config.exists():
                    raise UsageError(
                        f"another process has begun a run in {self.path} meanwhile: start again to"
                        " go on with it, or give another workdir"
                    )
            self.metrics.touch()
            for file, content in contents.items():
                if file == self._interface or not file.exists():
                    write_atomically(file, json.dumps(content, indent=2) + "\n")

    def _has_same(self, interface: Mapping[str, object]) -> bool:
        """Tells whether interface.json says this; False where it is missing or damaged."""
        try:
            before = json.loads(self._interface.read_text())
            differing = [key for key in interface if before[key] != interface[key]]
        except (ValueError, OSError, KeyError, TypeError):
            return False
        if differing:
            key = differing[0]
            values = f" ({before[key]}, now {interface[key]})" if key != "class_names" else ""
            raise UsageError(
                f"the run in {self.path} was begun on data with other {key}{values}: give the data"
                " that it was begun on, or a new workdir"
            )
        return True

    def read_config(self) -> ConfigDict:
        """Gives the config of the run.

        Only whoever asks for a key knows that it has to be there: if it isn't, that is when
        UsageError is raised.

        Raises:
          UsageError: there is no run in the folder, or its config can't be read.
        """
        if not self._config.exists():
            raise UsageError(f"workdir {self.path} holds no run: it has no config.json")
        try:
            config = json.loads(self._config.read_text())
        except (ValueError, OSError) as error:
            raise UsageError(f"{self._config} can't be read: {error}") from None
        sections = config if isinstance(config, dict) else {}
        lacking = [name for name in _SECTIONS if not isinstance(sections.get(name), dict)]
        if lacking:
            raise UsageError(f"{self._config} is no config: it lacks {', '.join(lacking)}")
        return _RunConfig(config, self._config).lock()

    def read_interface(self) -> tuple[tuple[int, int, int], tuple[str, ...]]:
        """Gives the input shape and the class names of the run's network, as `create` got them.

        Raises:
          UsageError: they can't be read.
        """
        try:
            interface = json.loads(self._interface.read_text())
            return tuple(interface["input_shape"]), tuple(interface["class_names"])
        except (ValueError, OSError, KeyError, TypeError):
            raise UsageError(
                f"{self._interface} is missing or damaged: start the run's training again, which"
                " writes it"
            ) from None

    @contextlib.contextmanager
    def noting_start(self, step: int, environment: Mapping[str, object]) -> Iterator[None]:
        """Notes in environment.json where this start of the run happens, and when it ends.

        Args:
          step: from which it goes on.
          environment: as `bn_keras.runs.environment.describe` gives it.
        """
        earlier = self.read_environment()
        start = {"step": step, "started": _now(), "ended": None, **environment}

        def note() -> None:
            if self.writes:
                text = json.dumps([*earlier, start], indent=2) + "\n"
                write_atomically(self._environment, text)

        with writing(f"workdir {self.path}"):
            note()
        try:
            yield
        finally:
            start["ended"] = _now()
            # Where that can't be written, the run has said so, or has lost nothing but the hour.
            with contextlib.suppress(UsageError, OSError):
                note()

    def read_environment(self) -> list[dict]:
        """Gives what the starts of the run noted, in their order; nothing where that is damaged."""
        try:
            starts = json.loads(self._environment.read_text())
        except (ValueError, OSError):
            return []
        return starts if isinstance(starts, list) else []

    def read_data_sizes(self) -> tuple[int, int]:
        """Gives the numbers of classes and of training examples; 0 where the run doesn't say."""
        try:
            interface = json.loads(self._interface.read_text())
            return len(interface["class_names"]), interface.get("num_train_examples", 0)
        except (ValueError, OSError, KeyError, TypeError, AttributeError):
            return 0, 0

    def read_metrics(self) -> list[dict]:
        """Gives the lines of metrics.jsonl in order; a last line cut short is left out."""
        if not self.metrics.exists():
            return []
        try:
            *lines, _ = self.metrics.read_text().split("\n")
        except (ValueError, OSError) as error:
            raise UsageError(f"{self.metrics} can't be read: {error}") from None
        return [self._parse(number, line) for number, line in enumerate(lines, start=1)]

    def _parse(self, number: int, line: str) -> dict:
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise UsageError(
                f"line {number} of {self.metrics} is damaged: mend or delete it, or give a new"
                " workdir"
            )
        return values

    def last_step(self) -> int:
        """Gives the step of the last line of metrics; 0 where there is none."""
        return max((line["step"] for line in self.read_metrics()), default=0)

    def is_finished(self) -> bool:
        """Tells whether the run got to its last step."""
        lines = self.read_metrics()
        return bool(lines) and self.FINISHED in lines[-1]

    def has_diverged(self) -> bool:
        """Tells whether the last that the run did was to diverge."""
        return any(self.DIVERGED in line for line in self.read_metrics()[-1:])

    def num_retries(self) -> int:
        """Gives how often the run has gone back after it diverged."""
        return max((line.get(self.RETRY, 0) for line in self.read_metrics()), default=0)

    def best_accuracy(self, step: int) -> float:
        """Gives the highest validation accuracy up to a step; 0 where there was no evaluation."""
        lines = [line for line in self.read_metrics() if line["step"] <= step]
        return max((line.get("validation/accuracy", 0.0) for line in lines), default=0.0)

    def evaluations(self, step: int) -> list[dict]:
        """Gives the lines of the evaluations at a step, of which there may be two at the last."""
        return [
            line
            for line in self.read_metrics()
            if line["step"] == step and "validation/accuracy" in line
        ]

    def drop_metrics_after(self, step: int) -> None:
        """Keeps only the lines of metrics.jsonl up to a step, where a resumed run goes on."""
        if self.writes and self.metrics.exists():
            kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
            with writing(f"{self.metrics}", "it is as it was"):
                write_atomically(self.metrics, "".join(kept))


class _RunConfig(ConfigDict):
    """A config from a file, which may be older than some of the keys that are asked for.

    Args:
      values: by key; a dict is a section.
      file: that they are from; None makes a copy that knows no more of it.
      section: of the values, with a dot behind it; "" is the whole.
    """

    def __init__(
        self,
        values: Mapping[str, object] | None = None,
        file: epath.Path | None = None,
        section: str = "",
    ) -> None:
        super().__init__()
        # What is set in the usual way becomes a key.
        object.__setattr__(self, "_file", file)
        object.__setattr__(self, "_section", section)
        for key, value in (values or {}).items():
            if isinstance(value, Mapping):
                value = _RunConfig(value, file, f"{section}{key}.")
            # JSON knows no tuples, and a config no lists.
            self[key] = tuple(value) if isinstance(value, list) else value

    def __getattr__(self, key: str) -> object:
        # What begins with an underscore is what Python looks for in any object.
        if self._file is None or key in self or key.startswith("_"):
            return super().__getattr__(key)
        raise _lacking(self._file, f"{self._section}{key}")

    def __eq__(self, other: object) -> bool:
        # ConfigDict's own takes any other class for another config.
        return self.eq_as_configdict(other)

    __hash__ = None


class _Lock:
    """A file that one process at a time has, by the kernel's flock.

    Args:
      path: of the file, which stays; its text says who had it last.
    """

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Takes it, or raises UsageError if another process has it."""
        if fcntl is None or not is_local(self._path):
            return
        with writing(f"{self._path}"):
            self._file = open(self._path, "a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().decode().strip() or "another process"
            self.release()
            raise UsageError(
                f"workdir {self._path.parent} is in use: {holder} trains in it; wait for its end,"
                " end it, or give another workdir"
            ) from None
        except OSError as error:
            logging.warning(
                "%s can't be locked (%s): see that no other process trains in there",
                self._path.parent,
                error.strerror,
            )
        with writing(f"{self._path}"):
            self._file.truncate(0)
            since = datetime.datetime.now().isoformat(" ", "seconds")
            holder = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
            self._file.write(holder.encode())

    def release(self) -> None:
        """Gives it back, if it was taken."""
        if self._file is not None:
            self._file.close()
            self._file = None


class MetricsWriter:
    """Appends numbers to a run's metrics.jsonl and to its TensorBoard events.

    Args:
      workdir: of the run, created.
      global_batch_size: by which steps turn into examples.

    Raises:
      UsageError: from all of its methods, that the files can't be written.
    """

    def __init__(self, workdir: Workdir, global_batch_size: int) -> None:
        self._workdir = workdir
        self._global_batch_size = global_batch_size
        with self._writing():
            if workdir.writes:
                self._events = tf.summary.create_file_writer(os.fspath(workdir.path))
                self._lines = workdir.metrics.open("a")
            else:
                self._events = tf.summary.create_noop_writer()
                self._lines = open(os.devnull, "a")

    def write(self, step: int, values: Mapping[str, float | str]) -> dict[str, float | str | None]:
        """Writes one line and gives it: step, examples, and the values under their names."""
        line = {"step": step, "examples": step * self._global_batch_size}
        # JSON has no number for what is not finite.
        line |= {k: None if _is_infinite_or_nan(v) else v for k, v in values.items()}
        with self._writing(f" of step {step}"):
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")
            self._lines.flush()
            with self._events.as_default(step=step):
                for name, value in values.items():
                    if isinstance(value, int | float):
                        tf.summary.scalar(name, value)
        return line

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        # What can't be written any more either isn't what went wrong first.
        ignored = (UsageError,) if kind else ()
        with contextlib.suppress(*ignored), self._writing():
            try:
                self._lines.close()
            finally:
                self._events.close()

    def _writing(self, which: str = "") -> contextlib.AbstractContextManager[None]:
        return writing(
            f"the metrics{which} in {self._workdir.path}",
            "what was written and saved before is intact; mend that and start again",
        )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _lacking(config: epath.Path, key: str) -> UsageError:
    return UsageError(
        f"{config} has no {key}: it was written by an older version of bn_keras; start training in"
        " a new workdir"
    )


def _is_infinite_or_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _flat(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
