"""The check-up of a trained network: what may be wrong with its BatchNormalization layers."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from bn_keras import fold
from bn_keras.batch_norm import BATCH_NORMS
from bn_keras.errors import UsageError
from bn_keras.keras_internals import all_layers
from bn_keras.population import (
    LayerReport,
    PopulationReport,
    distributed,
    estimate_population_statistics,
    preserved_state,
)

# A channel whose output deviates by less is dead. A layer fresh from its initialization gives 1;
# bfloat16, with a step of 2^-8, loses a thousandth beside a beta of one.
DEAD_DEVIATION = 1e-3
# Moving against population statistics, in the worst channel. Beyond a whole standard deviation, or
# half or double of it, more than the noise of few batches and of a short memory is at work.
LARGEST_MEAN_DISTANCE = 1.0
LARGEST_VARIANCE_RATIO = 4.0
# Training against inference outputs. At 1 they differ as much as examples do from their mean.
LARGEST_GAP = 1.0

# Channels that a line names before it breaks off.
_NAMED_CHANNELS = 6


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a check-up found.

    Attributes:
      layer: its path in the model; the model's name where the finding is of the outputs.
      kind: one of those of `check`.
      is_fault: a fault makes inference wrong or a layer useless; anything else is a note.
      text: what it is, for a reader.
      channels: the ones concerned, counted over the layer's parameters in their order; empty
        where it is no matter of single channels.
    """

    layer: str
    kind: str
    is_fault: bool
    text: str
    channels: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class HealthReport:
    """What a check-up found; str() gives a table of the findings, and a line in any case.

    Attributes:
      num_layers, num_channels: of the BatchNormalization layers.
      findings: in the order of the model's layers.
      population: moving against population statistics; None without data.
      gap: root mean square difference between training-mode and inference-mode outputs, in
        standard deviations of the former over the examples; None without data, or where the
        outputs are the same for all examples.
      skipped: what was not looked at, and why.
    """

    num_layers: int
    num_channels: int
    findings: tuple[Finding, ...]
    population: PopulationReport | None
    gap: float | None
    skipped: tuple[str, ...]

    @property
    def has_faults(self) -> bool:
        """Whether any of the findings is a fault."""
        return any(finding.is_fault for finding in self.findings)

    def __str__(self) -> str:
        rows = [("fault" if f.is_fault else "note", f.layer, f.text) for f in self.findings]
        width = max((len(layer) for _, layer, _ in rows), default=0)
        lines = [f"{severity:5}  {layer:{width}}  {text}" for severity, layer, text in rows]
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        faults = sum(finding.is_fault for finding in self.findings)
        notes = len(self.findings) - faults
        found = ", ".join([_counted(faults, "fault"), _counted(notes, "note")])
        layers = _counted(self.num_layers, "BN layer")
        channels = _counted(self.num_channels, "channel")
        parts = [f"{found if self.findings else 'healthy'}: {layers}, {channels}"]
        if self.population:
            parts.append(_against_population(*self.population.rows))
        if self.gap is not None:
            parts.append(f"gap {self.gap:.2g}")
        return "; ".join([*parts, *(f"skipped {what}" for what in self.skipped)])


def check(
    model: keras.Model,
    dataset: Iterable | None = None,
    num_batches: int = 20,
    strategy: tf.distribute.Strategy | None = None,
) -> HealthReport:
    """Examines the BatchNormalization layers of a trained network, ours or Keras'.

    The kinds of findings; f marks the faults:
      - "not_finite" f: NaN or infinity in a weight of any layer or, on the data, in the outputs.
      - "negative_variance" f: a moving variance below 0.
      - "never_updated" f: the moving statistics are exactly as they were initialized.
      - "dead": channels whose output hardly depends on the input: at inference it deviates by
        |gamma| * sqrt(moving variance / (moving variance + epsilon)) < DEAD_DEVIATION. A fault if
        all channels of a layer are.
      - "below_epsilon": channels, not dead, whose moving variance is less than epsilon, so that
        it is epsilon that they are mostly divided by.
      - "stale" f: in some channel the moving mean is more than LARGEST_MEAN_DISTANCE population
        standard deviations off, or the moving variance more than LARGEST_VARIANCE_RATIO times
        too large or too small (LayerReport says how both are measured).
      - "gap": outputs in training and inference mode differ by more than LARGEST_GAP although no
        layer's statistics are at fault, as they do where mini-batches are small, or alike in
        themselves (sorted data).
      - "unfoldable": fold_batch_norm would keep the layer.

    Decisions:
      - What follows from another finding is not one more: a layer that was never updated is not
        called stale as well, and one whose weights aren't finite is nothing else. Nothing is run
        where the outputs can't be finite.
      - For the gap, BatchNormalization alone is in training mode: dropout would only add noise.
        Frozen layers normalize the same in both modes.
      - The model is left as it was.

    Args:
      model: built.
      dataset: of batches as in training, as estimate_population_statistics takes it, to be gone
        through twice; None looks at the weights alone.
      num_batches: how many are taken for the population statistics, >= 1; few small ones make
        these noisy. The gap is of the first.
      strategy: under which the model was made; None is the one that the model remembers.

    Raises:
      UsageError: the model has no weights yet, or as estimate_population_statistics.
    """
    if not model.built:
        raise UsageError(f"model {model.name!r} has no weights yet: call it, or build it, first")
    layers = [layer for layer in _batch_norms(model) if layer.built]
    findings = _examine_weights(model, layers)
    population, gap, skipped = None, None, []
    obstacle = _obstacle_to_running(dataset, layers, findings)
    if obstacle:
        skipped.append(f"what takes data: {obstacle}")
    else:
        population, gap, found = _examine_running(model, dataset, num_batches, strategy, findings)
        findings += found
    try:
        findings += _unfoldable(model) if layers else []
    except UsageError as error:
        skipped.append(f"folding: {error}")

    order = {layer.path: i for i, layer in enumerate(all_layers(model, include_self=False))}
    # What is of the model as a whole comes last.
    findings.sort(key=lambda finding: order.get(finding.layer, math.inf))
    channels = sum(math.prod(layer.moving_mean.shape) for layer in layers)
    return HealthReport(len(layers), channels, tuple(findings), population, gap, tuple(skipped))


def _batch_norms(model: keras.Model) -> list[keras.Layer]:
    return [layer for layer in all_layers(model) if isinstance(layer, BATCH_NORMS)]


def _examine_weights(model: keras.Model, layers: Sequence[keras.Layer]) -> list[Finding]:
    findings = _not_finite(model)
    ill = {finding.layer for finding in findings}
    for layer in layers:
        if layer.path not in ill:
            findings += _examine_layer(layer)
    return findings


def _not_finite(model: keras.Model) -> list[Finding]:
    """Looks at every weight of the model, a layer at a time."""
    names = {}
    for variable in model.variables:
        if not np.isfinite(_float64(variable)).all():
            layer, _, name = variable.path.rpartition("/")
            names.setdefault(layer or model.name, []).append(name)
    return [
        Finding(layer, "not_finite", True, f"NaN or infinity in {', '.join(weights)}")
        for layer, weights in names.items()
    ]


def _examine_layer(layer: keras.Layer) -> list[Finding]:
    """Looks at the weights of one BatchNormalization, which are finite."""
    findings = []

    def add(kind: str, is_fault: bool, where: np.ndarray, text: str) -> None:
        channels = tuple(np.flatnonzero(where).tolist())
        if channels:
            text = f"{text}: {_named_channels(channels, where.size)}"
            findings.append(Finding(layer.path, kind, is_fault, text, channels))

    if _is_as_initialized(layer):
        text = "never updated: moving statistics as they were initialized"
        findings.append(Finding(layer.path, "never_updated", True, text))
    variance = _float64(layer.moving_variance).ravel()
    gamma = 1.0 if layer.gamma is None else _float64(layer.gamma).ravel()
    negative = variance < 0
    variance = np.maximum(variance, 0)
    deviation = np.abs(gamma) * np.sqrt(variance / (variance + layer.epsilon))
    dead = (deviation < DEAD_DEVIATION) & ~negative
    below = (variance < layer.epsilon) & ~dead & ~negative
    add("negative_variance", True, negative, "negative moving variance")
    add("dead", bool(dead.all()), dead, "dead")
    add("below_epsilon", False, below, f"variance below epsilon={layer.epsilon:g}")
    return findings


def _is_as_initialized(layer: keras.Layer) -> bool:
    """Tells whether the moving statistics were never moved; not where they began at random."""
    constant = (keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant)
    for name in ("moving_mean", "moving_variance"):
        initializer, variable = getattr(layer, f"{name}_initializer"), getattr(layer, name)
        if not isinstance(initializer, constant):
            return False
        if not np.array_equal(_float64(initializer(variable.shape)), _float64(variable)):
            return False
    return True


def _obstacle_to_running(
    dataset: Iterable | None, layers: Sequence[keras.Layer], findings: Sequence[Finding]
) -> str | None:
    """Says why nothing is run, if so."""
    if not layers:
        return "there is no BatchNormalization"
    if dataset is None:
        return "none was given"
    if any(finding.kind in ("not_finite", "negative_variance") for finding in findings):
        return "the weights give no outputs that are finite"
    if not any(layer.trainable for layer in layers):
        return "all layers are frozen, and so the same in training"
    return None


def _examine_running(
    model: keras.Model,
    dataset: Iterable,
    num_batches: int,
    strategy: tf.distribute.Strategy | None,
    findings: Sequence[Finding],
) -> tuple[PopulationReport | None, float | None, list[Finding]]:
    """Gives moving against population statistics, the gap, and what follows from both."""
    strategy = strategy or model.distribute_strategy
    batch = next(iter(distributed(dataset, strategy)), None)
    if batch is None:
        raise UsageError("the dataset is empty: give one with batches as in training")
    inputs = batch[0] if isinstance(batch, tuple) else batch
    by_moving = _outputs(model, inputs, strategy)
    if not all(np.isfinite(y).all() for y in by_moving):
        text = "NaN or infinity in the outputs"
        return None, None, [Finding(model.name, "not_finite", True, text)]
    with preserved_state(model, strategy), _normalizing_by_the_batch(model):
        by_batch = _outputs(model, inputs, strategy)
    gap = _gap(by_batch, by_moving)
    population = estimate_population_statistics(model, dataset, num_batches, strategy, update=False)

    never_updated = {f.layer for f in findings if f.kind == "never_updated"}
    found = [_stale(row) for row in population.rows if row.layer not in never_updated]
    found = [finding for finding in found if finding]
    if gap is not None and gap > LARGEST_GAP and not (never_updated or found):
        text = (
            f"outputs in training and inference {gap:.2g} apart: small or one-sided mini-batches?"
        )
        found.append(Finding(model.name, "gap", False, text))
    return population, gap, found


def _stale(row: LayerReport) -> Finding | None:
    ratio = max(row.variance_ratio_largest, 1 / row.variance_ratio_smallest)
    if row.mean_distance_largest <= LARGEST_MEAN_DISTANCE and ratio <= LARGEST_VARIANCE_RATIO:
        return None
    return Finding(row.layer, "stale", True, f"stale: {_against_population(row)}")


def _against_population(*rows: LayerReport) -> str:
    distance = max(row.mean_distance_largest for row in rows)
    smallest = min(row.variance_ratio_smallest for row in rows)
    largest = max(row.variance_ratio_largest for row in rows)
    return f"mean off by {distance:.2g} sd, variance {smallest:.2g} to {largest:.2g} times"


def _unfoldable(model: keras.Model) -> list[Finding]:
    return [
        Finding(path, "unfoldable", False, f"does not fold: {reason}")
        for path, reason in fold.unfoldable(model).items()
    ]


def _outputs(
    model: keras.Model, inputs: object, strategy: tf.distribute.Strategy
) -> list[np.ndarray]:
    """Gives each output in inference mode, [N, ...] over all replicas."""

    @tf.function
    def run(inputs: object) -> object:
        return strategy.run(lambda inputs: model(inputs, training=False), args=(inputs,))

    # A trace for this one call, which TensorFlow warns of only where it is left to find that out.
    outputs = run.get_concrete_function(inputs)(inputs)
    return [
        np.concatenate([_float64(y) for y in strategy.experimental_local_results(output)])
        for output in tf.nest.flatten(outputs)
    ]


@contextlib.contextmanager
def _normalizing_by_the_batch(model: keras.Model) -> Iterator[None]:
    """Has each BatchNormalization, and nothing else, in training mode in whatever call."""
    layers = _batch_norms(model)

    def in_training_mode(layer: keras.Layer) -> None:
        def call(inputs: tf.Tensor, training: object = None, mask: object = None) -> tf.Tensor:
            return type(layer).call(layer, inputs, training=True, mask=mask)

        layer.call = call

    try:
        for layer in layers:
            in_training_mode(layer)
        yield
    finally:
        for layer in layers:
            # The class' own comes to light again.
            vars(layer).pop("call", None)


def _gap(by_batch: Sequence[np.ndarray], by_moving: Sequence[np.ndarray]) -> float | None:
    """Gives the largest over the outputs; None where an output is the same for all examples."""
    gaps = []
    for training, inference in zip(by_batch, by_moving, strict=True):
        spread = np.sqrt(np.mean(np.square(training - training.mean(axis=0))))
        if spread == 0:
            return None
        gaps.append(float(np.sqrt(np.mean(np.square(training - inference))) / spread))
    return max(gaps)


def _named_channels(channels: Sequence[int], total: int) -> str:
    if len(channels) == total:
        return f"all of {_counted(total, 'channel')}"
    named = ", ".join(map(str, channels[:_NAMED_CHANNELS]))
    more = ", ..." if len(channels) > _NAMED_CHANNELS else ""
    return f"{len(channels)} of {_counted(total, 'channel')} ({named}{more})"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _float64(values: object) -> np.ndarray:
    return keras.ops.convert_to_numpy(values).astype(np.float64)
