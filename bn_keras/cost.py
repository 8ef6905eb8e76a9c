"""What a network costs: parameters, multiply-adds, and the activations that training keeps."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence

import keras
import tensorflow as tf

from bn_keras.batch_norm import BATCH_NORMS
from bn_keras.errors import UsageError
from bn_keras.keras_internals import graph_nodes


def _of_all_ranks(*names: str) -> tuple[type, ...]:
    found = (getattr(keras.layers, name.format(n), None) for name in names for n in (1, 2, 3))
    return tuple(layer for layer in found if layer)


_CONVOLUTIONS = _of_all_ranks("Conv{}D")
_DEPTHWISE = _of_all_ranks("DepthwiseConv{}D")
_SEPARABLE = _of_all_ranks("SeparableConv{}D")
_TRANSPOSED = _of_all_ranks("Conv{}DTranspose")
_MULTIPLYING = (*_CONVOLUTIONS, *_DEPTHWISE, *_SEPARABLE, *_TRANSPOSED, keras.layers.Dense)
# Weights of these make up no products with the inputs, or one for each value at the most.
_NOT_MULTIPLYING = (*BATCH_NORMS, keras.layers.Embedding, keras.layers.PReLU)
# Their gradients take no more than shapes.
_KEEPING_NOTHING = (
    keras.layers.InputLayer,
    *_of_all_ranks("AveragePooling{}D", "GlobalAveragePooling{}D", "ZeroPadding{}D"),
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
# Of these, the gradient takes the output; of other functions, the input.
_BY_OUTPUT = ("relu", "relu6", "sigmoid", "softmax", "tanh")

_MOST_ROWS = 40


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One call of a layer, for one image; shapes are without the batch.

    Attributes:
      name: of the layer, after those of the models that it is nested in.
      kind: the layer's class.
      input_shapes, output_shape: of the call; of several outputs, the first.
      trainable, non_trainable: parameters; 0 where an earlier call has counted them.
      multiply_adds: of the forward pass.
      activation_bytes: of what the call makes and the backward pass reads.
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
        """What the layer belongs to, by its name: "3a" of "3a_1x1_conv", "stem_1" of its pool."""
        return re.match(r"[^_/]*(_\d+(?=_|/|$))?", self.name)[0]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one image costs a network; str() is a table of its modules.

    Attributes:
      layers: every call of a layer, in the order of the graph.
      uncounted: names of layers whose multiply-adds are not known here, though they have some.
    """

    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...]

    @property
    def trainable(self) -> int:
        """Trainable parameters."""
        return sum(layer.trainable for layer in self.layers)

    @property
    def non_trainable(self) -> int:
        """Parameters that no gradient changes: moving statistics, and what is frozen."""
        return sum(layer.non_trainable for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        """Of the forward pass; the backward pass takes about twice as many."""
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def flops(self) -> int:
        """Of the forward pass: two for each multiply-add."""
        return 2 * self.multiply_adds

    @property
    def activation_bytes(self) -> int:
        """What the backward pass needs of an image, at the least."""
        return sum(layer.activation_bytes for layer in self.layers)

    def line(self) -> str:
        """Gives one line about the whole."""
        return (
            f"{self.trainable:,} parameters, {_short(self.multiply_adds)} multiply-adds an image"
            f" forward, {self.activation_bytes / 2**20:.3g} MiB of it kept for the way back"
        )

    def __str__(self) -> str:
        by_name = _grouped(self.layers, lambda layer: layer.module)
        # Names that Keras gave, by class and number, group nothing: then maps of one size.
        by_size = _grouped(self.layers, lambda layer: _sides(layer.output_shape))
        groups = by_name if len(by_name) <= _MOST_ROWS else by_size
        rows = [("module", "output", "parameters", "multiply-adds", "share", "MiB kept")]
        rows += [self._row(name, layers) for name, layers in groups.items()]
        rows.append(self._row("all", self.layers))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.insert(-1, "-" * len(lines[0]))
        lines += [
            "Parameters are the trainable ones; multiply-adds (2 FLOPs each) those of convolutions"
            " and dense",
            "layers, of an image forward; kept is what the backward pass needs of an image, an"
            " estimate.",
        ]
        if self.uncounted:
            lines.append(f"Not counted: the multiply-adds of {', '.join(self.uncounted)}")
        return "\n".join(lines)

    def _row(self, name: str, layers: Sequence[LayerCost]) -> tuple[str, ...]:
        multiply_adds = sum(layer.multiply_adds for layer in layers)
        return (
            name,
            "x".join(map(str, layers[-1].output_shape)),
            f"{sum(layer.trainable for layer in layers):,}",
            _short(multiply_adds),
            f"{multiply_adds / max(1, self.multiply_adds):.1%}",
            f"{sum(layer.activation_bytes for layer in layers) / 2**20:.2f}",
        )


def count(model: keras.Model, dtype: str | None = None) -> Cost:
    """Counts what one image costs a network, layer by layer.

    Decisions:
      - Multiply-adds are those of convolutions (grouped, depthwise, separable and transposed too)
        and of dense layers, padding included, as published counts have them. Biases, BN,
        nonlinearities, pools and sums don't count; layers that have products of their own
        (attention, recurrence) are named as uncounted.
      - A layer that is called twice works twice and has its parameters once.
      - Kept for the backward pass is every tensor that some gradient reads, once: the inputs of
        convolutions, dense layers and BN, the outputs of nonlinearities (ReLU, sigmoid, tanh,
        softmax) and both of max pools; what average pools, sums and concatenations read is not
        kept; of any other layer, input and output are. It is an estimate, and less than the peak:
        gradients in flight, workspaces, weights and the optimizer's state come on top, and a
        compiler may keep less, and compute again.

    Args:
      model: Functional or Sequential, built; nested ones are gone through.
      dtype: of the activations kept; None is each one's own, as the model's policies have it.

    Raises:
      UsageError: a model whose layers its code makes, or one for images of any size.
    """
    if not _has_graph(model):
        raise UsageError(
            f"model {model.name!r} is no Functional or Sequential model with known inputs, whose"
            " layers could be counted: build it with keras.Input"
        )
    calls = []
    _trace(model, [_Tensor.of(tensor) for tensor in model.inputs], "", calls)
    kept = {tensor for call in calls for tensor in call.kept()}
    layers, seen = [], set()
    for call in calls:
        is_first = call.layer not in seen
        seen.add(call.layer)
        layers.append(_layer_cost(call, is_first, kept, dtype))
    unknown = [call.name for call in calls if _multiplies_unknown(call.layer)]
    return Cost(tuple(layers), tuple(dict.fromkeys(unknown)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """One image's part of what a call makes; no two are equal."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: keras.KerasTensor) -> "_Tensor":
        shape = tuple(tensor.shape[1:])
        if None in shape:
            raise UsageError(
                f"tensor {tensor.name!r} of shape {tuple(tensor.shape)}: what it costs depends on"
                " the size of the images; build the model for images of a known size"
            )
        return cls(shape, tensor.dtype)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A layer, what it takes and what it makes; `hidden` it makes and takes itself."""

    layer: keras.Operation
    name: str
    inputs: Sequence[_Tensor]
    outputs: Sequence[_Tensor]
    hidden: Sequence[_Tensor]

    def kept(self) -> list[_Tensor]:
        """Gives what the gradient reads."""
        layer = self.layer
        if isinstance(layer, _MULTIPLYING):
            by_output = _function(layer) in _BY_OUTPUT
            return [*self.inputs, *self.hidden, *(self.outputs if by_output else ())]
        if isinstance(layer, BATCH_NORMS):
            return list(self.inputs)
        if isinstance(layer, _NONLINEARITIES):
            return list(self.outputs if _function(layer) in _BY_OUTPUT else self.inputs)
        if isinstance(layer, _KEEPING_NOTHING):
            return []
        return [*self.inputs, *self.outputs]


def _has_graph(layer: keras.Operation) -> bool:
    # Of a Sequential model that has no graph yet, asking for the inputs is an error.
    return isinstance(layer, keras.Function | keras.Sequential) and hasattr(layer, "inputs")


def _trace(
    model: keras.Model, given: Sequence[_Tensor], place: str, calls: list[_Call]
) -> list[_Tensor]:
    """Adds the calls of a model's graph, inputs first, and gives what it makes of `given`."""
    tensors = {id(tensor): known for tensor, known in zip(model.inputs, given, strict=True)}
    graph = keras.Function(model.inputs, model.outputs)
    for node in graph_nodes(graph):
        layer, name = node.operation, place + node.operation.name
        inputs = [tensors[id(tensor)] for tensor in node.input_tensors]
        if node.is_input:
            # A nested model's inputs are what somebody else made.
            if not place:
                calls.append(_Call(layer, name, [], [tensors[id(node.outputs[0])]], []))
            continue
        if _has_graph(layer):
            outputs = _trace(layer, inputs, f"{name}/", calls)
        else:
            outputs = [_Tensor.of(tensor) for tensor in node.outputs]
            calls.append(_Call(layer, name, inputs, outputs, _hidden(layer, outputs)))
        tensors.update(zip(map(id, node.outputs), outputs, strict=True))
    return [tensors[id(tensor)] for tensor in model.outputs]


def _hidden(layer: keras.Operation, outputs: Sequence[_Tensor]) -> list[_Tensor]:
    if not isinstance(layer, _SEPARABLE):
        return []
    channels = math.prod(layer.depthwise_kernel.shape[-2:])
    return [_Tensor((_positions(layer, outputs[0]), channels), outputs[0].dtype)]


def _positions(layer: keras.Layer, output: _Tensor) -> int:
    return output.size // layer.filters


def _function(layer: keras.Layer) -> str:
    """Gives the name of a layer's nonlinearity, which may be the layer itself."""
    activation = getattr(layer, "activation", None)
    return getattr(activation or layer, "__name__", type(layer).__name__.lower())


def _multiply_adds(call: _Call) -> int:
    layer = call.layer
    if isinstance(layer, _SEPARABLE):
        each = math.prod(layer.depthwise_kernel.shape) + math.prod(layer.pointwise_kernel.shape)
        return each * _positions(layer, call.outputs[0])
    if not isinstance(layer, _MULTIPLYING):
        return 0
    # Each output takes the kernel without the axis of the outputs; of a transposed convolution,
    # each input is given to the kernel without the axis of the inputs.
    apart = 2 if isinstance(layer, _DEPTHWISE) else 1
    tensors = call.inputs if isinstance(layer, _TRANSPOSED) else call.outputs
    return math.prod(layer.kernel.shape[:-apart]) * tensors[0].size


def _multiplies_unknown(layer: keras.Operation) -> bool:
    if isinstance(layer, (*_MULTIPLYING, *_NOT_MULTIPLYING)):
        return False
    return any(len(v.shape) > 1 for v in getattr(layer, "trainable_variables", []))


def _layer_cost(
    call: _Call, is_first: bool, kept: Collection[_Tensor], dtype: str | None
) -> LayerCost:
    def parameters(kind: str) -> int:
        variables = getattr(call.layer, kind, []) if is_first else []
        return sum(math.prod(v.shape) for v in variables)

    made = [tensor for tensor in (*call.outputs, *call.hidden) if tensor in kept]
    return LayerCost(
        name=call.name,
        kind=type(call.layer).__name__,
        input_shapes=tuple(tensor.shape for tensor in call.inputs),
        output_shape=call.outputs[0].shape,
        trainable=parameters("trainable_weights"),
        non_trainable=parameters("non_trainable_weights"),
        multiply_adds=_multiply_adds(call),
        activation_bytes=sum(t.size * tf.as_dtype(dtype or t.dtype).size for t in made),
    )


def _grouped(
    layers: Iterable[LayerCost], key: Callable[[LayerCost], str]
) -> dict[str, list[LayerCost]]:
    groups = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return groups


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[:-1])) or "1"


def _short(number: float) -> str:
    """Gives three digits and G or M, of small numbers all digits."""
    for power, unit in ((1e9, " G"), (1e6, " M")):
        if number >= power:
            return f"{number / power:.3g}{unit}"
    return f"{number:,}"
