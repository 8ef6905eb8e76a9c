"""Checks the BatchNormalization layers of a trained network for common faults."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bn_keras.agreement import has_numbers, to_float64
from bn_keras.arguments import check_model
from bn_keras.errors import UsageError
from bn_keras.fold import unfoldable_layers
from bn_keras.keras_internals import (
    all_layers,
    batch_norm_layers,
    layer_names,
    replaced_method,
    without_traces,
)
from bn_keras.population import (
    LayerReport,
    PopulationEstimator,
    PopulationReport,
    distribute_dataset,
    preserved_state,
    reporting_rejected_inputs,
)
from bn_keras.text import counted, first_of

# A channel is dead if the standard deviation of its output is smaller. After initialization it is
# 1. Next to a beta of 1, bfloat16 rounds a deviation of 1e-3 away.
MIN_STDDEV = 1e-3
# Limits for the worst channel of a layer: the moving mean is one standard deviation off, and the
# moving standard deviation is half or twice the population's. The noise of few batches or of a low
# momentum is smaller.
MAX_MEAN_DISTANCE = 1.0
MAX_VARIANCE_RATIO = 4.0
# Limit for the difference between training-mode and inference-mode outputs. At 1, they differ as
# much as the examples do from their mean.
MAX_GAP = 1.0

_LISTED_CHANNELS = 6

# The meaning of each kind of finding and what to do about it; docs/convert.md explains them.
_ADVICE_ON_FAULTS = {
    "not_finite": "The network diverged, and its outputs are invalid: resume from an earlier"
    " checkpoint with a lower learning rate.",
    "not_finite_outputs": "Look for NaN in the inputs, for inputs of a wrong scale, and for"
    " overflow in float16.",
    "negative_variance": "A variance cannot be negative: the weights are damaged or were loaded in"
    " a wrong order (expected gamma, beta, moving_mean, moving_variance): load them again.",
    "never_updated": "Inference normalizes with these values instead of statistics of the data,"
    " and its outputs are wrong: train in training mode, as fit does, or call"
    " estimate_population_statistics.",
    "dead": "No signal passes through the layer: if gamma was initialized to 0, train"
    " for longer; otherwise train with a lower learning rate or less weight decay on gamma.",
    "stale": "Inference normalizes differently from training, and is less accurate or wrong: call"
    " estimate_population_statistics (in a config, population.when='end'), or train for more steps"
    " or with a lower momentum.",
}
_ADVICE_ON_NOTES = {
    "never_updated": "The layer only scales and shifts, in training as in inference: if the network"
    " should have pretrained weights, they were not loaded; otherwise no action is needed.",
    "dead": "These channels carry no information: a few are harmless; with many, a part of the"
    " network is unused: train with a lower learning rate or less weight decay on gamma.",
    "below_epsilon": "Epsilon instead of the variance determines their scale, so that they stay"
    " smaller than other channels: harmless in a few channels; if a layer has many, scale up its"
    " input or lower epsilon, and train again.",
    "gap": "The statistics of single mini-batches differ from the average: they are small, or their"
    " examples resemble each other. If the validation accuracy is good, no action is needed;"
    " otherwise shuffle the examples, or train with larger or synchronized mini-batches.",
    "unfoldable": "Nothing is wrong: a folded network keeps the layer, or replaces it by one"
    " scale-and-shift.",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding of a check.

    Attributes:
      layer: name of the layer, unique in the model: its path, with the names of nested models in
        front if several layers have this path. The model's name if the finding concerns the
        outputs.
      kind: one of the kinds listed in `check_batch_norm`.
      is_fault: whether inference is wrong or a layer useless; otherwise the finding is a note.
      text: description of the finding.
      advice: what it means, and what to do; equal for all findings of a kind and severity.
      channels: affected channels, as indices into the flattened parameters; empty if the finding
        does not concern single channels.
    """

    layer: str
    kind: str
    is_fault: bool
    text: str
    advice: str
    channels: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class HealthReport:
    """Findings of a check; str() is a line per finding, then a summary and the measurements.

    Findings with equal advice share a line, which counts the layers and names some.

    Attributes:
      num_layers, num_channels: numbers of BatchNormalization layers and of their channels.
      findings: findings in the order of the model's layers.
      population: moving statistics compared with population statistics; None if the model was not
        run or an output is not finite.
      gap: root mean square difference between training-mode and inference-mode outputs, divided by
        the standard deviation of the former over the examples; the largest of all outputs. None if
        the model was not run, if an output is not finite, or if one is the same for all examples.
      skipped: checks that were skipped, each with the reason.
    """

    num_layers: int
    num_channels: int
    findings: tuple[Finding, ...]
    population: PopulationReport | None
    gap: float | None
    skipped: tuple[str, ...]

    @property
    def has_faults(self) -> bool:
        """Whether any finding is a fault."""
        return any(finding.is_fault for finding in self.findings)

    def __str__(self) -> str:
        groups: dict[tuple[bool, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.is_fault, finding.advice), []).append(finding)
        lines = map(_format_findings, groups.values())
        return "\n".join([*lines, self._summary(), *self._measurements()])

    def _summary(self) -> str:
        faults = sum(finding.is_fault for finding in self.findings)
        notes = len(self.findings) - faults
        found = f"{counted(faults, 'fault')}, {counted(notes, 'note')}"
        layers = counted(self.num_layers, "BN layer")
        channels = counted(self.num_channels, "channel")
        parts = [f"{found if self.findings else 'healthy'}: {layers}, {channels}"]
        return "; ".join([*parts, *(f"skipped {check}" for check in self.skipped)])

    def _measurements(self) -> list[str]:
        lines = []
        if self.population:
            distance, smallest, largest = _largest_distances(*self.population.rows)
            lines += [
                f"  moving means: at most {distance:.2f} standard deviations from those of the data"
                f" (accepted: {MAX_MEAN_DISTANCE:g})",
                f"  moving variances: {smallest:.3g} to {largest:.3g} times those of the data"
                f" (accepted: {1 / MAX_VARIANCE_RATIO:g} to {MAX_VARIANCE_RATIO:g})",
            ]
        if self.gap is not None:
            lines.append(
                f"  outputs in training and inference mode: {self.gap:.2f} standard deviations"
                f" apart (accepted: {MAX_GAP:g})"
            )
        return lines


def _format_findings(findings: Sequence[Finding]) -> str:
    """Formats findings with equal advice on one line."""
    first = findings[0]
    if len(findings) == 1:
        found = f"{first.layer}: {first.text}"
    elif len({f.text for f in findings}) == 1:
        names = first_of([f.layer for f in findings])
        found = f"{counted(len(findings), 'layer')} ({names}): {first.text}"
    else:
        each = first_of([f"{f.layer}: {f.text}" for f in findings], separator="; ")
        found = f"{counted(len(findings), 'layer')}: {each}"
    return f"{'fault' if first.is_fault else 'note':5}  {found}. {first.advice}"


def _make_finding(
    layer: str, kind: str, is_fault: bool, text: str, channels: tuple[int, ...] = ()
) -> Finding:
    advice = (_ADVICE_ON_FAULTS if is_fault else _ADVICE_ON_NOTES)[kind]
    return Finding(layer, kind, is_fault, text, advice, channels)


def check_batch_norm(
    model: keras.Model,
    dataset: Iterable | None = None,
    num_batches: int = 20,
    strategy: tf.distribute.Strategy | None = None,
) -> HealthReport:
    """Checks the BatchNormalization layers of a trained network, ours or Keras'.

    Kinds of findings; (f) marks faults:
      - "not_finite" (f): NaN or infinity in a weight of any layer or, given data, in the outputs.
      - "negative_variance" (f): a moving variance below 0.
      - "never_updated" (f): the moving statistics still have their initial values. This is a note
        if the layer is frozen or, given data, never called in training mode, which is usually on
        purpose.
      - "dead": channels whose output hardly depends on the input. Their standard deviation at
        inference, |gamma| * sqrt(moving variance / (moving variance + epsilon)), is less than
        MIN_STDDEV. This is a fault if all channels of a layer are dead.
      - "below_epsilon": channels that are not dead, but whose moving variance is less than epsilon,
        which then dominates the denominator.
      - "stale" (f): in some channel, the moving mean is more than MAX_MEAN_DISTANCE population
        standard deviations off, or the moving variance more than MAX_VARIANCE_RATIO times too large
        or too small; LayerReport defines both measures.
      - "gap": outputs in training and inference mode differ by more than MAX_GAP although all
        moving statistics are right. Causes are small mini-batches, and mini-batches whose examples
        resemble each other (sorted data).
      - "unfoldable": fold_batch_norm would not fold the layer.

    Decisions:
      - A consequence of another finding is not reported: a layer that was never updated is not also
        stale, and a layer with non-finite weights has no other finding. The model is not run if its
        weights rule out finite outputs.
      - For the gap, only BatchNormalization is in training mode, since dropout would add noise.
        Layers that are frozen, or that the model calls with training=False even in training,
        normalize the same in both modes. If there are no others, the model is not run.
      - The model is unchanged, on each replica.

    Args:
      model: built model.
      dataset: batches as in training, in the form that estimate_population_statistics accepts; it
        is iterated twice. None checks only the weights.
      num_batches: number of batches for the population statistics, >= 1. Few small batches make
        them noisy. The gap is measured on the first batch.
      strategy: strategy that the model was created under. None uses model.distribute_strategy.

    Raises:
      UsageError: `model` is not a model or not built, or estimate_population_statistics raises it.
    """
    check_model(model)
    if not model.built:
        raise UsageError(f"model {model.name!r} is not built: call or build it first")
    layers = [layer for layer in batch_norm_layers(model) if layer.built]
    names = layer_names(model)
    findings = _check_weights(model, layers, names)
    population, gap, skipped = None, None, []
    obstacle = _obstacle_to_running(dataset, layers, findings)
    if dataset is not None and not obstacle:
        strategy = strategy or model.distribute_strategy
        inputs = _first_inputs(dataset, strategy)
        estimator = PopulationEstimator(model, strategy)
        trained = estimator.find_trained_layers(inputs)
        findings = _excuse_untrained(findings, {names[layer] for layer in trained})
        if trained:
            gap, found = _compare_modes(model, inputs, strategy, trained)
            if not found:
                population = estimator.estimate(dataset, num_batches, update=False)
                found = _check_statistics(model, population, gap, findings)
            findings += found
        else:
            obstacle = (
                "the model calls no BatchNormalization in training mode (if it should, its call"
                " must pass `training` on to its layers)"
            )
    if obstacle:
        skipped.append(f"checks on data: {obstacle}")
    try:
        findings += _check_folding(model, names) if layers else []
    except UsageError as error:
        skipped.append(f"check of folding: {error}")

    order = {names[layer]: i for i, layer in enumerate(all_layers(model, include_self=False))}
    # Findings about the whole model come last.
    findings.sort(key=lambda finding: order.get(finding.layer, math.inf))
    channels = sum(math.prod(layer.moving_mean.shape) for layer in layers)
    return HealthReport(len(layers), channels, tuple(findings), population, gap, tuple(skipped))


def _check_weights(
    model: keras.Model, layers: Sequence[keras.Layer], names: Mapping[keras.Layer, str]
) -> list[Finding]:
    findings = _check_finite(model, names)
    not_finite = {finding.layer for finding in findings}
    for layer in layers:
        if names[layer] not in not_finite:
            findings += _check_layer(layer, names[layer])
    return findings


def _check_finite(model: keras.Model, names: Mapping[keras.Layer, str]) -> list[Finding]:
    """Checks every weight of the model and returns one finding per layer."""
    # A layer follows those that contain it, so the innermost one remains.
    owners = {id(v): names[layer] for layer in all_layers(model) for v in layer.variables}
    weights: dict[str, list[str]] = {}
    for variable in model.variables:
        if not np.isfinite(to_float64(variable)).all():
            weights.setdefault(owners[id(variable)], []).append(variable.name)
    return [
        _make_finding(layer, "not_finite", True, f"NaN or infinity in {', '.join(own)}")
        for layer, own in weights.items()
    ]


def _check_layer(layer: keras.Layer, layer_name: str) -> list[Finding]:
    """Checks the weights of one BatchNormalization; all of them are finite."""
    findings = []

    def add(kind: str, is_fault: bool, affected: np.ndarray, text: str) -> None:
        channels = tuple(np.flatnonzero(affected).tolist())
        if channels:
            text = f"{text} in {_format_channels(channels, affected.size)}"
            findings.append(_make_finding(layer_name, kind, is_fault, text, channels))

    if _has_initial_statistics(layer):
        text = "the moving mean and variance still have their initial values"
        if not layer.trainable:
            text = f"frozen, and {text}"
        findings.append(_make_finding(layer_name, "never_updated", layer.trainable, text))
    variance = to_float64(layer.moving_variance).ravel()
    gamma = 1.0 if layer.gamma is None else to_float64(layer.gamma).ravel()
    negative = variance < 0
    variance = np.maximum(variance, 0)
    # With epsilon 0, which the Keras layer accepts, a variance of 0 would be divided by 0.
    scaled = variance / np.where(variance > 0, variance + layer.epsilon, 1)
    stddev = np.abs(gamma) * np.sqrt(scaled)
    dead = (stddev < MIN_STDDEV) & ~negative
    below = (variance < layer.epsilon) & ~dead & ~negative
    add("negative_variance", True, negative, "negative moving variance")
    add("dead", bool(dead.all()), dead, "nearly constant output (dead)")
    add("below_epsilon", False, below, f"variance below epsilon={layer.epsilon:g}")
    return findings


def _has_initial_statistics(layer: keras.Layer) -> bool:
    """Returns whether the moving statistics equal their constant initial values."""
    constant = (keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant)
    for name in ("moving_mean", "moving_variance"):
        initializer, variable = getattr(layer, f"{name}_initializer"), getattr(layer, name)
        if not isinstance(initializer, constant):
            return False
        if not np.array_equal(to_float64(initializer(variable.shape)), to_float64(variable)):
            return False
    return True


def _obstacle_to_running(
    dataset: Iterable | None, layers: Sequence[keras.Layer], findings: Sequence[Finding]
) -> str | None:
    """Returns why the model is not run, or None if it is."""
    if not layers:
        return "the model has no BatchNormalization"
    if dataset is None:
        return "no dataset was passed"
    if any(finding.kind in ("not_finite", "negative_variance") for finding in findings):
        return "the weights rule out finite outputs"
    if not any(layer.trainable for layer in layers):
        return "all layers are frozen and compute the same in both modes"
    return None


def _first_inputs(dataset: Iterable, strategy: tf.distribute.Strategy) -> Any:
    batch = next(iter(distribute_dataset(dataset, strategy)), None)
    if batch is None:
        raise UsageError("the dataset is empty: expected batches as in training")
    return batch[0] if isinstance(batch, tuple) else batch


def _excuse_untrained(findings: Sequence[Finding], trained: Collection[str]) -> list[Finding]:
    """Makes notes of the faults of layers that are never updated because they are not trained.

    Args:
      findings: findings about the weights.
      trained: names of the layers that the model calls in training mode.
    """
    return [
        _make_finding(f.layer, f.kind, False, f"never in training mode, and {f.text}")
        if f.kind == "never_updated" and f.is_fault and f.layer not in trained
        else f
        for f in findings
    ]


def _compare_modes(
    model: keras.Model,
    inputs: Any,
    strategy: tf.distribute.Strategy,
    trained: Sequence[keras.Layer],
) -> tuple[float | None, list[Finding]]:
    """Runs the model in both modes and returns the gap, and a finding if it is not finite.

    Args:
      model, strategy: see check_batch_norm.
      inputs: inputs of one batch.
      trained: the layers that the model calls in training mode.
    """
    inference = _outputs(model, inputs, strategy)
    with _training_mode(model, trained):
        training = _outputs(model, inputs, strategy)
    for mode, outputs in (("inference", inference), ("training", training)):
        if not all(np.isfinite(y).all() for y in outputs):
            text = f"NaN or infinity in the outputs in {mode} mode, although all weights are finite"
            advice = _ADVICE_ON_FAULTS["not_finite_outputs"]
            return None, [Finding(model.name, "not_finite", True, text, advice)]
    return _largest_gap(training, inference), []


def _check_statistics(
    model: keras.Model,
    population: PopulationReport,
    gap: float | None,
    findings: Sequence[Finding],
) -> list[Finding]:
    """Checks the moving statistics and the gap; `findings` are those about the weights."""
    never_updated = {f.layer for f in findings if f.kind == "never_updated" and f.is_fault}
    found = [
        _make_finding(row.layer, "stale", True, text)
        for row in population.rows
        if (text := _describe_stale(row)) and row.layer not in never_updated
    ]
    if gap is not None and gap > MAX_GAP and not (never_updated or found):
        text = (
            f"outputs in training and inference mode are {gap:.2f} standard deviations apart,"
            " although the moving statistics fit the data"
        )
        found.append(_make_finding(model.name, "gap", False, text))
    return found


def _describe_stale(row: LayerReport) -> str:
    """Describes which moving statistics are not those of the data; returns "" if all are."""
    distance, smallest, largest = _largest_distances(row)
    parts = []
    # Negated so that NaN is not accepted.
    if not distance <= MAX_MEAN_DISTANCE:
        parts.append(f"moving means up to {distance:.2f} standard deviations off")
    if not (1 / MAX_VARIANCE_RATIO <= smallest and largest <= MAX_VARIANCE_RATIO):
        parts.append(f"moving variances {smallest:.3g} to {largest:.3g} times those of the data")
    return ", ".join(parts)


def _largest_distances(*rows: LayerReport) -> tuple[float, float, float]:
    """Returns the largest mean distance, and the smallest and the largest variance ratio."""
    distance = max(row.mean_distance_largest for row in rows)
    smallest = min(row.variance_ratio_smallest for row in rows)
    largest = max(row.variance_ratio_largest for row in rows)
    return distance, smallest, largest


def _check_folding(model: keras.Model, names: Mapping[keras.Layer, str]) -> list[Finding]:
    return [
        _make_finding(names[layer], "unfoldable", False, f"cannot be folded: {reason}")
        for layer, reason in unfoldable_layers(model).items()
    ]


def _outputs(model: keras.Model, inputs: Any, strategy: tf.distribute.Strategy) -> list[np.ndarray]:
    """Returns each output of numbers of a call with training=False, [N, ...] over all replicas.

    A scalar output becomes [1]. The state of the model is restored afterwards: the call changes it
    if a layer is stateful, or if the model always calls a layer in training mode.
    """

    def run(inputs: Any) -> Any:
        return strategy.run(lambda inputs: model(inputs, training=False), args=(inputs,))

    with reporting_rejected_inputs(model), preserved_state(model, strategy):
        # Tracing explicitly avoids TensorFlow's warning about retracing.
        outputs = tf.function(run, autograph=False).get_concrete_function(inputs)(inputs)
    by_replica = map(strategy.experimental_local_results, tf.nest.flatten(outputs))
    return [
        np.concatenate([np.atleast_1d(to_float64(y)) for y in parts])
        for parts in by_replica
        if all(map(has_numbers, parts))
    ]


@contextlib.contextmanager
def _training_mode(model: keras.Model, layers: Sequence[keras.Layer]) -> Iterator[None]:
    """Runs the given layers of a model, and no others, in training mode in every call."""

    def call_in_training(
        call: Callable[..., tf.Tensor],
        inputs: tf.Tensor,
        training: Any = None,
        **kwargs: Any,
    ) -> tf.Tensor:
        return call(inputs, training=True, **kwargs)

    with contextlib.ExitStack() as stack:
        for layer in layers:
            function = functools.partial(call_in_training, layer.call)
            stack.enter_context(replaced_method(layer, "call", function))
        stack.enter_context(without_traces(model))
        yield


def _largest_gap(training: Sequence[np.ndarray], inference: Sequence[np.ndarray]) -> float | None:
    """Returns the largest gap of all outputs.

    None if there are none, or if an output is the same for all examples.
    """
    gaps = []
    for by_batch, by_moving in zip(training, inference, strict=True):
        spread = np.sqrt(np.mean(np.square(by_batch - by_batch.mean(axis=0))))
        if spread == 0:
            return None
        gaps.append(float(np.sqrt(np.mean(np.square(by_batch - by_moving))) / spread))
    return max(gaps, default=None)


def _format_channels(channels: Sequence[int], total: int) -> str:
    if len(channels) == total:
        return f"all of {counted(total, 'channel')}"
    indices = first_of([str(channel) for channel in channels], _LISTED_CHANNELS)
    return f"{len(channels)} of {counted(total, 'channel')} ({indices})"
