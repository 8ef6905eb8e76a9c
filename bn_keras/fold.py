"""Folds batch normalization into the layers before it: Algorithm 2, line 11."""

import contextlib
import dataclasses
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bn_keras.agreement import check_agreement, has_numbers, to_float64
from bn_keras.arguments import check_model
from bn_keras.batch_norm import canonical_axes
from bn_keras.errors import AgreementError, UsageError
from bn_keras.keras_internals import (
    Call,
    all_layers,
    attributes_to_copy,
    batch_norm_layers,
    build_like,
    graph_calls,
    graph_of,
    layer_names,
    overrides_call,
    unbuild_optimizer,
)
from bn_keras.layer_kinds import DEPTHWISE, SEPARABLE, TRANSPOSED, WITH_KERNEL
from bn_keras.model_copy import REMOVED, ModelCopier, describe_layer, find_state
from bn_keras.population import (
    find_layers_called_in_training_mode,
    preserved_state,
    reporting_rejected_inputs,
)

# Random inputs of the comparison: number of examples, and size of the axes that the model leaves
# open.
_NUM_EXAMPLES = 8
_IMAGE_SIDE, _VOLUME_SIDE = 224, 32
# Inputs that are passed as they are; None stands for an optional input.
_KEPT_INPUTS = (type(None), tf.SparseTensor, tf.RaggedTensor)
# Timed calls of each model.
_ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """Result of folding, and a comparison of both models; str() is a few lines of text.

    Attributes:
      folded: names of the folded layers, prefixed with the names of the nested models that contain
        them.
      kept: reason for each layer that could not be folded, by its name, prefixed likewise.
      input_shapes: shapes of the inputs that both models were compared on, batch axis included.
      largest_difference: largest absolute difference between the outputs of both models. If there
        are several outputs, of the one where the difference is largest relative to its values.
      largest_output: largest absolute value of that output.
      top1_agreement: fraction of examples with the same top class; None without an output
        [N, classes].
      milliseconds_before, milliseconds_after: median time of a call; the models alternate.
    """

    folded: tuple[str, ...]
    kept: Mapping[str, str]
    input_shapes: tuple[tuple[int, ...], ...]
    largest_difference: float
    largest_output: float
    top1_agreement: float | None
    milliseconds_before: float
    milliseconds_after: float

    @property
    def speedup(self) -> float:
        """Time of a call before folding divided by the time after."""
        return self.milliseconds_before / self.milliseconds_after

    def __str__(self) -> str:
        total = len(self.folded) + len(self.kept)
        shapes = ", ".join(str(list(shape)) for shape in self.input_shapes)
        lines = [
            f"{len(self.folded)} of {total} BatchNormalization layers folded",
            f"largest difference {self.largest_difference:.2g} in outputs of up to"
            f" {self.largest_output:.3g}",
            f"{self.milliseconds_after:.1f} ms per call on {shapes},"
            f" {self.milliseconds_before:.1f} ms before folding: speedup {self.speedup:.2f}",
        ]
        if self.top1_agreement is not None:
            lines[1] += f"; same top class in {self.top1_agreement:.1%} of examples"
        width = max(map(len, self.kept), default=0)
        lines += [f"not folded: {name.ljust(width)}  {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def fold_batch_norm(model: keras.Model, inputs: Any = None) -> tuple[keras.Model, FoldReport]:
    """Returns a model for inference with BatchNormalization folded into the preceding layers.

    At inference, BatchNormalization computes y = scale * x + offset with
    scale = gamma / sqrt(moving_variance + epsilon) and offset = beta - moving_mean * scale. Both go
    into the kernel and bias of the convolution (also depthwise, separable or transposed) or dense
    layer that computes x. Applies to our layer and to Keras'; folded weights are computed in
    float64.

    Decisions:
      - A layer that is called in several places, in one model or in several nested ones, is folded
        if every place allows it.
      - A layer that cannot be folded becomes one scale-and-shift: a depthwise 1x1 convolution for
        images, which TensorFlow fuses with the following activation, else keras.layers.Rescaling.
        The result therefore needs bn_keras only if other layers of the model do.
      - Inside other layers (TimeDistributed, a subclassed model), BatchNormalization stays and is
        frozen. So does a layer with a `call` of its own, or one that a function of another layer
        uses. A layer called with training=True stays too: it may use batch statistics.
      - BatchNormalization is not folded into a layer whose weights another layer uses, as in a tied
        autoencoder.
      - BatchNormalization is not folded into the following convolution, since the zeros of that
        convolution's padding are not normalized.
      - Everything else is the same in the result: other layers with their state, whether or not
        their classes have a get_config; shared layers; the arguments of compile(). The optimizer
        keeps its iterations, but no state of the variables, some of which are folded. The penalties
        of regularizers, which `evaluate` adds to the loss, are those of the folded weights. See
        ModelCopier.
      - Both models are run on the same inputs and must agree.
      - The given model is unchanged and shares no state with the result. Call
        merge_moving_statistics first if its replicas are not synchronized.

    Args:
      model: built Functional or Sequential model; nested models are folded too.
      inputs: batch to compare both models on; None draws one from a normal distribution.

    Returns:
      The folded model, with the same class, names and dtype policies, and the report.

    Raises:
      UsageError: `model` is not a keras.Model, is subclassed or unbuilt, has no BatchNormalization,
        contains an object that cannot be copied, has non-finite statistics or outputs, does not
        accept the inputs, or has integer inputs and none were passed.
      AgreementError: the outputs of both models agree to fewer than half of their digits.

    Source: Ioffe & Szegedy 2015, Algorithm 2, line 11.
    """
    plan = _Plan(model)
    inputs = _as_batch(_random_inputs(model.name, plan.inputs) if inputs is None else inputs)
    with _reporting_rejected_inputs(model):
        plan.find_always_training(model, inputs)
    folded_model = _Folder(plan).copy_model(model)
    return folded_model, _compare_models(plan, model, folded_model, inputs)


def unfoldable_layers(model: keras.Model) -> dict[keras.Layer, str]:
    """Returns the BatchNormalization layers that fold_batch_norm would not fold.

    Args:
      model: see fold_batch_norm.

    Returns:
      The reason for each layer; empty if all layers can be folded.

    Raises:
      UsageError: the model has no BatchNormalization, or is a subclassed or unbuilt one.
    """
    return _Plan(model).kept


class _Plan:
    """Decides for each BatchNormalization of a model whether it is folded.

    Attributes:
      inputs: symbolic inputs of the model.
      names: layer names, prefixed with the names of the nested models that contain them.
      batch_norms: all BatchNormalization layers, in the order of the model's layers.
      folded: layers of batch_norms to fold.
      folded_into: BatchNormalization to fold, by the layer that it is folded into.
      kept: reason for each BatchNormalization that cannot be folded.
      affine: layers of `kept` to replace by one scale-and-shift.
      inside: layers inside a layer that has no graph, such as TimeDistributed.
      always_training: BatchNormalization layers that use batch statistics in every mode.
    """

    def __init__(self, model: keras.Model) -> None:
        check_model(model)
        if not isinstance(model, keras.Sequential | keras.Function) or overrides_call(model):
            raise UsageError(
                f"model {model.name!r} is a subclassed {type(model).__name__}, whose layers are"
                " only in its code: expected a Functional or Sequential model"
            )
        graph = graph_of(model)
        if graph is None:
            raise UsageError(
                f"model {model.name!r} is not built: call it, or start it with a keras.Input"
            )
        # By the id of a symbolic tensor: the layer that computes it, and the calls that read it
        # (None for the outputs of a model).
        self._producers: dict[int, keras.Operation] = {}
        self._consumers: dict[int, list[Call | None]] = {}
        self._calls: dict[keras.Operation, list[Call]] = {}
        self.names: dict[keras.Operation, str] = {}
        self.inside: set[keras.Layer] = set()
        self.always_training: set[keras.Layer] = set()
        self.inputs = graph.input
        self._read_graph(graph)
        # By the id of a layer or variable: the operations that have a reference to it.
        self._users: dict[int, list[keras.Operation]] = {}
        self._read_references()

        self.batch_norms = [
            layer
            for layer in batch_norm_layers(model)
            if layer in self._calls or layer in self.inside
        ]
        if not self.batch_norms:
            raise UsageError(f"model {model.name!r} has no BatchNormalization to fold")
        obstacles = {layer: self._obstacle(layer) for layer in self.batch_norms}
        self.kept = {layer: reason for layer, reason in obstacles.items() if reason}
        self.folded = {layer for layer in self.batch_norms if layer not in self.kept}
        self.folded_into = {
            self._producer(call): layer for layer in self.folded for call in self._calls[layer]
        }
        self.affine = {layer for layer in self.kept if self._is_affine(layer)}

    def _is_affine(self, batch_norm: keras.Layer) -> bool:
        """Returns whether a layer that is kept computes no more than scale * x + offset."""
        if batch_norm in self.always_training | self.inside or overrides_call(batch_norm):
            return False
        if self._other_users(batch_norm, batch_norm):
            # Its other users need its weights.
            return False
        # With channels first, keras.layers.Rescaling adds axes to the scale of a vector.
        is_vector = batch_norm.input_spec.ndim == 2
        return not (is_vector and keras.config.image_data_format() == "channels_first")

    def find_always_training(self, model: keras.Model, inputs: Any) -> None:
        """Adds the layers that the code of another layer calls with training=True."""
        inside = [layer for layer in self.batch_norms if layer in self.inside and layer.trainable]
        if inside:
            self.always_training.update(
                find_layers_called_in_training_mode(model, inside, inputs, training=False)
            )

    def reads_integers(self, layer: keras.Layer) -> bool:
        """Returns whether any input of a layer in a graph has an integer dtype."""
        tensors = [tensor for call in self._calls[layer] for tensor in call.input_tensors[:1]]
        return not all(keras.backend.is_float_dtype(tensor.dtype) for tensor in tensors)

    def reasons(self) -> dict[str, str]:
        """Returns `kept` by layer name."""
        return {self.names[layer]: reason for layer, reason in self.kept.items()}

    def _read_graph(self, graph: keras.Function, prefix: str = "") -> None:
        """Records producer and consumers of each tensor of a model and its nested models."""
        for tensor in graph.outputs:
            self._consumers.setdefault(id(tensor), []).append(None)
        for call in graph_calls(graph):
            layer = call.operation
            is_new = layer not in self._calls
            # Models with common layers may also share calls, which are then recorded twice.
            self._calls.setdefault(layer, []).append(call)
            for tensor in call.outputs:
                self._producers[id(tensor)] = layer
            for tensor in call.input_tensors:
                self._consumers.setdefault(id(tensor), []).append(call)
            if isinstance(layer, keras.Layer):
                self._read_layer(call, prefix + layer.name, is_new)

    def _read_layer(self, call: Call, name: str, is_new: bool) -> None:
        layer = call.operation
        contained = all_layers(layer, include_self=False)
        if _is_training(call):
            self.always_training.update(x for x in batch_norm_layers(layer) if x.trainable)
        if not is_new:
            return
        self.names.setdefault(layer, name)
        graph = graph_of(layer)
        if graph is not None and not overrides_call(layer):
            self._read_graph(graph, f"{name}/")
            return
        self.inside.update(contained)
        paths = layer_names(layer)
        for x in contained:
            inner = paths[x].removeprefix(f"{layer.path}/")
            self.names.setdefault(x, f"{name}/{inner}")

    def _read_references(self) -> None:
        """Records the layers and variables that an operation may use without a call in a graph.

        They are in its attributes and in the arguments of its calls. A model with a graph uses none
        of its attributes, because its own code does not run.
        """
        for operation in dict.fromkeys([*self._calls, *self.names]):
            values = [call.arguments for call in self._calls.get(operation, ())]
            if graph_of(operation) is None or overrides_call(operation):
                values.append(attributes_to_copy(operation))
            for value in find_state(values):
                self._users.setdefault(id(value), []).append(operation)

    def _other_users(self, value: Any, layer: keras.Layer) -> str:
        """Returns the operations other than `layer` that have a reference to a layer or weight."""
        users = [user for user in self._users.get(id(value), ()) if user is not layer]
        return ", ".join(map(describe_layer, users))

    def _obstacle(self, batch_norm: keras.Layer) -> str | None:
        """Returns why a layer cannot be folded, or None if it can."""
        if batch_norm in self.always_training:
            return "is called with training=True: it may normalize by batch statistics"
        if batch_norm in self.inside:
            return "is inside a layer that is not a Functional or Sequential model"
        if overrides_call(batch_norm):
            return "has a call of its own"
        if batch_norm.activity_regularizer is not None:
            return "has an activity_regularizer"
        users = self._other_users(batch_norm, batch_norm)
        if users:
            return f"is also used by {users}"
        calls = self._calls[batch_norm]
        for call in calls:
            reason = self._obstacle_at(call)
            if reason:
                return reason if len(set(calls)) == 1 else f"is shared, and in one place {reason}"
        producers = [self._producer(call) for call in calls]
        for layer in producers:
            if layer in self.inside or producers.count(layer) < len(self._calls[layer]):
                return f"follows {describe_layer(layer)}, which is also used elsewhere"
            for value in (layer, *layer.weights):
                users = self._other_users(value, layer)
                if users:
                    what = "which" if value is layer else f"whose {value.name}"
                    return f"follows {describe_layer(layer)}, {what} is also used by {users}"
        return None

    def _obstacle_at(self, call: Call) -> str | None:
        """Returns why one call of a BatchNormalization prevents folding, or None."""
        batch_norm, layer = call.operation, self._producer(call)
        follows = f"follows {describe_layer(layer)}"
        if type(layer) not in WITH_KERNEL:
            return follows
        if overrides_call(layer):
            return f"{follows}, which has a call of its own"
        if layer.activation not in (None, keras.activations.linear):
            return f"{follows}, which includes an activation"
        if layer.activity_regularizer is not None:
            return f"{follows}, which has an activity_regularizer"
        users = [
            "the model's outputs" if user is None else describe_layer(user.operation)
            for user in self._consumers[id(call.input_tensors[0])]
            if user is not call
        ]
        if users:
            return f"{follows}, whose output is also used by {', '.join(users)}"
        if layer.compute_dtype != batch_norm.compute_dtype:
            return f"{follows}, which computes in {layer.compute_dtype}"
        channels_first = getattr(layer, "data_format", None) == "channels_first"
        if _axes(batch_norm) != [1 if channels_first else batch_norm.input_spec.ndim - 1]:
            return f"{follows}, whose channel axis is not axis={batch_norm.axis}"
        if layer.quantization_mode or getattr(layer, "lora_enabled", False):
            return f"{follows}, whose kernel is quantized or has LoRA weights"
        return None

    def _producer(self, call: Call) -> keras.Operation:
        return self._producers[id(call.input_tensors[0])]


def _is_training(call: Call) -> bool:
    """Returns whether a layer is called with training=True in every mode of the model."""
    arguments, keywords = call.arguments.args, dict(call.arguments.kwargs)
    if isinstance(call.operation, keras.Layer):
        signature = inspect.signature(call.operation.call)
        names = list(signature.parameters)
        keywords |= zip(names, arguments, strict=False)
    return keywords.get("training") not in (None, False)


def _axes(batch_norm: keras.Layer) -> list[int]:
    return canonical_axes(batch_norm.axis, [None] * batch_norm.input_spec.ndim)


class _Folder(ModelCopier):
    """Builds the folded copy of a model.

    Args:
      plan: plan of the model to copy.
    """

    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        self._plan = plan

    def copy_operation(self, old: keras.Operation) -> Any:
        """Returns the folded layer, the affine layer, REMOVED or the plain copy."""
        if old in self._plan.folded:
            return self.record(old, REMOVED)
        if old in self._plan.folded_into:
            new = self.construct_like(old, type(old), use_bias=True)
            batch_norm = self._plan.folded_into[old]
            _set_weights(new, _folded_weights(old, *_scale_and_offset(batch_norm)))
            new.supports_masking = old.supports_masking and batch_norm.supports_masking
            return new
        if old in self._plan.affine:
            new = self.record(old, _affine_layer(old, self._plan.reads_integers(old)))
            new.supports_masking = old.supports_masking
            return new
        new = super().copy_operation(old)
        if old in self._plan.kept and old not in self._plan.always_training:
            # Frozen, it uses its moving statistics in every mode.
            new.trainable = False
        return new

    def call_copy(self, old: keras.Operation, args: Any, kwargs: Any) -> Any:
        """Calls the copy, without `training` and `mask` if it is an affine layer."""
        if old in self._plan.affine:
            args, kwargs = keras.tree.flatten((args, kwargs))[:1], {}
        return super().call_copy(old, args, kwargs)

    def copy_optimizer(self, old: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
        """Returns an optimizer without state for the variables, because some are folded."""
        new = super().copy_optimizer(old)
        unbuild_optimizer(new)
        return new


def _set_weights(layer: keras.Layer, values: Mapping[str, np.ndarray]) -> None:
    for variable in layer.weights:
        variable.assign(values[variable.name].reshape(variable.shape))


def _affine_layer(batch_norm: keras.Layer, reads_integers: bool) -> keras.Layer:
    """Returns Keras' fastest layer for scale * x + offset."""
    options = {
        "name": batch_norm.name,
        "dtype": batch_norm.dtype_policy,
        "trainable": batch_norm.trainable,
        "activity_regularizer": batch_norm.activity_regularizer,
    }
    rank, axes = batch_norm.input_spec.ndim, _axes(batch_norm)
    scale, offset = _scale_and_offset(batch_norm)
    # A convolution does not cast integers.
    if rank == 4 and axes == [3] and not reads_integers:
        # TensorFlow fuses this convolution with the following activation: one pass over the images.
        # The default initializer would draw a seed from Python's global generator.
        layer = keras.layers.DepthwiseConv2D(
            1, data_format="channels_last", depthwise_initializer="zeros", **options
        )
        build_like(batch_norm, layer)
        _set_weights(layer, {"kernel": scale, "bias": offset})
        return layer
    sizes = iter(batch_norm.moving_mean.shape)
    shape = [next(sizes) if axis in axes else 1 for axis in range(rank)]
    return keras.layers.Rescaling(scale.reshape(shape), offset.reshape(shape), **options)


def _scale_and_offset(batch_norm: keras.Layer) -> tuple[np.ndarray, np.ndarray]:
    """Computes scale and offset of a layer at inference: float64, in its statistics' shape."""
    mean, variance = to_float64(batch_norm.moving_mean), to_float64(batch_norm.moving_variance)
    gamma = 1.0 if batch_norm.gamma is None else to_float64(batch_norm.gamma)
    beta = 0.0 if batch_norm.beta is None else to_float64(batch_norm.beta)
    with np.errstate(invalid="ignore"):
        scale = gamma / np.sqrt(variance + batch_norm.epsilon)
    offset = beta - mean * scale
    if not np.all(np.isfinite([scale, offset])):
        raise UsageError(
            f"layer {batch_norm.path!r} has no finite scale and offset: look for NaN, infinity or"
            " a negative variance in its weights"
        )
    return scale, offset


def _folded_weights(
    layer: keras.Layer, scale: np.ndarray, offset: np.ndarray
) -> dict[str, np.ndarray]:
    """Computes the weights with which a layer computes scale * (its output) + offset.

    Args:
      layer: one of WITH_KERNEL.
      scale, offset: [C], one value per output channel.

    Returns:
      The weights by name, float64.
    """
    weights = {variable.name: to_float64(variable) for variable in layer.weights}
    kernel = "pointwise_kernel" if isinstance(layer, SEPARABLE) else "kernel"
    if isinstance(layer, DEPTHWISE):
        # The last two axes, input channel and multiplier, make up the output channels.
        factor = scale.reshape(weights[kernel].shape[-2:])
    elif isinstance(layer, TRANSPOSED):
        factor = scale[:, np.newaxis]
    else:
        factor = scale
    return weights | {
        kernel: weights[kernel] * factor,
        "bias": weights.get("bias", 0.0) * scale + offset,
    }


def _random_inputs(name: str, symbolic_inputs: Any) -> Any:
    """Draws inputs for a model: normal for floats, uniform for uint8."""
    generator = np.random.default_rng(0)

    def draw(tensor: keras.KerasTensor) -> np.ndarray:
        side = _VOLUME_SIDE if tensor.ndim > 4 else _IMAGE_SIDE
        examples, *rest = tensor.shape
        shape = (examples or _NUM_EXAMPLES, *(size or side for size in rest))
        if tensor.dtype == "uint8":
            return generator.integers(256, size=shape, dtype=np.uint8)
        if keras.backend.is_float_dtype(tensor.dtype):
            return generator.normal(size=shape).astype(np.float32)
        raise UsageError(
            f"model {name!r} has an input of {tensor.dtype}, for which random values may be"
            " meaningless: pass inputs to compare on"
        )

    return keras.tree.map_structure(draw, symbolic_inputs)


def _compare_models(
    plan: _Plan, before: keras.Model, after: keras.Model, inputs: Any
) -> FoldReport:
    """Runs both models on the same inputs and reports on their outputs and times."""
    run_before, run_after = _inference(before), _inference(after)
    with _reporting_rejected_inputs(before):
        expected = _run_in_same_state(before, run_before, inputs)
    if not expected:
        raise UsageError(
            f"model {before.name!r} has no output of numbers to compare the folded model on: fold"
            " the part of it that computes them"
        )
    outputs = _run_in_same_state(after, run_after, inputs)
    source = f"folded model {before.name!r}"
    try:
        difference, size = check_agreement(before, expected, outputs, source)
    except AgreementError:
        _check_reproducible(before, expected, _run_in_same_state(before, run_before, inputs))
        raise
    with preserved_state(before), preserved_state(after):
        times = _median_milliseconds([lambda: run_before(inputs), lambda: run_after(inputs)])
    return FoldReport(
        folded=tuple(plan.names[x] for x in plan.batch_norms if x not in plan.kept),
        kept=plan.reasons(),
        input_shapes=tuple(tuple(x.shape) for x in keras.tree.flatten(inputs) if x is not None),
        largest_difference=difference,
        largest_output=size,
        top1_agreement=_top1_agreement(expected, outputs),
        milliseconds_before=times[0],
        milliseconds_after=times[1],
    )


def _reporting_rejected_inputs(model: keras.Model) -> contextlib.AbstractContextManager:
    return reporting_rejected_inputs(
        model, "the inputs to compare on", "pass a batch that it accepts"
    )


def _as_batch(inputs: Any) -> Any:
    """Returns the inputs to compare on as tensors."""
    try:
        inputs = keras.tree.map_structure(
            lambda x: x if isinstance(x, _KEPT_INPUTS) else tf.convert_to_tensor(x), inputs
        )
    except (TypeError, ValueError):
        raise UsageError(
            f"the inputs to compare on have type {type(inputs).__name__}: expected one batch of"
            " arrays or tensors, as the model is called with"
        ) from None
    if any(x is not None and 0 in x.shape for x in keras.tree.flatten(inputs)):
        raise UsageError("the batch to compare on is empty: pass one with examples")
    return inputs


def _inference(model: keras.Model) -> Callable[[Any], list[np.ndarray]]:
    """Returns a compiled function from inputs to a flat list of outputs of numbers in float64."""
    function = tf.function(lambda x: model(x, training=False), autograph=False)

    def run(inputs: Any) -> list[np.ndarray]:
        outputs = filter(has_numbers, keras.tree.flatten(function(inputs)))
        return [np.asarray(tf.cast(output, tf.float64)) for output in outputs]

    return run


def _run_in_same_state(model: keras.Model, run: Callable, inputs: Any) -> list[np.ndarray]:
    """Runs a model, whose recurrent states and seeds inference may change, and restores them."""
    with preserved_state(model):
        return run(inputs)


def _check_reproducible(
    model: keras.Model, outputs: Sequence[np.ndarray], again: Sequence[np.ndarray]
) -> None:
    """Raises UsageError if a model's outputs differ between two calls on the same inputs."""
    try:
        check_agreement(model, outputs, again, "another call")
    except AgreementError:
        raise UsageError(
            f"model {model.name!r} computes other outputs in each call, since it draws random"
            " numbers at inference: the folded model cannot be compared with it; fold the part of"
            " it that draws none"
        ) from None


def _top1_agreement(expected: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> float | None:
    agreements = [
        np.mean(a.argmax(axis=1) == b.argmax(axis=1))
        for a, b in zip(outputs, expected, strict=True)
        if a.ndim == 2 and a.shape[1] > 1
    ]
    return float(np.mean(agreements)) if agreements else None


def _median_milliseconds(functions: Sequence[Callable[[], Any]]) -> list[float]:
    """Returns each function's median time per call; they alternate, so any load affects all."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(_ROUNDS):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return [1e3 * statistics.median(own) for own in times]
