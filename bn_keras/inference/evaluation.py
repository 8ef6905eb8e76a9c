"""Accuracy on a validation set, in which every example counts exactly once."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

import keras
import tensorflow as tf
from ml_collections import ConfigDict
from tqdm import tqdm

from bn_keras.data import pipeline
from bn_keras.data.multi_crop import SINGLE_CROP, CropPreprocessing, Crops
from bn_keras.distribute.strategy import make_strategy, naming_lost_workers
from bn_keras.errors import UsageError
from bn_keras.inference.loading import ExportedNetwork, TrainedNetwork, load_exported, load_trained
from bn_keras.merge import merge_moving_statistics
from bn_keras.population import estimate_population_statistics
from bn_keras.replicas import per_replica_sum
from bn_keras.runs.workdir import Workdir

# Parts of a pass, after each of which a long evaluation says how far it has come.
_PARTS = 100


def evaluate_networks(
    workdirs: Sequence[str | os.PathLike] = (),
    config: ConfigDict | None = None,
    crops: Sequence[Crops] = (SINGLE_CROP,),
    exported: Sequence[str | os.PathLike] = (),
    best: bool = False,
) -> list[dict[str, object]]:
    """Evaluates networks of runs and exported ones, and several of them as an ensemble too.

    A run's network is taken as it was finished, or of the latest checkpoint. It goes by the
    statistics of the population where the run took these, or where the config asks for them in
    whatever way; they are then taken here. Else it goes by the moving ones.

    Args:
      workdirs: of the runs.
      config: to evaluate by; None is the first run's own. Its model has to be that of one of the
        runs, if there are any; the data may lie elsewhere, and the devices may be others.
      crops: everything is evaluated with each of these.
      exported: paths of .keras files and SavedModels, as `load_exported` takes them. They are
        shown images prepared as the config says.
      best: takes each run's network of its best evaluation, as `load_trained` does.

    Returns:
      For each of the crops a row a network and, if there are several, one for the ensemble:
      "model" (the path, or "ensemble"), how many "crops" and "models", for a run its "step" and
      "statistics" ("moving" or "population"), what `make_evaluator` gives, and "top1_error" and
      "top5_error".

    Raises:
      UsageError: no network at a path, a config of another network, data of other classes than a
        network's, or crops that can't be cut.
    """
    if best and not workdirs:
        raise UsageError("the best of its evaluations is a run's: give its workdir")
    configs = [Workdir(workdir).read_config() for workdir in workdirs]
    if config is None and not configs:
        raise UsageError("an exported network doesn't say what it was trained on: give a config")
    config = config or configs[0]
    trained = [(c.model, c.batch_norm) for c in configs]
    if trained and (config.model, config.batch_norm) not in trained:
        raise UsageError(
            f"the config's network is not that of the run in {workdirs[0]}: leave the config out"
            " to evaluate with the run's own"
        )
    strategy = make_strategy(**config.distribution)
    networks = [load_trained(workdir, strategy, best) for workdir in workdirs]
    networks += [load_exported(path, strategy) for path in exported]
    data = pipeline.open_data(config.data, seed=config.seed)
    rows = []
    for path, network in zip([*workdirs, *exported], networks, strict=True):
        _check_fits(network, path, data, config.data.name)
        row = {"model": os.fspath(path), "models": 1}
        if isinstance(network, TrainedNetwork):
            row["step"] = network.step
            row["statistics"] = _settle_statistics(network, data, config, strategy)
        rows.append(row)
    if len(rows) > 1:
        rows.append({"model": "ensemble", "models": len(rows)})

    evaluated = []
    with naming_lost_workers(strategy):
        for scheme in crops:
            evaluate = make_ensemble_evaluator(
                [network.model for network in networks],
                data,
                strategy,
                config.evaluation.global_batch_size,
                scheme,
            )
            for row, result in zip(rows, evaluate(label=f"{scheme.count} crop(s)"), strict=True):
                errors = {
                    "top1_error": 1 - result["accuracy"],
                    "top5_error": 1 - result["top5_accuracy"],
                }
                evaluated.append(row | {"crops": scheme.count} | result | errors)
    return evaluated


def _check_fits(
    network: TrainedNetwork | ExportedNetwork,
    path: str | os.PathLike,
    data: pipeline.Data,
    data_name: str,
) -> None:
    names = network.class_names
    if names is None and network.num_classes == data.num_classes:
        names = data.class_names
    if (data.class_names, data.input_shape) != (names, network.input_shape):
        raise UsageError(
            f"{data_name} has {data.num_classes} classes and images of {data.input_shape},"
            f" but the network in {path} was trained for {network.num_classes} classes,"
            f" which may go by other names, and {network.input_shape}: give the data it was"
            " trained for"
        )
    binary = data.preprocessing.binary
    if isinstance(network, TrainedNetwork) and network.preprocessing.binary != binary:
        raise UsageError(
            f"data.binary is {binary}, but not for the network in {path}: evaluate it by itself"
        )


def _settle_statistics(
    network: TrainedNetwork,
    data: pipeline.Data,
    config: ConfigDict,
    strategy: tf.distribute.Strategy,
) -> str:
    """Takes the population's statistics if that is still to be done; says which ones it has."""
    if network.statistics == "moving" and config.population.when != "never":
        batches = open_mini_batches(config, data, strategy)
        estimate_population_statistics(
            network.model, batches, config.population.num_batches, strategy
        )
        return "population"
    return network.statistics


def open_mini_batches(
    config: ConfigDict, data: pipeline.Data, strategy: tf.distribute.Strategy
) -> tf.distribute.DistributedDataset:
    """Opens what population statistics are taken over: batches as BN has them in training.

    A micro-batch is a batch of its own there, and images are not mixed.
    """
    size = config.train.global_batch_size // config.train.micro_batches
    return data.train_batches(strategy, size)


def format_errors(rows: Sequence[Mapping[str, object]]) -> str:
    """Lays out what `evaluate_networks` gives as Figure 4 of the paper does."""
    header = ["model", "crops", "models", "top-1 error", "top-5 error"]
    lines = [
        [str(row[name]) for name in header[:3]]
        + [f"{row[name]:.2%}" for name in ("top1_error", "top5_error")]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    table = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in (header, *lines)
    ]
    return "\n".join([*table, f"{rows[0]['examples']:,} images, each counted exactly once"])


def make_evaluator(
    model: keras.Model,
    data: pipeline.Data,
    strategy: tf.distribute.Strategy,
    global_batch_size: int,
) -> Callable[[], dict[str, float]]:
    """Makes a function that evaluates a model, traced once however often it is called.

    The replicas' moving statistics are merged first, so that all of them judge by the same.

    Args:
      model: from images to logits.
      data: whose validation examples are taken.
      strategy: in whose scope the model was made.
      global_batch_size: examples at a time, over all replicas; the last ones are padded.

    Returns:
      A function without arguments whose result maps "examples" to how many there are, and
      "loss", "accuracy" and "top5_accuracy" to means over them: softmax cross-entropy in nats,
      and fractions of one.
    """
    evaluate = make_ensemble_evaluator([model], data, strategy, global_batch_size)
    return lambda: evaluate()[0]


def make_ensemble_evaluator(
    models: Sequence[keras.Model],
    data: pipeline.Data,
    strategy: tf.distribute.Strategy,
    global_batch_size: int,
    crops: Crops = SINGLE_CROP,
) -> Callable[..., list[dict[str, float]]]:
    """As `make_evaluator`, for several models and several crops of each image.

    Args:
      models: from images to logits or, if they end in a softmax, to probabilities.
      data: as there.
      strategy: as there.
      global_batch_size: crops at a time, over all replicas. A replica's part of it, made smaller
        where that doesn't divide the crops of its images, is what a network is called with.
      crops: of each image.

    Returns:
      A function whose results are those of each model and, if there are several, of the ensemble.
      Its argument `label` is shown beside a progress bar; without one there is no bar.
    """
    pipeline.check_divides(strategy, global_batch_size)
    replicas = strategy.num_replicas_in_sync
    per_replica_batch_size = global_batch_size // replicas
    images_per_step = replicas * max(1, per_replica_batch_size // crops.count)
    preprocessing = CropPreprocessing(data.preprocessing, crops)
    batches, num_steps = data.validation_batches(strategy, images_per_step, preprocessing)
    score = make_scorer(models, preprocessing, per_replica_batch_size)
    num_rows = len(models) + (len(models) > 1)
    with strategy.scope():
        # Summed on each replica by itself, and over the replicas when read.
        sums = per_replica_sum([num_rows, 4])

    def eval_step(images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> None:
        scores = score(images)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.broadcast_to(labels, scores.shape[:2]), scores
        )
        # The classes in order of falling scores; equal ones can't all be hits.
        _, best = tf.nn.top_k(scores, k=min(5, scores.shape[-1]))
        hits = tf.cast(best == labels[:, tf.newaxis], tf.float32)
        per_example = [tf.ones_like(losses), losses, hits[..., 0], tf.reduce_sum(hits, axis=-1)]
        sums.assign_add(tf.linalg.matvec(tf.stack(per_example, axis=1), weights))

    @tf.function
    def eval_loop(iterator: tf.distribute.DistributedIterator, steps: tf.Tensor) -> None:
        for _ in tf.range(steps):
            strategy.run(eval_step, args=next(iterator))

    def evaluate(label: str = "") -> list[dict[str, float]]:
        for model in models:
            merge_moving_statistics(model, strategy)
        sums.assign(tf.zeros([num_rows, 4]))
        iterator = iter(batches)
        part = -(-num_steps // _PARTS) if label else num_steps
        with _bar(label, data.num_validation_examples) as bar, data.naming_errors():
            for start in range(0, num_steps, part):
                steps = min(part, num_steps - start)
                eval_loop(iterator, tf.constant(steps))
                bar.update(min(steps * images_per_step, bar.total - bar.n))
        rows = sums.read_value().numpy()
        for num_examples, *_ in rows:
            data.check_counted(num_examples)
        return [_means(row) for row in rows]

    return evaluate


def _means(sums: Sequence[float]) -> dict[str, float]:
    examples, *totals = map(float, sums)
    names = ("loss", "accuracy", "top5_accuracy")
    return {"examples": int(examples)} | {
        name: total / examples for name, total in zip(names, totals, strict=True)
    }


def _bar(label: str, total: int) -> tqdm:
    return tqdm(
        desc=label,
        total=total,
        disable=not (label and sys.stderr.isatty()),
        ncols=min(110, shutil.get_terminal_size().columns),
        bar_format="{desc}|{bar}|{n_fmt}/{total_fmt} images, {remaining} left",
    )


def make_scorer(
    models: Sequence[keras.Model], preprocessing: CropPreprocessing, max_batch_size: int
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Makes the function that gives each class its probability, averaged over an image's crops.

    The mean is the arithmetic one of probabilities, as in the paper, for crops as for an
    ensemble's members. It is taken by logarithms, which hold what is too small for float32.

    Args:
      models: from images to logits, or to probabilities if their last layer is a softmax.
      preprocessing: whose `cut` gives the crops.
      max_batch_size: of images that a model is called with; what is called is the largest batch
        that isn't larger and divides the crops evenly.

    Returns:
      A function of a batch of n of what `preprocessing.cut` takes, which gives the logarithms of
      the probabilities, float32 [rows, n, classes], one row a model and, if there are several, a
      last one for the ensemble of them.
    """

    def score(images: tf.Tensor | tuple[tf.Tensor, ...]) -> tf.Tensor:
        shown = preprocessing.cut(images)
        rows = [
            _log_mean(tf.reshape(logs, [-1, preprocessing.crops.count, logs.shape[-1]]), axis=1)
            for logs in (_log_probabilities(model, shown, max_batch_size) for model in models)
        ]
        return tf.stack(rows if len(rows) == 1 else [*rows, _log_mean(tf.stack(rows), axis=0)])

    return score


def _log_probabilities(model: keras.Model, images: tf.Tensor, max_batch_size: int) -> tf.Tensor:
    """Calls a model with several images [n, ...] at a time; gives float32 [n, classes]."""
    num_images = images.shape[0]
    batch_size = next(b for b in range(max_batch_size, 0, -1) if num_images % b == 0)
    give_logs = tf.math.log if _ends_in_softmax(model) else tf.nn.log_softmax

    def call(batch: tf.Tensor) -> tf.Tensor:
        return give_logs(tf.cast(model(batch, training=False), tf.float32))

    if batch_size == num_images:
        return call(images)
    batches = tf.reshape(images, [-1, batch_size, *images.shape[1:]])
    # One after the other: each of them keeps the whole device busy.
    logs = tf.map_fn(call, batches, parallel_iterations=1)
    return tf.reshape(logs, [num_images, logs.shape[-1]])


def _ends_in_softmax(model: keras.Model) -> bool:
    last = model.layers[-1]
    return isinstance(last, keras.layers.Softmax) or (
        getattr(last, "activation", None) is keras.activations.softmax
    )


def _log_mean(logs: tf.Tensor, axis: int) -> tf.Tensor:
    """The logarithm of the arithmetic mean of the numbers with these logarithms."""
    return tf.reduce_logsumexp(logs, axis) - tf.math.log(float(logs.shape[axis]))
