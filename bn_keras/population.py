"""Population statistics of a trained network: Algorithm 2, lines 7 to 10."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bn_keras import ops
from bn_keras.arguments import as_positive_integer, check_model
from bn_keras.batch_norm import BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.keras_internals import (
    all_variables,
    batch_norm_layers,
    layer_names,
    observed_moments,
    replaced_method,
    without_traces,
)
from bn_keras.replicas import per_replica_sum
from bn_keras.text import align, first_line


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Distance of one layer's moving statistics from the population statistics E and Var.

    Covers all channels, and all replicas if each has moving statistics of its own.

    Attributes:
      layer: name of the layer, unique in the model: its path, with the names of nested models in
        front if several layers have this path.
      channels: number of channels.
      mean_distance_average, mean_distance_largest: |moving mean - E| / sqrt(Var + epsilon), in
        standard deviations of the layer's input.
      variance_ratio_smallest, variance_ratio_average, variance_ratio_largest:
        (moving variance + epsilon) / (Var + epsilon); the average is geometric.
    """

    layer: str
    channels: int
    mean_distance_average: float
    mean_distance_largest: float
    variance_ratio_smallest: float
    variance_ratio_average: float
    variance_ratio_largest: float


@dataclasses.dataclass(frozen=True)
class PopulationReport:
    """Moving statistics compared with population statistics; str() formats a table.

    Attributes:
      num_batches: number of batches read from the dataset.
      rows: one per layer, in the order of the model's layers.
    """

    num_batches: int
    rows: tuple[LayerReport, ...]

    def __str__(self) -> str:
        header = ("layer", "channels", "average", "largest", "smallest", "average", "largest")
        body = [
            (name, str(channels), *(f"{number:.4g}" for number in numbers))
            for name, channels, *numbers in map(dataclasses.astuple, self.rows)
        ]
        rows = align([header, *body])
        # Each title ends with the last column that it covers.
        distance_end, ratio_end = (len("  ".join(rows[0][:stop])) for stop in (4, 7))
        titles = "mean distance".rjust(distance_end) + "variance ratio".rjust(
            ratio_end - distance_end
        )
        return "\n".join(
            [
                f"Population statistics E, Var over num_batches={self.num_batches}",
                "mean distance: |moving mean - E| / sqrt(Var + epsilon)",
                "variance ratio: (moving variance + epsilon) / (Var + epsilon)",
                titles,
                *("  ".join(cells) for cells in rows),
            ]
        )


def estimate_population_statistics(
    model: keras.Model,
    dataset: Iterable,
    num_batches: int,
    strategy: tf.distribute.Strategy | None = None,
    *,
    update: bool = True,
) -> PopulationReport:
    """Replaces the moving statistics of a trained network with population statistics.

    Training mini-batches B pass through the network in training mode, with fixed parameters. For
    each BatchNormalization layer of this package or of Keras, at any depth,

      E[x] = E_B[mean_B],   Var[x] = E_B[m / (m - 1) * variance_B]

    where mean_B and the biased variance_B are over the m values of B. Bessel's correction enters
    here, once per mini-batch, whatever the layer's `unbiased`.

    Decisions:
      - One pass estimates all layers. Each layer sees its training-mode inputs, which earlier
        layers normalize by mini-batch statistics. Algorithm 2 loops over the activations, but each
        time runs the same training network, so the result is the same.
      - Var[x] averages the variances within mini-batches, as in the paper, because training
        normalized by them. The variance of all values pooled is larger if the means of mini-batches
        differ by more than those of m independent samples, for example because the values of one
        image resemble each other or because a layer is used in several places.
      - A mini-batch is weighted by its number of values m. A single value counts in E[x] only.
        Means and variances are summed in float64; squares are never summed.
      - A mini-batch is what the layer normalizes together: each use of a shared layer, each ghost
        batch, and each replica's part, except that synchronized replicas form one mini-batch.
        Masked values are excluded. (keras.layers.RNN calls its cell an additional time for the
        first time step, which therefore counts twice, in training as here.)
      - Frozen layers, and layers that the model does not run, keep their statistics.
      - Nothing else changes. Other state that the pass modifies is restored on each replica, such
        as the seed generators of dropout (dropout still draws a new mask for each batch) and the
        states of recurrent layers. After an error the moving statistics are restored too.
      - For keras.layers.BatchNormalization, the moments are those that the layer computes. With
        synchronized=True it loses digits at large means; replace_batch_norm fixes this.

    Args:
      model: built model.
      dataset: batches as in training: inputs, or tuples that begin with the inputs. A
        tf.data.Dataset of global batches is distributed. A distributed dataset or iterator is used
        as it is. A single replica accepts any iterable.
      num_batches: number of batches to read, >= 1.
      strategy: strategy that the model was created under; None means the one that the model
        remembers.
      update: whether to assign the statistics; False only reports.

    Returns:
      Distance of the moving statistics, as they were before, from the population statistics.

    Raises:
      UsageError: `model` is not a keras.Model, num_batches is not a positive integer, several
        replicas cannot share the dataset, the dataset ends early, a layer has no mini-batch of two
        values, the statistics are not finite, or no layer can be estimated or runs in training
        mode.

    Source: Ioffe & Szegedy 2015, Algorithm 2, lines 7 to 10.
    """
    return PopulationEstimator(model, strategy).estimate(dataset, num_batches, update=update)


class PopulationEstimator:
    """Repeats estimate_population_statistics without tracing the model again.

    The layers to estimate are chosen at construction; freezing a layer later has no effect.

    Args:
      model, strategy: see estimate_population_statistics.

    Raises:
      UsageError: no layer to estimate.
    """

    def __init__(self, model: keras.Model, strategy: tf.distribute.Strategy | None = None) -> None:
        check_model(model)
        self._model = model
        self._strategy = strategy = strategy or model.distribute_strategy
        found = batch_norm_layers(model)
        layers = [layer for layer in found if layer.built and layer.trainable]
        if not found:
            raise UsageError(
                f"model {model.name!r} has no BatchNormalization, and hence no statistics to"
                " estimate"
            )
        if not layers:
            raise UsageError(
                f"model {model.name!r} has no BatchNormalization to estimate:"
                f" {len(found)} found, none both built and trainable; call the model once, and set"
                " trainable=True on the layers to estimate"
            )
        names = layer_names(model)
        with strategy.scope():
            self._sums = [_MomentSums(layer, names[layer]) for layer in layers]

        def run(inputs: Any) -> None:
            strategy.run(lambda inputs: model(inputs, training=True), args=(inputs,))

        # reduce_retracing: a smaller last batch adds a single trace.
        self._run = tf.function(run, reduce_retracing=True, autograph=False)

    def estimate(
        self, dataset: Iterable, num_batches: int, *, update: bool = True
    ) -> PopulationReport:
        """Estimates the statistics; see estimate_population_statistics."""
        num_batches = as_positive_integer("num_batches", num_batches)
        batches = distribute_dataset(dataset, self._strategy)
        with preserved_state(self._model, self._strategy):
            self._sum_moments(batches, num_batches)
        estimated = [(sums, *sums.compute_population()) for sums in self._sums if sums.is_used]
        if not estimated:
            raise UsageError(
                f"model {self._model.name!r} calls no BatchNormalization in training mode: its call"
                " must pass `training` on to its layers"
            )
        rows = [
            _compare(sums.name, sums.layer, mean, variance, self._strategy)
            for sums, mean, variance in estimated
        ]
        if update:
            for sums, mean, variance in estimated:
                _assign(sums.layer, mean, variance, self._strategy)
        return PopulationReport(num_batches, tuple(rows))

    def find_trained_layers(self, inputs: Any) -> list[keras.Layer]:
        """Returns the layers that the model calls in training mode, without running the model.

        Args:
          inputs: the inputs of one batch, distributed over the replicas.
        """
        with self._observed_layers(), reporting_rejected_inputs(self._model):
            # `estimate` uses this trace.
            self._run.get_concrete_function(inputs)
        return [sums.layer for sums in self._sums if sums.is_used]

    @contextlib.contextmanager
    def _observed_layers(self) -> Iterator[None]:
        """Adds the moments of each call inside a `with` block to the sums."""
        with contextlib.ExitStack() as stack:
            for sums in self._sums:
                stack.enter_context(_observed(sums.layer, sums.add))
            stack.enter_context(without_traces(self._model))
            yield

    def _sum_moments(self, batches: Iterable, num_batches: int) -> None:
        """Runs the model on batches and sums their moments; may change the model's state."""
        num_read = 0
        for sums in self._sums:
            sums.reset()
        # Observed during the whole loop, because a batch of another shape is retraced.
        with _progress_bar(num_batches) as advance, self._observed_layers():
            for batch in itertools.islice(batches, num_batches):
                with reporting_rejected_inputs(self._model):
                    self._run(batch[0] if isinstance(batch, tuple) else batch)
                advance()
                num_read += 1
        if num_read < num_batches:
            raise UsageError(
                f"the dataset ended after {num_read} of num_batches={num_batches} batches: lower"
                " num_batches, or repeat() the dataset"
            )


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[], Any]]:
    """Yields a function to call after each batch.

    It advances a bar if stderr is a terminal and tqdm is installed.
    """
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        yield lambda: None
        return
    from tqdm import tqdm

    # leave=None removes the bar at the end if it is below another one, such as the trainer's.
    with tqdm(
        desc="population statistics", total=total, unit="batch", leave=None, dynamic_ncols=True
    ) as bar:
        yield bar.update


@contextlib.contextmanager
def reporting_rejected_inputs(
    model: keras.Model,
    inputs: str = "a batch of the dataset",
    advice: str = "expected batches as in training",
) -> Iterator[None]:
    """Raises UsageError if a `with` block fails because the model does not accept its inputs."""
    try:
        yield
    except UsageError as error:
        # Keras adds lines to the error of a layer.
        raise UsageError(first_line(error)) from error
    except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
        raise UsageError(
            f"model {model.name!r} does not accept {inputs} ({first_line(error)}): {advice}"
        ) from error


@contextlib.contextmanager
def preserved_state(
    model: keras.Model, strategy: tf.distribute.Strategy | None = None
) -> Iterator[None]:
    """Restores every variable of the model on exit from a `with` block, on each replica.

    This includes variables that Keras does not list, except those of the optimizer. An estimate and
    an evaluation inside the block do not affect training.

    Args:
      model: built model.
      strategy: strategy that the model was created under; None means the one that the model
        remembers.
    """
    strategy = strategy or model.distribute_strategy
    saved = [(c, c.numpy()) for v in all_variables(model) for c in _local_variables(v, strategy)]
    try:
        yield
    finally:
        for component, value in saved:
            component.assign(value)


class _MomentSums:
    """Sums the moments of one layer over mini-batches, and over replicas.

    Attributes:
      layer: the layer whose moments are added.
      name: its name in reports.
      is_used: whether the model runs the layer, known once the model is traced.
    """

    def __init__(self, layer: keras.Layer, name: str) -> None:
        self.layer = layer
        self.name = name
        self.is_used = False
        channels = int(np.prod(layer.moving_mean.shape))
        # Rows: sums of m, of m * mean, of m where m > 1, and of m * unbiased variance where m > 1.
        self._sums = per_replica_sum([4, channels], tf.float64)

    def reset(self) -> None:
        self._sums.assign(tf.zeros_like(self._sums))

    def add(self, moments: ops.Moments, training: bool | tf.Tensor = True) -> None:
        """Adds the mini-batches of one call, if `training`.

        Synchronized replicas add the same values, which scales all four sums alike.
        """
        self.is_used = True
        count, mean, variance = (tf.cast(t, tf.float64) for t in moments)
        if mean.shape.rank == 1:
            # A batch without ghost batches is a single mini-batch.
            mean, variance = mean[tf.newaxis], variance[tf.newaxis]
        count = tf.broadcast_to(count * tf.cast(training, tf.float64), tf.shape(mean))
        several = tf.where(count > 1, count, 0)
        # Bessel's correction enters here.
        unbiased = variance * tf.math.divide_no_nan(several, several - 1)
        rows = tf.stack([count, count * mean, several, several * unbiased])
        self._sums.assign_add(tf.reduce_sum(rows, axis=1))

    def compute_population(self) -> tuple[np.ndarray, np.ndarray]:
        """Computes E[x] and Var[x], float64 [C]."""
        count, mean, several, variance = self._sums.read_value().numpy()
        if not np.all(several > 0):
            raise UsageError(
                f"layer {self.name!r} saw no mini-batch with two or more values in each"
                " channel, which an unbiased variance needs: use larger batches, or more of them"
            )
        mean, variance = mean / count, variance / several
        if not np.all(np.isfinite([mean, variance])):
            raise UsageError(
                f"the statistics of layer {self.name!r} are not finite: look for NaN or"
                " infinity in the data and in the parameters"
            )
        return mean, variance


def find_layers_called_in_training_mode(
    model: keras.Model, layers: Iterable[keras.Layer], inputs: Any, training: bool
) -> list[keras.Layer]:
    """Returns the layers that a model calls in training mode, without running the model.

    Args:
      model: built model.
      layers: BatchNormalization layers of the model that are not frozen.
      inputs: one batch.
      training: the mode in which the model itself is called.
    """
    found: dict[keras.Layer, None] = {}

    def note(layer: keras.Layer, *arguments: Any, **keywords: Any) -> None:
        found[layer] = None

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_observed(layer, functools.partial(note, layer)))
        stack.enter_context(without_traces(model))
        call = tf.function(lambda inputs: model(inputs, training=training), autograph=False)
        call.get_concrete_function(inputs)
    return list(found)


def _observed(
    layer: keras.Layer, add: Callable[..., None]
) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which each training-mode call of the layer passes its moments to `add`.

    A layer of this package then does not update its moving statistics.
    """
    if isinstance(layer, BatchNormalization):
        return replaced_method(layer, "update_moving_statistics", add)
    return observed_moments(layer, functools.partial(_add_keras_moments, layer, add))


def _add_keras_moments(
    layer: keras.layers.BatchNormalization,
    add: Callable[..., None],
    inputs: tf.Tensor,
    mask: tf.Tensor | None,
    mean: tf.Tensor,
    variance: tf.Tensor,
) -> None:
    """Passes the moments of one call of keras.layers.BatchNormalization to `add`."""
    if mask is None:
        count = tf.cast([tf.size(inputs, tf.int64) // inputs.shape[layer.axis]], tf.float64)
        if layer.synchronized:
            context = tf.distribute.get_replica_context()
            count = context.all_reduce(tf.distribute.ReduceOp.SUM, count)
    else:
        # Keras does not synchronize masked batches.
        counted = tf.cast(tf.cast(mask, tf.bool), tf.float64)[..., tf.newaxis]
        counted = tf.broadcast_to(counted, tf.shape(inputs))
        reduction_axes = list(range(inputs.shape.rank))
        del reduction_axes[layer.axis]
        count = tf.reduce_sum(counted, axis=reduction_axes)
    # For an empty batch Keras returns NaN.
    finite = [tf.where(count > 0, tf.reshape(t, [-1]), 0) for t in (mean, variance)]
    add(ops.Moments(count, *finite))


def distribute_dataset(dataset: Iterable, strategy: tf.distribute.Strategy) -> Iterable:
    """Returns the dataset distributed over the replicas; a single replica needs no change.

    Raises:
      UsageError: the dataset is no iterable of batches, or there are several replicas, and it is
        neither a tf.data.Dataset nor distributed.
    """
    if isinstance(dataset, np.ndarray | tf.Tensor | dict | str) or not isinstance(
        dataset, Iterable
    ):
        raise UsageError(
            f"dataset has type {type(dataset).__name__}: expected an iterable of batches, such as a"
            " tf.data.Dataset or [images]"
        )
    is_distributed = isinstance(
        dataset, tf.distribute.DistributedDataset | tf.distribute.DistributedIterator
    )
    if strategy.num_replicas_in_sync == 1 or is_distributed:
        return dataset
    if not isinstance(dataset, tf.data.Dataset):
        raise UsageError(
            f"dataset is a {type(dataset).__name__}, which {strategy.num_replicas_in_sync} replicas"
            " cannot share: pass a tf.data.Dataset of global batches or a distributed dataset"
        )
    return strategy.experimental_distribute_dataset(dataset)


def _compare(
    name: str,
    layer: keras.Layer,
    mean: np.ndarray,
    variance: np.ndarray,
    strategy: tf.distribute.Strategy,
) -> LayerReport:
    moving_mean, moving_variance = (
        np.stack([c.numpy().astype(np.float64).ravel() for c in _local_variables(v, strategy)])
        for v in (layer.moving_mean, layer.moving_variance)
    )
    distance = np.abs(moving_mean - mean) / np.sqrt(variance + layer.epsilon)
    ratio = (moving_variance + layer.epsilon) / (variance + layer.epsilon)
    return LayerReport(
        name,
        mean.size,
        float(distance.mean()),
        float(distance.max()),
        float(ratio.min()),
        float(np.exp(np.log(ratio).mean())),
        float(ratio.max()),
    )


def _assign(
    layer: keras.Layer,
    mean: np.ndarray,
    variance: np.ndarray,
    strategy: tf.distribute.Strategy,
) -> None:
    values = [(layer.moving_mean, mean), (layer.moving_variance, variance)]
    if layer.renorm:
        # The next training step computes the moving variance from moving_stddev.
        values.append((layer.moving_stddev, np.sqrt(variance + layer.epsilon)))
    for variable, value in values:
        for component in _local_variables(variable, strategy):
            component.assign(value.reshape(variable.shape).astype(variable.dtype))
    counter = getattr(layer, "values_since_merge", None)
    if counter is not None:
        # A merge must not weight the replicas by values that the statistics no longer contain.
        counter.assign(0.0)


def _local_variables(
    variable: keras.Variable | tf.Variable, strategy: tf.distribute.Strategy
) -> Sequence[tf.Variable]:
    """Returns the variable of each replica of this process."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return strategy.experimental_local_results(value)
