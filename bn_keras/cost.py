"""Counts a network's parameters, multiply-adds and activation memory, layer by layer."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast

import keras
import tensorflow as tf

from bn_keras.arguments import check_model
from bn_keras.errors import UsageError
from bn_keras.keras_internals import Call, graph_calls, overrides_call
from bn_keras.layer_kinds import DEPTHWISE, SEPARABLE, TRANSPOSED, WITH_KERNEL
from bn_keras.text import table

# Layers whose weights multiply their inputs elementwise or not at all.
_NOT_MULTIPLYING = (
    keras.layers.BatchNormalization,
    keras.layers.Embedding,
    keras.layers.LayerNormalization,
    keras.layers.Normalization,
    keras.layers.PReLU,
)
# Layers and operations without weights that multiply their inputs with each other. Keras has no
# public names for the classes of operations.
_PRODUCTS = (
    *("AdditiveAttention", "Attention", "Dot", "DotProductAttention"),
    *("Einsum", "Inner", "Matmul", "Outer", "Tensordot", "Vdot"),
    *("Conv", "ConvTranspose", "DepthwiseConv", "SeparableConv"),
)
# Layers whose gradients read only shapes.
_SAVING_NOTHING = (
    keras.layers.InputLayer,
    keras.layers.AveragePooling1D,
    keras.layers.AveragePooling2D,
    keras.layers.AveragePooling3D,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalAveragePooling3D,
    keras.layers.ZeroPadding1D,
    keras.layers.ZeroPadding2D,
    keras.layers.ZeroPadding3D,
    keras.layers.Concatenate,
    keras.layers.Add,
    keras.layers.Flatten,
    keras.layers.Reshape,
    keras.layers.Rescaling,
)
_NONLINEARITIES = (
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.Softmax,
)
# Nonlinearities whose gradients read the output; the gradients of the others read the input.
_SAVING_OUTPUT = ("relu", "relu6", "sigmoid", "softmax", "tanh")

_MAX_ROWS = 40


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Cost of one call of a layer for one image. Shapes exclude the batch axis.

    Attributes:
      name: layer name, prefixed with the names of the nested models that contain it.
      kind: class name of the layer.
      input_shapes, output_shape: shapes of all inputs and of the first output.
      trainable, non_trainable: numbers of parameters that no earlier call counts.
      multiply_adds: multiply-adds of the forward pass.
      activation_bytes: size of the tensors made by this call that the backward pass reads.
    """

    name: str
    kind: str
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    trainable: int
    non_trainable: int
    multiply_adds: int
    activation_bytes: int

    @property
    def module(self) -> str:
        """Prefix of the name that identifies its module, such as "3a" of "3a_1x1_conv"."""
        return re.sub(r"^([^_/]*(?:_\d+(?=_|/|$))?).*", r"\1", self.name)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a network for one image; str() is a table of its modules.

    Attributes:
      layers: every call of a layer, in the order of execution.
      uncounted: names of layers whose multiply-adds are not counted, although they have some.
    """

    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...]

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(layer.trainable for layer in self.layers)

    @property
    def non_trainable(self) -> int:
        """Number of parameters that training does not learn: moving statistics, frozen weights."""
        return sum(layer.non_trainable for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the forward pass; the backward pass takes about twice as many."""
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward pass, two per multiply-add."""
        return 2 * self.multiply_adds

    @property
    def activation_bytes(self) -> int:
        """Size of the activations saved for the backward pass, a lower bound."""
        return sum(layer.activation_bytes for layer in self.layers)

    def summary(self) -> str:
        """Returns the totals on one line."""
        return (
            f"{self.trainable:,} parameters; per image: {_short(self.multiply_adds)} multiply-adds"
            f" forward, {self.activation_bytes / 2**20:.3g} MiB activation memory in training"
        )

    def __str__(self) -> str:
        by_module = _grouped(self.layers, lambda layer: layer.module)
        # Keras' automatic names do not group layers into modules; map sizes do.
        by_size = _grouped(self.layers, lambda layer: _map_size(layer.output_shape))
        groups = by_module if len(by_module) <= _MAX_ROWS else by_size
        rows = [("module", "output", "parameters", "multiply-adds", "share", "activation MiB")]
        rows += [self._row(name, layers) for name, layers in groups.items()]
        rows.append(self._row("total", self.layers))
        lines = table(rows, left=2)
        lines.insert(-1, "-" * len(lines[0]))
        lines += [
            "Parameters: trainable. Multiply-adds (2 FLOPs each): convolutions and dense layers,"
            " forward, per",
            "image. Activation MiB: estimate of the activations saved for the backward pass, per"
            " image.",
        ]
        if self.uncounted:
            lines.append(f"Multiply-adds not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)

    def _row(self, name: str, layers: Sequence[LayerCost]) -> tuple[str, str, str, str, str, str]:
        multiply_adds = sum(layer.multiply_adds for layer in layers)
        return (
            name,
            "x".join(map(str, layers[-1].output_shape)),
            f"{sum(layer.trainable for layer in layers):,}",
            _short(multiply_adds),
            f"{multiply_adds / max(1, self.multiply_adds):.1%}",
            f"{sum(layer.activation_bytes for layer in layers) / 2**20:.2f}",
        )


def count_cost(model: keras.Model, dtype: str | None = None) -> Cost:
    """Computes the cost of a network for one image, layer by layer.

    Decisions:
      - Multiply-adds are counted for convolutions (also grouped, depthwise, separable and
        transposed) and dense layers, padding included, as in published counts. Biases, BN,
        nonlinearities, pooling and sums are not counted. Layers and operations with other products
        (attention, recurrence, matmul) are listed as uncounted.
      - A layer that is called twice counts its multiply-adds twice and its parameters once. So do
        layers that share weights.
      - Activation memory counts every tensor that some gradient reads, once: the inputs of
        convolutions, dense layers and BN, the outputs of nonlinearities (ReLU, sigmoid, tanh,
        softmax), and both sides of max pooling. The gradients of average pooling, sums and
        concatenation read nothing. Any other layer counts its inputs and outputs.
      - Activation memory is an estimate and less than the peak: temporary gradients, workspaces,
        weights and optimizer state add to it, and a compiler may save less and recompute.

    Args:
      model: built Functional or Sequential model; nested models are counted too.
      dtype: dtype of all saved activations. None uses each activation's own dtype, which follows
        from the model's dtype policies.

    Raises:
      UsageError: `model` is not a model or a subclassed one, its input size is unknown, or
        the dtype is invalid.
    """
    check_model(model)
    if not _has_graph(model):
        raise UsageError(
            f"model {model.name!r} cannot be counted: expected a Functional or Sequential model"
            " with known inputs; build it with keras.Input"
        )
    try:
        tf.as_dtype(dtype or "float32")
    except TypeError:
        raise UsageError(
            f"dtype={dtype!r} is invalid: expected a dtype, such as 'float16'"
        ) from None
    calls: list[_LayerCall] = []
    _trace(model, [_Activation.of(tensor) for tensor in model.inputs], "", calls)
    saved = {tensor for call in calls for tensor in call.saved()}
    layers: list[LayerCost] = []
    counted: set[int] = set()
    for call in calls:
        layers.append(_layer_cost(call, counted, saved, dtype))
        counted.update(map(id, getattr(call.layer, "weights", [])))
    uncounted = [call.name for call in calls if _has_other_products(call.layer)]
    return Cost(tuple(layers), tuple(dict.fromkeys(uncounted)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Activation:
    """A tensor in a batch of one image; activations are compared by identity.

    Attributes:
      rows: size of the first axis: 1, unless an operation has moved other axes into it.
      shape: sizes of the other axes.
      dtype: name of the dtype.
    """

    rows: int
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: keras.KerasTensor, shape: Sequence[int | None] = ()) -> "_Activation":
        """Returns the activation of a symbolic tensor, whose shape may be known from a trace."""
        rows, *others = shape or (1, *tensor.shape[1:])
        if None in (rows, *others):
            raise UsageError(
                f"tensor {tensor.name!r} has an unknown size, {tuple(tensor.shape)}: build the"
                " model for images of a fixed size"
            )
        return cls(cast(int, rows), tuple(cast(list[int], others)), tensor.dtype)

    @property
    def size(self) -> int:
        return self.rows * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class _LayerCall:
    """One call of a layer; `hidden` are its internal activations."""

    layer: Any
    name: str
    inputs: Sequence[_Activation]
    outputs: Sequence[_Activation]
    hidden: Sequence[_Activation]

    def saved(self) -> list[_Activation]:
        """Returns the activations that the gradient reads."""
        layer = self.layer
        saves_output = _function_name(layer) in _SAVING_OUTPUT
        if isinstance(layer, WITH_KERNEL):
            return [*self.inputs, *self.hidden, *(self.outputs if saves_output else ())]
        if isinstance(layer, keras.layers.BatchNormalization):
            return list(self.inputs)
        if isinstance(layer, _NONLINEARITIES):
            return list(self.outputs if saves_output else self.inputs)
        if isinstance(layer, _SAVING_NOTHING):
            return []
        return [*self.inputs, *self.outputs]


def _has_graph(layer: keras.Operation) -> bool:
    """Returns whether a layer is a built model whose graph is what a call computes."""
    # `inputs` of an unbuilt Sequential raises an AttributeError.
    is_model = isinstance(layer, keras.Function | keras.Sequential) and hasattr(layer, "inputs")
    return is_model and not (isinstance(layer, keras.Layer) and overrides_call(layer))


def _trace(
    model: keras.Model, inputs: Sequence[_Activation], prefix: str, calls: list[_LayerCall]
) -> list[_Activation]:
    """Adds the calls in a model's graph to `calls` and returns the model's outputs."""
    activations = {id(tensor): known for tensor, known in zip(model.inputs, inputs, strict=True)}
    graph = graph_calls(keras.Function(model.inputs, model.outputs))
    shapes = _trace_shapes(model, inputs, graph)
    for call in graph:
        layer, name = call.operation, prefix + call.operation.name
        call_inputs = [activations[id(tensor)] for tensor in _inputs_of(call)]
        if call.is_input:
            # The input of a nested model is the output of another layer.
            if not prefix:
                outputs = [activations[id(call.outputs[0])]]
                calls.append(_LayerCall(layer, name, [], outputs, []))
            continue
        if _has_graph(layer):
            outputs = _trace(layer, call_inputs, f"{name}/", calls)
        else:
            outputs = [_Activation.of(t, shapes.get(id(t), ())) for t in call.outputs]
            hidden = _hidden_activations(layer, outputs)
            calls.append(_LayerCall(layer, name, call_inputs, outputs, hidden))
        activations.update(zip(map(id, call.outputs), outputs, strict=True))
    return [activations[id(tensor)] for tensor in model.outputs]


def _trace_shapes(
    model: keras.Model, inputs: Sequence[_Activation], graph: Sequence[Call]
) -> dict[int, Sequence[int | None]]:
    """Returns the shapes of a model's tensors in a call on these inputs, by the tensors' ids.

    Empty where the symbolic tensors tell them: all operations are layers of Keras or of this
    package, which keep the first axis, and all sizes are known.
    """
    calls = [call for call in graph if not call.is_input]
    tensors = [tensor for call in calls for tensor in call.outputs]
    are_known = all(None not in tensor.shape[1:] for tensor in tensors)
    if are_known and all(x.rows == 1 for x in inputs) and all(map(_keeps_rows, calls)):
        return {}
    function = keras.Function(model.inputs, tensors)
    specs = [tf.TensorSpec((x.rows, *x.shape), x.dtype) for x in inputs]
    run = tf.function(lambda *images: keras.tree.flatten(function(list(images))), autograph=False)
    outputs = run.get_concrete_function(*specs).structured_outputs
    return {id(t): tuple(y.shape) for t, y in zip(tensors, outputs, strict=True)}


def _keeps_rows(call: Call) -> bool:
    """Returns whether an operation is known to keep the first axis: layers, but not functions."""
    layer = call.operation
    if not isinstance(layer, keras.Layer) or isinstance(layer, keras.layers.Lambda):
        return False
    return type(layer).__module__.partition(".")[0] in ("keras", "bn_keras")


def _inputs_of(call: Call) -> list[keras.KerasTensor]:
    """Returns the input tensors of a call; those of a nested model in the order of its inputs."""
    layer, inputs = call.operation, cast(Any, next(iter(call.arguments.args), None))
    if _has_graph(layer) and isinstance(inputs, dict):
        names = [tensor.name for tensor in layer.inputs]
        if inputs.keys() == set(names):
            return [inputs[name] for name in names]
    return _tensors_read(call)


def _tensors_read(call: Call) -> list[keras.KerasTensor]:
    """Returns the input tensors of a call without its mask, which Keras passes on by itself."""
    masks = {id(tensor) for tensor in keras.tree.flatten(call.arguments.kwargs.get("mask"))}
    return [tensor for tensor in call.input_tensors if id(tensor) not in masks]


def _hidden_activations(layer: Any, outputs: Sequence[_Activation]) -> list[_Activation]:
    """Returns a layer's internal activations; only separable convolutions have one."""
    if not isinstance(layer, SEPARABLE):
        return []
    channels = math.prod(layer.depthwise_kernel.shape[-2:])
    return [_Activation(1, (_num_positions(layer, outputs[0]), channels), outputs[0].dtype)]


def _num_positions(layer: keras.Layer, output: _Activation) -> int:
    """Returns the number of spatial positions of a convolution's output."""
    return output.size // layer.filters


def _function_name(layer: keras.Operation) -> str:
    """Returns the name of a layer's nonlinearity, or of the layer if it is one."""
    activation = getattr(layer, "activation", None)
    return getattr(activation or layer, "__name__", type(layer).__name__.lower())


def _multiply_adds(call: _LayerCall) -> int:
    layer = call.layer
    if isinstance(layer, SEPARABLE):
        each = math.prod(layer.depthwise_kernel.shape) + math.prod(layer.pointwise_kernel.shape)
        return each * _num_positions(layer, call.outputs[0])
    if not isinstance(layer, WITH_KERNEL):
        return 0
    # Each output value takes one multiply-add per kernel weight of its channel. In a transposed
    # convolution, each input value does.
    channel_axes = 2 if isinstance(layer, DEPTHWISE) else 1
    tensors = call.inputs if isinstance(layer, TRANSPOSED) else call.outputs
    return math.prod(layer.kernel.shape[:-channel_axes]) * tensors[0].size


def _has_other_products(layer: keras.Operation) -> bool:
    """Returns whether a layer has multiply-adds that `_multiply_adds` does not count."""
    if isinstance(layer, (*WITH_KERNEL, *_NOT_MULTIPLYING)):
        return False
    if type(layer).__module__.startswith("keras.") and type(layer).__name__ in _PRODUCTS:
        return True
    # Frozen and quantized weights multiply too.
    return any(len(weight.shape) > 1 for weight in getattr(layer, "weights", []))


def _layer_cost(
    call: _LayerCall, counted: Collection[int], saved: Collection[_Activation], dtype: str | None
) -> LayerCost:
    """Returns the cost of a call; weights whose ids are in `counted` are not counted again."""

    def parameters(kind: str) -> int:
        weights = getattr(call.layer, kind, [])
        return sum(math.prod(weight.shape) for weight in weights if id(weight) not in counted)

    own = [tensor for tensor in (*call.outputs, *call.hidden) if tensor in saved]
    return LayerCost(
        name=call.name,
        kind=type(call.layer).__name__,
        input_shapes=tuple(tensor.shape for tensor in call.inputs),
        output_shape=call.outputs[0].shape,
        trainable=parameters("trainable_weights"),
        non_trainable=parameters("non_trainable_weights"),
        multiply_adds=_multiply_adds(call),
        activation_bytes=sum(t.size * tf.as_dtype(dtype or t.dtype).size for t in own),
    )


def _grouped(
    layers: Iterable[LayerCost], key: Callable[[LayerCost], str]
) -> dict[str, list[LayerCost]]:
    groups: dict[str, list[LayerCost]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return groups


def _map_size(shape: Sequence[int]) -> str:
    """Returns the spatial size, such as "28x28", or "1" for a vector."""
    return "x".join(map(str, shape[:-1])) or "1"


def _short(number: float) -> str:
    """Formats a number as three digits and the unit T, G or M, or in full below a million."""
    if number < 1e6:
        return f"{number:,}"
    rounded = float(f"{number:.3g}")  # 999.7 M becomes 1 G.
    power, unit = next((p, u) for p, u in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if rounded >= p)
    return f"{rounded / power:.3g} {unit}"
