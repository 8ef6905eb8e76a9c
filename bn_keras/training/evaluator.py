"""Accuracy and loss on the validation examples, each counted exactly once."""

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import keras
import numpy as np
import tensorflow as tf

from bn_keras.data import pipeline
from bn_keras.data.multi_crop import SINGLE_CROP, CropPreprocessing, Crops
from bn_keras.merge import merge_moving_statistics
from bn_keras.replicas import per_replica_sum
from bn_keras.training.class_report import Predictions
from bn_keras.training.progress import progress_bar

# The progress bar of a long evaluation moves this many times.
_PROGRESS_UPDATES = 100


class EvaluationMetrics(TypedDict):
    """The number of examples, and means over them.

    The loss is the softmax cross-entropy in nats; the accuracies are fractions. The balanced
    accuracy is the mean of the accuracies of all classes that have examples.
    """

    examples: int
    loss: float
    accuracy: float
    top5_accuracy: float
    balanced_accuracy: float


class Evaluator:
    """Evaluates models, and their ensemble, on the validation examples.

    The graph is traced once, however often the evaluator is called. The replicas' moving
    statistics are merged before each evaluation, so that all replicas use the same.

    Args:
      models: map images to logits.
      data: data set whose validation examples are evaluated.
      strategy: strategy in whose scope the models were made.
      global_batch_size: crops per step, over all replicas, but at least one image per replica; the
        last step is padded. A replica's part of it limits the batch of a model call: see
        `make_scorer`.
      crops: crops of each image.
      class_names: classes of the models' outputs, in order, which contain those of the data; None:
        the classes of the data.

    Attributes:
      predictions: predictions of the last evaluation, for each of its results.

    Raises:
      UsageError: the replicas do not divide global_batch_size.
    """

    predictions: list[Predictions]

    def __init__(
        self,
        models: Sequence[keras.Model],
        data: pipeline.Data,
        strategy: tf.distribute.Strategy,
        global_batch_size: int,
        crops: Crops = SINGLE_CROP,
        class_names: Sequence[str] | None = None,
    ) -> None:
        pipeline.check_divides(strategy, global_batch_size)
        self._models = models
        self._data = data
        names = data.class_names if class_names is None else class_names
        # The output of each class of the data.
        self._outputs = [names.index(name) for name in data.class_names]
        self._strategy = strategy
        replicas = strategy.num_replicas_in_sync
        per_replica_batch_size = global_batch_size // replicas
        self._images_per_step = replicas * max(1, per_replica_batch_size // crops.count)
        preprocessing = CropPreprocessing(data.preprocessing, crops)
        self._batches, self._num_steps = data.validation_batches(
            strategy, self._images_per_step, preprocessing
        )
        self._score = make_scorer(models, preprocessing, per_replica_batch_size)
        num_rows = len(models) + (len(models) > 1)
        with strategy.scope():
            # A row for each model and one for the ensemble: examples, loss, hits, top-5 hits.
            self._sums = per_replica_sum([num_rows, 4])
            # Each replica fills in its examples: 1, or 0 for padding; label; predicted class; its
            # probability.
            self._table = per_replica_sum([self._num_steps * self._images_per_step, num_rows, 4])

    def __call__(self, label: str = "") -> list[EvaluationMetrics]:
        """Evaluates all models.

        Args:
          label: text beside a progress bar; "" shows no bar.

        Returns:
          The metrics of each model and, if there are several, those of their ensemble.

        Raises:
          UsageError: no validation image can be read, or too many cannot.
        """
        for model in self._models:
            merge_moving_statistics(model, self._strategy)
        self._sums.assign(tf.zeros_like(self._sums))
        self._table.assign(tf.zeros_like(self._table))
        self._data.begin_validation()
        self._run_all_steps(label)
        rows = self._sums.read_value().numpy().tolist()
        for num_examples, *_ in rows:
            self._data.check_counted(num_examples)
        self.predictions = _read_table(self._table.read_value().numpy())
        return [
            EvaluationMetrics(
                examples=int(examples),
                loss=loss / examples,
                accuracy=hits / examples,
                top5_accuracy=top5_hits / examples,
                balanced_accuracy=predictions.balanced_accuracy(),
            )
            for (examples, loss, hits, top5_hits), predictions in zip(
                rows, self.predictions, strict=True
            )
        ]

    def _run_all_steps(self, label: str) -> None:
        iterator = iter(self._batches)
        steps_per_update = math.ceil(self._num_steps / (_PROGRESS_UPDATES if label else 1))
        total = self._data.num_validation_examples
        bar = progress_bar(label, total, unit=" images", is_shown=bool(label))
        # Tracing explicitly avoids the warning about retracing, which every evaluator does once.
        run_steps = self._run_steps.get_concrete_function(iterator, tf.constant(0), tf.constant(1))
        with bar, self._data.reporting_errors():
            for start in range(0, self._num_steps, steps_per_update):
                steps = min(steps_per_update, self._num_steps - start)
                run_steps(iterator, tf.constant(start), tf.constant(steps))
                bar.update(min(steps * self._images_per_step, total - bar.n))

    @tf.function
    def _run_steps(
        self, iterator: tf.distribute.DistributedIterator, start: tf.Tensor, steps: tf.Tensor
    ) -> None:
        for step in tf.range(start, start + steps):
            self._strategy.run(self._add_batch, args=(*next(iterator), step))

    # AutoGraph would take a second at every start, and has nothing to convert here.
    @tf.autograph.experimental.do_not_convert
    def _add_batch(
        self, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, step: tf.Tensor
    ) -> None:
        """Adds a replica's part of a batch to the sums; weights are 1, or 0 for padding."""
        scores = self._score(images)
        labels = tf.gather(self._outputs, labels)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.broadcast_to(labels, scores.shape[:2]), scores
        )
        # Unlike tf.math.in_top_k, top_k ranks classes with equal scores: not all of them are hits.
        values, best = tf.nn.top_k(scores, k=min(5, scores.shape[-1]))
        hits = tf.cast(best == labels[:, tf.newaxis], tf.float32)
        per_example = [tf.ones_like(losses), losses, hits[..., 0], tf.reduce_sum(hits, axis=-1)]
        self._sums.assign_add(tf.linalg.matvec(tf.stack(per_example, axis=1), weights))
        self._fill_in_table(labels, weights, best[..., 0], tf.exp(values[..., 0]), step)

    def _fill_in_table(
        self,
        labels: tf.Tensor,
        weights: tf.Tensor,
        classes: tf.Tensor,
        probabilities: tf.Tensor,
        step: tf.Tensor,
    ) -> None:
        """Adds a replica's predictions at the positions of its examples in the split."""
        size = labels.shape[0]
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        positions = step * self._images_per_step + replica * size + tf.range(size)
        columns = [tf.ones_like(probabilities), labels, classes, probabilities]
        values = tf.stack(
            [tf.broadcast_to(tf.cast(c, tf.float32), classes.shape) for c in columns], axis=-1
        )
        values = tf.where(
            weights[:, tf.newaxis, tf.newaxis] > 0, tf.transpose(values, [1, 0, 2]), 0
        )
        self._table.assign_add(
            tf.scatter_nd(positions[:, tf.newaxis], values, self._table.shape.as_list())
        )


def _read_table(table: np.ndarray) -> list[Predictions]:
    """Returns the predictions in each row of an evaluator's table, without the padding."""
    [indices] = np.nonzero(table[:, 0, 0])
    columns = np.moveaxis(table[indices], 0, -1)
    return [
        Predictions(indices, labels.astype(np.int64), classes.astype(np.int64), probabilities)
        for _, labels, classes, probabilities in columns
    ]


def make_scorer(
    models: Sequence[keras.Model], preprocessing: CropPreprocessing, max_batch_size: int
) -> Callable[[tf.Tensor | tuple[tf.Tensor, ...]], tf.Tensor]:
    """Builds a function that computes class probabilities, averaged over the crops of an image.

    The average is the arithmetic mean of probabilities, as in the paper, over crops and over the
    members of an ensemble. It is computed from logarithms, so that small probabilities do not
    underflow.

    Args:
      models: map images to logits.
      preprocessing: cuts the crops.
      max_batch_size: largest batch that a model is called with. The batch is the largest one up to
        this limit that divides the number of crops.

    Returns:
      A function from n inputs of `preprocessing.cut` to logarithms of probabilities, float32
      [rows, n, classes], with a row for each model and, for several models, a last row for their
      ensemble.
    """

    def score(images: tf.Tensor | tuple[tf.Tensor, ...]) -> tf.Tensor:
        crops = preprocessing.cut(images)
        rows = [
            _log_mean(tf.reshape(logs, [-1, preprocessing.crops.count, logs.shape[-1]]), axis=1)
            for logs in (_log_probabilities(model, crops, max_batch_size) for model in models)
        ]
        return tf.stack(rows if len(rows) == 1 else [*rows, _log_mean(tf.stack(rows), axis=0)])

    return score


def _log_probabilities(model: keras.Model, images: tf.Tensor, max_batch_size: int) -> tf.Tensor:
    """Calls a model on images [n, ...], in batches; returns float32 [n, classes]."""
    num_images = images.shape[0]
    batch_size = next(b for b in range(max_batch_size, 0, -1) if num_images % b == 0)

    def call(batch: tf.Tensor) -> tf.Tensor:
        return tf.nn.log_softmax(tf.cast(model(batch, training=False), tf.float32))

    if batch_size == num_images:
        return call(images)
    batches = tf.reshape(images, [-1, batch_size, *images.shape[1:]])
    # In sequence: each batch keeps the whole device busy.
    logs = tf.map_fn(call, batches, parallel_iterations=1)
    return tf.reshape(logs, [num_images, logs.shape[-1]])


def _log_mean(logs: tf.Tensor, axis: int) -> tf.Tensor:
    """Returns log(mean(exp(logs))) along an axis, without underflow."""
    return tf.reduce_logsumexp(logs, axis) - tf.math.log(float(logs.shape[axis]))
