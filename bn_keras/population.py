"""Population statistics of a trained network: Algorithm 2, lines 7 to 10."""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from bn_keras import ops
from bn_keras.batch_norm import BATCH_NORMS, BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.keras_internals import all_layers
from bn_keras.merge import merge_moving_statistics
from bn_keras.replicas import per_replica_sum


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """How far the moving statistics of one layer were from the population's.

    Over all channels, and over all replicas where these had moving statistics of their own.

    Attributes:
      layer: path of the layer in the model.
      channels: how many there are.
      mean_distance_average, mean_distance_largest: of |moving mean - E| / sqrt(Var + epsilon), in
        standard deviations of what comes into the layer.
      variance_ratio_smallest, variance_ratio_average, variance_ratio_largest: of
        (moving variance + epsilon) / (Var + epsilon); the average is the geometric one.
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
    """Moving against population statistics, a row for each layer; str() gives a table.

    Attributes:
      num_batches: how many batches of the dataset were taken.
      rows: in the order of the model's layers.
    """

    num_batches: int
    rows: tuple[LayerReport, ...]

    def __str__(self) -> str:
        head = ("layer", "channels", "average", "largest", "smallest", "average", "largest")
        body = [
            (name, str(channels), *(f"{number:.4g}" for number in numbers))
            for name, channels, *numbers in map(dataclasses.astuple, self.rows)
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
            for first, *rest in (head, *body)
        ]
        # Each over the last of its columns.
        end, ratio = len(lines[0]), sum(widths[-3:]) + 6
        above = "mean distance".rjust(end - ratio) + "variance ratio".rjust(ratio)
        return "\n".join(
            [
                f"Population statistics E, Var of num_batches={self.num_batches}",
                "mean distance: |moving mean - E| / sqrt(Var + epsilon)",
                "variance ratio: (moving variance + epsilon) / (Var + epsilon)",
                above,
                *lines,
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
    """Replaces the moving statistics of a trained network by those of the population.

    Training mini-batches B pass through the network in training mode, the parameters as they
    are; for each BatchNormalization in the model, ours or Keras', wherever it is nested,

      E[x] = E_B[mean_B],   Var[x] = E_B[m / (m - 1) * variance_B]

    with mean and biased variance over the m values of B: Bessel's correction enters here, once a
    mini-batch, whatever the layer's `unbiased` says.

    Decisions:
      - One pass for all layers: each sees the inputs that it sees in training, and so those that
        the layers before it make by the statistics of the mini-batch. The loop of Algorithm 2
        goes through the activations one by one, over this same training network.
      - Var[x] is the mean of the variances within the mini-batches, as the paper has it. The
        variance of all values pooled is larger by what the mini-batches' means differ beyond
        the chance of m independent draws, as they do where the values of one image resemble each
        other, or where a layer is used in several places. The variance within is what the network
        was trained to be normalized by.
      - Where mini-batches differ in size, each weighs by its values m; one of a single value
        counts in E[x] only. Sums run in float64, over means and variances, never over squares.
      - A mini-batch is what the layer normalizes together: each use of a shared layer, each ghost
        batch, and each replica's part, except that replicas which are synchronized make up one.
        What a mask leaves out is not in it. (keras.layers.RNN calls its cell once more for the
        first time step, which therefore counts twice, in training as here.)
      - Frozen layers, and layers that the model doesn't run through, keep their statistics.
      - Nothing else moves: what the pass itself changes, such as the generators of dropout (which
        do draw anew for each batch), is put back, on each replica. So it is, with the moving
        statistics, after any error.
      - The variances of keras.layers.BatchNormalization are as exact as that layer's own; with
        synchronized=True these cancel at large means, and replace_batch_norm is the remedy.

    Args:
      model: built.
      dataset: of batches as in training: inputs, or tuples of which the inputs come first. A
        tf.data.Dataset is distributed, its batches being global ones; what is distributed
        already, as an iterator too, is taken as it is. One replica takes any iterable.
      num_batches: how many batches are taken, >= 1.
      strategy: under which the model was made; None is the one that the model remembers.
      update: False leaves the moving statistics too, and only reports.

    Returns:
      How far the moving statistics were from the population's.

    Raises:
      UsageError: the dataset ended early, no mini-batch of a layer had two values, the
        statistics aren't finite, or there is no layer to estimate.

    Source: Ioffe & Szegedy 2015, Algorithm 2, lines 7 to 10.
    """
    return PopulationEstimator(model, strategy).estimate(dataset, num_batches, update=update)


class PopulationEstimator:
    """As estimate_population_statistics, traced once however often it is called.

    Which layers are frozen is read here, at the start.

    Args:
      model, strategy: as there.

    Raises:
      UsageError: no layer to estimate.
    """

    def __init__(self, model: keras.Model, strategy: tf.distribute.Strategy | None = None) -> None:
        self._model = model
        self._strategy = strategy = strategy or model.distribute_strategy
        found = [layer for layer in all_layers(model) if isinstance(layer, BATCH_NORMS)]
        layers = [layer for layer in found if layer.built and layer.trainable]
        if not layers:
            raise UsageError(
                f"model {model.name!r} has no BatchNormalization to estimate:"
                f" {len(found)} found, of which none is both built and trainable"
            )
        with strategy.scope():
            self._sums = [_Sums(layer) for layer in layers]

        def run(inputs: object) -> None:
            strategy.run(lambda inputs: model(inputs, training=True), args=(inputs,))

        # Kept, with its trace. One more for whatever other size a last batch has.
        self._run = tf.function(run, reduce_retracing=True)

    def estimate(
        self, dataset: Iterable, num_batches: int, *, update: bool = True
    ) -> PopulationReport:
        """Estimates, as estimate_population_statistics."""
        if not (isinstance(num_batches, int | np.integer) and num_batches >= 1):
            raise UsageError(f"num_batches is {num_batches}: it has to be a whole number from 1 on")
        batches = distributed(dataset, self._strategy)
        with preserved_state(self._model, self._strategy):
            self._pass(batches, num_batches)
        estimated = [sums for sums in self._sums if sums.is_used]
        statistics = [sums.population() for sums in estimated]
        rows = [
            _compare(sums.layer, *population, self._strategy)
            for sums, population in zip(estimated, statistics, strict=True)
        ]
        if update:
            for sums, population in zip(estimated, statistics, strict=True):
                _assign(sums.layer, *population, self._strategy)
        return PopulationReport(num_batches, tuple(rows))

    @contextlib.contextmanager
    def applied(self, dataset: Iterable, num_batches: int) -> Iterator[PopulationReport]:
        """Has the model hold population statistics for a while, and its own again afterwards.

        The replicas' moving statistics are merged first, as they are for an evaluation by these.

        Args:
          dataset, num_batches: as estimate_population_statistics.
        """
        merge_moving_statistics(self._model, self._strategy)
        with preserved_state(self._model, self._strategy):
            yield self.estimate(dataset, num_batches)

    def _pass(self, batches: Iterable, num_batches: int) -> None:
        """Sums over batches, whatever the model's state may become of it."""
        seen = 0
        with (
            contextlib.ExitStack() as observed,
            tqdm(
                desc="population statistics",
                total=num_batches,
                unit="batch",
                disable=not sys.stderr.isatty(),
                # Goes again where it stands below another one, such as a training's.
                leave=None,
                dynamic_ncols=True,
            ) as bar,
        ):
            for sums in self._sums:
                sums.reset()
                # All through, since a batch of another shape is traced anew.
                observed.enter_context(_observed(sums.layer, sums.add))
            for batch in itertools.islice(batches, num_batches):
                self._run(batch[0] if isinstance(batch, tuple) else batch)
                bar.update()
                seen += 1
        if seen < num_batches:
            raise UsageError(
                f"the dataset ended after {seen} of num_batches={num_batches} batches: lower"
                " num_batches, or repeat() the dataset"
            )


@contextlib.contextmanager
def preserved_state(
    model: keras.Model, strategy: tf.distribute.Strategy | None = None
) -> Iterator[None]:
    """Puts every variable of the model back at the end, on each replica.

    Around an estimate and an evaluation, training goes on as though there had been neither.

    Args:
      model: built.
      strategy: under which it was made; None is the one that the model remembers.
    """
    strategy = strategy or model.distribute_strategy
    saved = [(c, c.numpy()) for v in model.variables for c in _components(v, strategy)]
    try:
        yield
    finally:
        for component, value in saved:
            component.assign(value)


class _Sums:
    """What a layer's mini-batches add up to, each replica by itself; reading sums over them.

    Args:
      layer: whose statistics these are.
    """

    def __init__(self, layer: keras.Layer) -> None:
        self.layer = layer
        # Whether the model runs through the layer, as its trace shows.
        self.is_used = False
        channels = int(np.prod(layer.moving_mean.shape))
        # Of m, of m * mean, of the m above 1, and of these m times the unbiased variance.
        self._sums = per_replica_sum([4, channels], tf.float64)

    def reset(self) -> None:
        self._sums.assign(tf.zeros_like(self._sums))

    def add(self, moments: ops.Moments, if_: bool | tf.Tensor = True) -> None:
        """Adds the G mini-batches of one call.

        Replicas that are synchronized add the same; that scales all four sums alike.
        """
        self.is_used = True
        count, mean, variance = (tf.cast(t, tf.float64) for t in moments)
        count = tf.broadcast_to(count * tf.cast(if_, tf.float64), tf.shape(mean))
        several = tf.where(count > 1, count, 0)
        # Bessel's correction enters here.
        unbiased = variance * tf.math.divide_no_nan(several, several - 1)
        rows = tf.stack([count, count * mean, several, several * unbiased])
        self._sums.assign_add(tf.reduce_sum(rows, axis=1))

    def population(self) -> tuple[np.ndarray, np.ndarray]:
        """Gives E[x] and Var[x], float64 [C]."""
        values, mean, several, variance = self._sums.read_value().numpy()
        if not np.all(several > 0):
            raise UsageError(
                f"layer {self.layer.path!r} saw no mini-batch of two values or more in each"
                " channel, which an unbiased variance takes: give larger batches, or more of them"
            )
        mean, variance = mean / values, variance / several
        if not np.all(np.isfinite([mean, variance])):
            raise UsageError(
                f"the statistics of layer {self.layer.path!r} are not finite: look for NaN or"
                " infinity in the data and in the parameters"
            )
        return mean, variance


@contextlib.contextmanager
def _observed(
    layer: keras.Layer, add: Callable[[ops.Moments, bool | tf.Tensor], None]
) -> Iterator[None]:
    """Hands the moments of each training-mode call to `add`."""
    if isinstance(layer, BatchNormalization):
        # In the place of the moving average.
        name, observer = "update_moving_statistics", add
    else:
        name, observer = "_moments", functools.partial(_observed_moments, layer, add)
    setattr(layer, name, observer)
    try:
        yield
    finally:
        # The class' own comes to light again.
        delattr(layer, name)


def _observed_moments(
    layer: keras.layers.BatchNormalization,
    add: Callable[[ops.Moments], None],
    inputs: tf.Tensor,
    mask: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Is keras.layers.BatchNormalization._moments, observed."""
    mean, variance = type(layer)._moments(layer, inputs, mask)
    if mask is None:
        count = tf.cast([tf.size(inputs) // inputs.shape[layer.axis]], tf.float64)
        if layer.synchronized:
            context = tf.distribute.get_replica_context()
            count = context.all_reduce(tf.distribute.ReduceOp.SUM, count)
    else:
        # With a mask, Keras synchronizes nothing.
        counted = tf.cast(tf.cast(mask, tf.bool), tf.float64)[..., tf.newaxis]
        counted = tf.broadcast_to(counted, tf.shape(inputs))
        count = tf.reduce_sum(counted, axis=layer._reduction_axes)
    # Of an empty batch Keras makes NaN.
    seen = [tf.where(count > 0, tf.reshape(t, [-1]), 0) for t in (mean, variance)]
    add(ops.Moments(*(t[tf.newaxis] for t in (count, *seen))))
    return mean, variance


def distributed(dataset: Iterable, strategy: tf.distribute.Strategy) -> Iterable:
    """Gives the dataset as replicas can share it; one replica takes it as it is."""
    already = (tf.distribute.DistributedDataset, tf.distribute.DistributedIterator)
    if strategy.num_replicas_in_sync == 1 or isinstance(dataset, already):
        return dataset
    if not isinstance(dataset, tf.data.Dataset):
        raise UsageError(
            f"dataset is a {type(dataset).__name__}, which {strategy.num_replicas_in_sync} replicas"
            " can't share: give a tf.data.Dataset of global batches, or a distributed dataset"
        )
    return strategy.experimental_distribute_dataset(dataset)


def _compare(
    layer: keras.Layer,
    mean: np.ndarray,
    variance: np.ndarray,
    strategy: tf.distribute.Strategy,
) -> LayerReport:
    moving_mean, moving_variance = (
        np.stack([c.numpy().astype(np.float64).ravel() for c in _components(v, strategy)])
        for v in (layer.moving_mean, layer.moving_variance)
    )
    distance = np.abs(moving_mean - mean) / np.sqrt(variance + layer.epsilon)
    ratio = (moving_variance + layer.epsilon) / (variance + layer.epsilon)
    return LayerReport(
        layer.path,
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
        # From which the next training step would make the moving variance.
        values.append((layer.moving_stddev, np.sqrt(variance + layer.epsilon)))
    for variable, value in values:
        for component in _components(variable, strategy):
            component.assign(value.reshape(variable.shape).astype(variable.dtype))


def _components(
    variable: keras.Variable, strategy: tf.distribute.Strategy
) -> Sequence[tf.Variable]:
    """Gives the variable of each of this process' replicas."""
    return strategy.experimental_local_results(variable.value)
