"""The folder of a run: its config, its metrics and its checkpoints, local or in a bucket."""

import contextlib
import datetime
import json
import os
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import tensorflow as tf
from etils import epath
from ml_collections import ConfigDict

from bn_keras import storage
from bn_keras.errors import (
    BucketUnavailableError,
    StorageError,
    UsageError,
    WorkdirInUseError,
)
from bn_keras.runs.lock import make_lock
from bn_keras.runs.metrics_log import MetricsLog
from bn_keras.runs.saved_config import SavedConfig, missing_keys_error
from bn_keras.runs.settings import flatten
from bn_keras.storage import is_local, read, writing
from bn_keras.text import first_line


class Interface(NamedTuple):
    """The properties of the data that a run depends on: the content of interface.json.

    Attributes:
      input_shape: (height, width, channels) of the network's input.
      class_names: one per logit, in order.
      num_train_examples: examples per epoch, which order and schedule depend on.
      fingerprint: hashes of the data's files by name; those that were unknown before, or are
        unknown now, are not compared.
    """

    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    num_train_examples: int = 0
    fingerprint: Mapping[str, str] = types.MappingProxyType({})

    def to_json(self) -> dict[str, Any]:
        """Returns the object of interface.json."""
        return {
            "input_shape": list(self.input_shape),
            "class_names": list(self.class_names),
            "num_train_examples": self.num_train_examples,
            **self.fingerprint,
        }


# Sections that every config has.
_SECTIONS = ("model", "batch_norm", "data", "train")
# Settings that may differ between two starts of a run. They locate the data, say how long the run
# is, choose the devices, or do not change what is trained.
_CHANGEABLE = (
    "data.data_dir",
    "data.max_bad_examples",
    "schedule.cosine_steps",
    "train.epochs",
    "train.patience",
    "train.steps",
    "train.steps_per_loop",
    "train.until_accuracy",
)
_CHANGEABLE_SECTIONS = ("checkpoint.", "distribution.", "evaluation.", "record.")

# Values of interface.json that fit into an error.
_SHORT_VALUES = ("input_shape", "num_train_examples")


class Workdir:
    """The folder of one run, new or existing.

    Nothing is written before `create`, so that a run that cannot start leaves nothing behind.

    Args:
      path: path of the folder; gs://... works as well.

    Attributes:
      path: path of the folder.
      writes: whether this process writes into the folder. Of several workers, only the chief does;
        in the others, methods that write do nothing.
      checkpoints: folder of the checkpoints.
      finished: folder of the network as evaluated at the end, if that differs from the last
        checkpoint.
      best: folder of the network of the evaluation with the highest accuracy, as evaluated.
      classes: folder of the last evaluation's report on the classes.
      metrics: path of metrics.jsonl.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        # Refuses URLs of other kinds, which etils reports as a KeyError.
        is_local(path)
        self.path = epath.Path(path)
        self.writes = True
        self.checkpoints = self.path / "checkpoints"
        self.finished = self.path / "finished"
        self.best = self.path / "best"
        self.classes = self.path / "classes"
        self.metrics = self.path / "metrics.jsonl"
        self._config = self.path / "config.json"
        self._interface = self.path / "interface.json"
        self._environment = self.path / "environment.json"
        self._lock = make_lock(self.path)
        self._acquire_on_create: Callable[[], None] | None = None

    @property
    def name(self) -> str:
        """Name of the folder."""
        path = os.path.abspath(self.path) if is_local(self.path) else os.fspath(self.path)
        return os.path.basename(path.rstrip("/"))

    def check(self, config: ConfigDict) -> None:
        """Raises UsageError if the path is a file, or the folder of a run of another config.

        Settings that do not change what is trained may differ, and so may the length of the run;
        docs/training.md lists them.
        """
        if is_local(self.path) and self.path.exists() and not self.path.is_dir():
            raise UsageError(f"workdir {self.path} is a file: expected a folder")
        if not self.exists():
            return
        self.read_metrics()
        saved, now = flatten(self.read_config()), flatten(config)
        missing = sorted(now.keys() - saved.keys())
        if missing:
            raise missing_keys_error(self._config, ", ".join(missing))
        differing = [
            f"{key}={saved[key]!r} (now {now.get(key)!r})"
            for key in sorted(saved)
            if saved[key] != now.get(key) and not _may_change(key)
        ]
        if differing:
            raise UsageError(
                f"workdir {self.path} holds a run of another config, with {', '.join(differing)}:"
                " use another workdir, or the same config to resume that run"
            )
        # The steps of a number of epochs are known once the data is open.
        if not config.train.epochs:
            self.check_length(config.train.steps)

    def check_length(self, steps: int) -> None:
        """Raises UsageError if the run has already trained more than a number of steps."""
        if steps < (last := self.read_metrics().last_step):
            raise UsageError(
                f"the run in {self.path} has trained {last} steps, more than the {steps} of this"
                " config: raise train.steps or train.epochs, or use another workdir"
            )

    def changes(self, config: ConfigDict) -> dict[str, tuple[Any, Any]]:
        """Returns the saved and the new value of each setting that differs from the run's config.

        A new run has no changes.
        """
        if not self.exists():
            return {}
        saved = flatten(self.read_config())
        now = flatten(ConfigDict(_with_absolute_paths(config)))
        return {
            key: (saved[key], now[key])
            for key in sorted(saved.keys() & now.keys())
            if saved[key] != now[key]
        }

    @contextlib.contextmanager
    def locked(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keeps other processes from training in the folder until the block ends.

        An existing run is locked from here on, a new one from `create` on: before, there is nothing
        to corrupt. See `Lock` and `BucketLock`.

        Args:
          on_wait: see `BucketLock.acquire`.

        Raises:
          WorkdirInUseError: another process holds the lock, now or when `create` is called.
        """

        def acquire() -> None:
            self._lock.acquire(on_wait)

        exists = self.exists()
        self._acquire_on_create = None if exists or not self.writes else acquire
        try:
            if self.writes and exists:
                acquire()
            yield
        except BucketUnavailableError:
            # A request to release it would take minutes.
            self._lock.abandon()
            raise
        finally:
            self._acquire_on_create = None
            self._lock.release()

    def verify_owner(self) -> None:
        """Raises WorkdirInUseError if another process has taken over a locked folder."""
        self._lock.verify()

    def create(self, config: ConfigDict, interface: Interface) -> None:
        """Creates the folder and the files that describe the run.

        An existing config.json is replaced if a setting has changed. A relative data.data_dir is
        saved as an absolute path, so that the run can be evaluated from any folder.

        Args:
          config: config of the run.
          interface: the properties of the data that the run depends on.

        Raises:
          UsageError: the run was started on other data, or another process has started a run in
            the folder meanwhile.
          WorkdirInUseError: another process trains in the folder.
          StorageError: the folder cannot be written.
        """
        knows_interface = self.check_data(interface)
        if not self.writes:
            return
        with writing(f"workdir {self.path}"):
            storage.make_folder(self.path)
            if self._acquire_on_create:
                self._acquire_on_create()
                self._acquire_on_create = None
                if self.exists():
                    raise UsageError(
                        f"another process has started a run in {self.path} meanwhile: start again"
                        " to resume it, or use another workdir"
                    )
            if read(self.metrics) is None:
                self._write(self.metrics, "")
            if not self.exists() or self.changes(config):
                self._write_json(self._config, _with_absolute_paths(config))
            if not knows_interface:
                self._write_json(self._interface, interface.to_json())

    def check_data(self, interface: Interface) -> bool:
        """Returns whether interface.json exists and has all values.

        Raises:
          UsageError: the run was started on other data.
        """
        now, before = interface.to_json(), self._read_interface()
        known = now.keys() & before.keys()
        differing = [key for key in now if key in known and before[key] != now[key]]
        if differing:
            key = differing[0]
            values = f" ({before[key]}, now {now[key]})" if key in _SHORT_VALUES else ""
            raise UsageError(
                f"the run in {self.path} was started on data with other {key}{values}: use that"
                " data, or a new workdir"
            )
        # A file of an older version lacks keys, and gets them; none is dropped.
        return len(known) == len(now)

    def exists(self) -> bool:
        """Returns whether there is a run in the folder."""
        return read(self._config) is not None

    def _write(self, path: epath.Path, text: str) -> None:
        self.verify_owner()
        storage.write_atomically(path, text)

    def _write_json(self, path: epath.Path, value: Any) -> None:
        self._write(path, json.dumps(value, indent=2) + "\n")

    def read_config(self) -> SavedConfig:
        """Reads the config of the run, locked.

        A key that an older version did not save raises UsageError when it is asked for.

        Raises:
          UsageError: there is no run in the folder, or its config cannot be read.
        """
        content = read(self._config)
        if content is None:
            raise UsageError(f"workdir {self.path} holds no run: it has no config.json")
        try:
            config = json.loads(content)
        except ValueError as error:
            raise UsageError(f"{self._config} cannot be read: {first_line(error)}") from None
        sections = config if isinstance(config, dict) else {}
        missing = [name for name in _SECTIONS if not isinstance(sections.get(name), dict)]
        if missing:
            raise UsageError(f"{self._config} is not a config: it has no {', '.join(missing)}")
        return SavedConfig(config, self._config).lock()

    def read_interface(self) -> Interface:
        """Reads the properties of the data that the run depends on, as passed to `create`.

        Raises:
          UsageError: they cannot be read.
        """
        values = self._read_interface()
        try:
            height, width, channels = values.pop("input_shape")
            names, count = tuple(values.pop("class_names")), values.pop("num_train_examples", 0)
            return Interface((height, width, channels), names, count, values)
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"{self._interface} is missing or damaged: start the run's training again, which"
                " writes it"
            ) from None

    @contextlib.contextmanager
    def recording_start(self, step: int, environment: Mapping[str, Any]) -> Iterator[None]:
        """Records this start of the run and its end in environment.json.

        Args:
          step: step that the run starts or resumes from.
          environment: result of `bn_keras.runs.environment.describe`.
        """
        earlier = self.read_environment()
        start: dict[str, Any] = {"step": step, "started": _now(), "ended": None, **environment}

        def record() -> None:
            if self.writes:
                self._write_json(self._environment, [*earlier, start])

        with writing(f"workdir {self.path}"):
            record()
        try:
            yield
        except (BucketUnavailableError, WorkdirInUseError):
            # Another write would take minutes, or must not be made.
            raise
        except BaseException:
            start["ended"] = _now()
            # A failed write must not mask the run's own error; only the time of its end is lost.
            with contextlib.suppress(StorageError, WorkdirInUseError, OSError, tf.errors.OpError):
                record()
            raise
        start["ended"] = _now()
        with writing(f"workdir {self.path}"):
            record()

    def read_environment(self) -> list[dict[str, Any]]:
        """Reads the records of the run's starts, in order; empty if the file is damaged."""
        starts = _parse(read(self._environment))
        return starts if isinstance(starts, list) else []

    def read_data_sizes(self) -> tuple[int, int]:
        """Reads the numbers of classes and of training examples; 0 if unknown."""
        interface = self._read_interface()
        return len(interface.get("class_names", ())), interface.get("num_train_examples", 0)

    def _read_interface(self) -> dict[str, Any]:
        """Reads interface.json; empty if it is missing or damaged."""
        interface = _parse(read(self._interface))
        return interface if isinstance(interface, dict) else {}

    def read_metrics(self) -> MetricsLog:
        """Reads the lines of metrics.jsonl in order; an incomplete last line is left out.

        Raises:
          UsageError: a line is damaged.
        """
        return MetricsLog.parse(read(self.metrics) or b"", os.fspath(self.metrics))

    def drop_metrics_after(self, step: int) -> None:
        """Drops the lines of metrics.jsonl after the step at which the run resumes.

        Raises:
          StorageError: the file cannot be written; it is unchanged.
        """
        if not self.writes:
            return
        kept = "".join(json.dumps(line) + "\n" for line in self.read_metrics().up_to(step))
        if kept.encode() != read(self.metrics):
            with writing(f"{self.metrics}", "it is unchanged"):
                self._write(self.metrics, kept)


def _may_change(key: str) -> bool:
    return key in _CHANGEABLE or key.startswith(_CHANGEABLE_SECTIONS)


def _with_absolute_paths(config: ConfigDict) -> dict[str, Any]:
    values = config.to_dict()
    data_dir = values["data"]["data_dir"]
    if data_dir and is_local(data_dir):
        values["data"]["data_dir"] = os.path.abspath(os.path.expanduser(data_dir))
    return values


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _parse(text: str | bytes | None) -> Any:
    """Returns the value of a JSON text; None if it is missing or damaged."""
    try:
        return json.loads(text or b"")
    except ValueError:
        return None
