"""Evaluation of the networks of runs and of exported networks, alone and as an ensemble."""

import dataclasses
import os
from collections.abc import Sequence
from typing import NotRequired, TypedDict, cast

import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from bn_keras.data import pipeline
from bn_keras.data.multi_crop import SINGLE_CROP, Crops
from bn_keras.distribute import make_strategy, reporting_lost_workers, without_other_workers
from bn_keras.errors import UsageError
from bn_keras.inference.exported import ExportedNetwork, load_exported
from bn_keras.inference.loading import TrainedNetwork, load_trained
from bn_keras.population import estimate_population_statistics
from bn_keras.runs.settings import flatten, replaced
from bn_keras.runs.workdir import Workdir
from bn_keras.text import counted, quoted, table
from bn_keras.training.build import build_data
from bn_keras.training.class_report import ClassReport, ClassRow, format_classes
from bn_keras.training.config import uses_population
from bn_keras.training.config_files import read_run_config
from bn_keras.training.evaluator import EvaluationMetrics, Evaluator
from bn_keras.training.length import global_micro_batch_size

# Settings that do not change what the weights of a trained network compute.
_TRAINING_ONLY = {
    f"model.{name}"
    for name in ("initializer", "initializer_stddev", "initializer_scale", "init_from", "freeze")
}

# Values of data.crop whose evaluation shows the whole image, unless it is resized.
_WHOLE_IMAGES = {"none", "shift"}


class _Subject(TypedDict):
    """A network that is evaluated, or the ensemble of all networks."""

    model: str
    models: int
    step: NotRequired[int]
    statistics: NotRequired[str]


class EvaluationRow(_Subject, EvaluationMetrics):
    """The evaluation of one network, or of the ensemble, with one choice of crops.

    "model" is the path of the network, or "ensemble"; "models" and "crops" are their numbers, and
    "classes" is the number of the network's classes. Only the network of a run has a "step" and
    "statistics" ("moving", "population" or "none"). "per_class" is present on request.
    """

    crops: int
    classes: int
    top1_error: float
    top5_error: float
    per_class: NotRequired[list[ClassRow]]


@dataclasses.dataclass
class _Candidate:
    """A network to evaluate.

    Attributes:
      path: path of its run or of its file.
      network: the network.
      config: config of its run with the overrides of the evaluation; for an exported network, the
        config of the evaluation.
      lacks_statistics: whether it has moving statistics, but its config asks for population
        statistics.
    """

    path: str
    network: TrainedNetwork | ExportedNetwork
    config: ConfigDict
    lacks_statistics: bool

    def estimate(self, data: pipeline.Data, strategy: tf.distribute.Strategy) -> None:
        """Estimates the population statistics of a run's network from the training images."""
        batches = data.train_batches(strategy, global_micro_batch_size(self.config))
        with data.reporting_errors():
            estimate_population_statistics(
                self.network.model, batches, self.config.population.num_batches, strategy
            )
        self.network = cast(TrainedNetwork, self.network)._replace(statistics="population")

    def to_subject(self) -> _Subject:
        """Returns the columns that describe the network in its rows."""
        subject: _Subject = {"model": self.path, "models": 1}
        if isinstance(self.network, TrainedNetwork):
            subject |= {"step": self.network.step, "statistics": self.network.statistics}
        return subject


def evaluate_networks(
    workdirs: Sequence[str | os.PathLike] = (),
    config: ConfigDict | None = None,
    crops: Sequence[Crops] = (SINGLE_CROP,),
    exported: Sequence[str | os.PathLike] = (),
    best: bool = False,
    per_class: bool = False,
) -> list[EvaluationRow]:
    """Evaluates the networks of runs, exported networks and, of several networks, the ensemble.

    The finished network of a run is evaluated, or else that of its latest checkpoint. If this has
    only moving statistics and the run's config uses population statistics, these are estimated
    first. The best network is evaluated as during training: population.when=end does not concern
    it.

    Args:
      workdirs: folders of the runs, or one of them.
      config: config of the evaluation; None uses that of the first run. If there are runs, its
        model must be that of one of them; the location of the data and the devices may differ. The
        preprocessing must be that of each network's training. Settings that differ from those of
        the first run replace those of every run.
      crops: each network is evaluated with each of these.
      exported: paths of exported networks; see `load_exported`. Their input is
        preprocessed as the config says.
      best: whether to use the network of each run's best evaluation; see `load_trained`.
      per_class: whether to add the result for each class.

    Returns:
      For each choice of crops: one row per network and, for several networks, one for the ensemble.

    Raises:
      UsageError: no network at a path, a config of another network or of another preprocessing,
        data with a class that a network does not have, or crops that the network's input does not
        allow.
      StorageError: a checkpoint or an exported network cannot be read.
      WorkerLostError: another worker has ended or does not answer.
    """
    workdirs, exported = (
        [paths] if isinstance(paths, str | os.PathLike) else paths for paths in (workdirs, exported)
    )
    if not (workdirs or exported):
        raise UsageError("workdirs and exported are empty: pass at least one network")
    config = choose_config(config, workdirs, best)
    strategy = make_strategy(**config.distribution)
    candidates = _load_candidates(workdirs, exported, config, strategy, best)
    # The training images are usually those of the same data, which is then opened only once.
    needs_training = any(c.lacks_statistics and _is_equal(c.config, config) for c in candidates)
    data = build_data(config, validation_only=not needs_training)
    for candidate in candidates:
        _check_fits(candidate, data, config, crops)
    class_names = _match_classes(candidates, data)
    with reporting_lost_workers(strategy):
        for candidate in candidates:
            if candidate.lacks_statistics:
                is_same = _is_equal(candidate.config, config)
                candidate.estimate(data if is_same else build_data(candidate.config), strategy)
        subjects = [candidate.to_subject() for candidate in candidates]
        if len(subjects) > 1:
            subjects.append({"model": "ensemble", "models": len(subjects)})
        rows: list[EvaluationRow] = []
        for choice in crops:
            evaluate = Evaluator(
                [candidate.network.model for candidate in candidates],
                data,
                strategy,
                config.evaluation.global_batch_size,
                choice,
                class_names,
            )
            rows += _evaluate(evaluate, subjects, choice, class_names, per_class)
    return rows


def _evaluate(
    evaluate: Evaluator,
    subjects: Sequence[_Subject],
    crops: Crops,
    class_names: Sequence[str],
    per_class: bool,
) -> list[EvaluationRow]:
    """Evaluates with one choice of crops, and returns the row of each subject."""
    results = evaluate(label=counted(crops.count, "crop"))
    rows = [
        _row(subject, metrics, crops, len(class_names))
        for subject, metrics in zip(subjects, results, strict=True)
    ]
    if per_class:
        for row, found in zip(rows, evaluate.predictions, strict=True):
            row["per_class"] = ClassReport(class_names, found).rows()
    return rows


def choose_config(
    config: ConfigDict | None, workdirs: Sequence[str | os.PathLike], best: bool = False
) -> ConfigDict:
    """Returns the config that `evaluate_networks` uses for the same arguments.

    It describes the network of one of the runs. One process can evaluate the run of several
    workers: in a process that belongs to no cluster, "mirrored" replaces "multi_worker".

    Raises:
      UsageError: no config, or one that describes none of the runs' networks.
    """
    if best and not workdirs:
        raise UsageError(
            "best=True (--best) is invalid without a workdir, because an exported network does not"
            " record its best evaluation: pass the run's workdir, or omit it"
        )
    if config is None and not workdirs:
        raise UsageError(
            "an exported network does not record its data set: pass a config, such as that of its"
            " run (--config=WORKDIR)"
        )
    configs = [read_run_config(Workdir(workdir)) for workdir in workdirs]
    config = config or configs[0]
    if configs and not any(_describes_same_network(config, other) for other in configs):
        raise UsageError(
            f"the config describes a different network from that of the run in {workdirs[0]}: omit"
            " the config to use the run's own"
        )
    strategy = without_other_workers(config.distribution.strategy)
    return replaced(config, {"distribution.strategy": strategy})


def _describes_same_network(config: ConfigDict, trained: ConfigDict) -> bool:
    """Returns whether configs agree, except on the initial weights and what is frozen.

    A run of an older version lacks newer settings, which are not compared.
    """
    return all(
        config[section].get(key) == value
        for section in ("model", "batch_norm")
        for key, value in trained[section].items()
        if f"{section}.{key}" not in _TRAINING_ONLY
    )


def _load_candidates(
    workdirs: Sequence[str | os.PathLike],
    exported: Sequence[str | os.PathLike],
    config: ConfigDict,
    strategy: tf.distribute.Strategy,
    best: bool,
) -> list[_Candidate]:
    """Loads the networks of runs and the exported networks, in this order."""
    candidates = []
    trained = [load_trained(workdir, strategy, best) for workdir in workdirs]
    for workdir, network in zip(workdirs, trained, strict=True):
        own = _with_overrides(network.config, config, trained[0].config)
        # The best network was evaluated before the end, or has population statistics already.
        asks = uses_population(own.population.when, is_last=not best)
        lacks = asks and network.lacks_population_statistics
        candidates.append(_Candidate(os.fspath(workdir), network, own, lacks))
    for path in exported:
        candidates.append(_Candidate(os.fspath(path), load_exported(path, strategy), config, False))
    return candidates


def _is_equal(config: ConfigDict, other: ConfigDict) -> bool:
    return flatten(config) == flatten(other)


def _match_classes(candidates: Sequence[_Candidate], data: pipeline.Data) -> tuple[str, ...]:
    """Returns the classes of the networks' outputs, which contain those of the data.

    Raises:
      UsageError: the networks differ in their classes, or the data has a class that they lack.
    """
    path, count = candidates[0].path, candidates[0].network.num_classes
    # A Keras model that `export_workdir` did not write has no class names.
    named = (c.network.class_names for c in candidates)
    first = next((names for names in named if names is not None), None)
    if first is None and count == data.num_classes:
        first = data.class_names
    for candidate in candidates:
        network = candidate.network
        if network.num_classes != count or network.class_names not in (None, first):
            raise UsageError(
                f"the networks in {path} and {candidate.path} were trained on different classes:"
                " evaluate each one alone"
            )
    if first is None:
        raise UsageError(
            f"the network in {path} has {count} classes without names, but the"
            f" data has {data.num_classes}: evaluate it on data with its classes"
        )
    check_classes(data, first, path)
    return first


def check_classes(data: pipeline.Data, class_names: Sequence[str], path: str) -> None:
    """Raises UsageError if the data has a class that a network lacks; warns of the reverse.

    Args:
      data: data to evaluate the network on.
      class_names: classes of the network.
      path: path of the network, for errors.
    """
    unknown = [name for name in data.class_names if name not in class_names]
    absent = [name for name in class_names if name not in data.class_names]
    if unknown:
        missing = f"; the data lacks {quoted(absent, 10)}" if absent else ""
        raise UsageError(
            f"the data has classes that the network in {path} does not know: {quoted(unknown, 10)}"
            f"{missing}: rename their folders to the network's classes, or leave them out"
        )
    if absent:
        logging.warning("classes without images in the data: %s", quoted(absent, 10))


def _check_fits(
    candidate: _Candidate, data: pipeline.Data, config: ConfigDict, crops: Sequence[Crops]
) -> None:
    """Raises UsageError if the network was trained on images that are preprocessed differently."""
    network, path = candidate.network, candidate.path
    if data.input_shape != network.input_shape:
        height, width, channels = network.input_shape
        if channels != data.input_shape[-1]:
            advice = f"evaluate it on images with {counted(channels, 'channel')}"
        elif height != width:
            advice = "evaluate it with the config of its run, --config=WORKDIR"
        else:
            advice = _advise("data.image_size", height)
        raise UsageError(
            f"{config.data.name} has images of shape {data.input_shape}, but the network in {path}"
            f" was trained on images of shape {network.input_shape}: {advice}"
        )
    if network.preprocessing is None:
        return
    given, trained = data.preprocessing, network.preprocessing
    compared: list[tuple[str, object, object]] = [("data.binary", given.binary, trained.binary)]
    shows_whole_images = not config.data.image_size and {given.crop, trained.crop} <= _WHOLE_IMAGES
    # Several crops are cut from whole images, whatever data.crop is.
    if SINGLE_CROP in crops and not shows_whole_images:
        compared.append(("data.crop", given.crop, trained.crop))
    for key, value, expected in compared:
        if value != expected:
            raise UsageError(
                f"{key} is {value}, but the network in {path} was trained with {key}={expected}:"
                f" {_advise(key, expected)}; networks that differ in it are evaluated one at a time"
            )


def _advise(key: str, value: object) -> str:
    """Returns what to do if the config and a network differ in a setting of the input."""
    return f"pass the config of its run, --config=WORKDIR, or --config.{key}={value}"


def _with_overrides(trained: ConfigDict, config: ConfigDict, first: ConfigDict) -> ConfigDict:
    """Returns the config of a run with the overrides of this evaluation.

    These are the settings in which `config` differs from the config of the first run.
    """
    own, before = flatten(trained), flatten(first)
    changed = {
        key: value
        for key, value in flatten(config).items()
        if key in own and before.get(key) != value
    }
    return replaced(trained, changed)


def _row(
    subject: _Subject, metrics: EvaluationMetrics, crops: Crops, num_classes: int
) -> EvaluationRow:
    return {
        **subject,
        "crops": crops.count,
        "classes": num_classes,
        **metrics,
        "top1_error": 1 - metrics["accuracy"],
        "top5_error": 1 - metrics["top5_accuracy"],
    }


def format_error_rates(rows: Sequence[EvaluationRow]) -> str:
    """Formats the rows of `evaluate_networks` as a table like the paper's Figure 4.

    The top-5 error of up to five classes is always 0 and is left out. The results for each class,
    if there are any, follow in tables of their own.
    """
    header = ["model", "crops", "models", "top-1 error", "top-5 error"]
    cells = [
        [
            row["model"],
            str(row["crops"]),
            str(row["models"]),
            f"{row['top1_error']:.2%}",
            f"{row['top5_error']:.2%}",
        ]
        for row in rows
    ]
    if rows[0]["classes"] <= 5:
        header, *cells = (row[:-1] for row in (header, *cells))
    count = f"{rows[0]['examples']:,} images, each counted exactly once"
    classes = [
        f"\n{row['model']}, {counted(row['crops'], 'crop')}: balanced accuracy"
        f" {row['balanced_accuracy']:.2%}\n{format_classes(row['per_class'])}"
        for row in rows
        if "per_class" in row
    ]
    return "\n".join([*table([header, *cells]), count, *classes])
