"""Batch normalization folded into the layers before it: Algorithm 2, line 11."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from bn_keras.batch_norm import BATCH_NORMS, normalized_axes
from bn_keras.errors import UsageError
from bn_keras.keras_internals import all_layers, graph_nodes, graph_of

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
_FOLDABLE = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Dense,
    *_DEPTHWISE,
    *_SEPARABLE,
    *_TRANSPOSED,
)

# Of the random inputs of the check: examples, and the length of what has no length of its own.
_EXAMPLES = 8
_SIDE, _VOLUME_SIDE = 224, 32
# Timed calls of each network.
_ROUNDS = 10
# Distance between 1 and the next number.
_PRECISIONS = {"float64": 2**-52, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What was folded, and how the folded network compares; str() gives a few lines.

    Attributes:
      folded: names of the layers that are gone, after those of the models they are nested in.
      kept: by such a name, why a layer could not be folded.
      input_shapes: of the examples that both networks were compared on.
      largest_difference: between the outputs of both.
      largest_output: the largest absolute value of the output in which it was found.
      top1_agreement: fraction of the examples for which both put the same class first; None
        without an output [N, classes].
      milliseconds_before, milliseconds_after: of a call, a median over calls in turns.
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
    def speed_up(self) -> float:
        """Time of a call before over time of a call after."""
        return self.milliseconds_before / self.milliseconds_after

    def __str__(self) -> str:
        total = len(self.folded) + len(self.kept)
        shapes = ", ".join(str(list(shape)) for shape in self.input_shapes)
        lines = [
            f"{len(self.folded)} of {total} BatchNormalization layers folded",
            f"largest difference {self.largest_difference:.2g} in outputs of up to"
            f" {self.largest_output:.3g}",
            f"{self.milliseconds_after:.1f} ms a call of {shapes}, before"
            f" {self.milliseconds_before:.1f} ms: {self.speed_up:.2f} times as fast",
        ]
        if self.top1_agreement is not None:
            lines[1] += f"; the same class first in {self.top1_agreement:.1%}"
        width = max(map(len, self.kept), default=0)
        lines += [f"kept {name.ljust(width)}  {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def fold_batch_norm(model: keras.Model, inputs: object = None) -> tuple[keras.Model, FoldReport]:
    """Gives the network for inference, with BatchNormalization inside the layers before it.

    A layer y = scale * x + offset, with scale = gamma / sqrt(moving_variance + epsilon) and
    offset = beta - moving_mean * scale, goes into the kernel and the bias of the convolution
    (depthwise, separable and transposed too) or dense layer that makes x, and disappears. Ours
    and Keras' are treated alike; folded weights are computed in float64.

    Decisions:
      - A layer used in several places is folded where all of them allow it, as are layers that
        several networks share in the same order.
      - What can't be folded becomes one affine operation: a depthwise 1x1 convolution of images,
        which TensorFlow joins with what follows, else keras.layers.Rescaling. So the result needs
        bn_keras only for what else of it the network has. Inside of other layers (TimeDistributed,
        a subclassed model) a BatchNormalization stays, frozen; and so does one that is called with
        training=True, which has no fixed scale and offset.
      - A zero-padded convolution takes nothing of the BatchNormalization before it, since its
        padding is not normalized.
      - The folded network and the given one are both run, and have to agree.
      - The given model is left alone and shares nothing with the new one, which is not compiled.
        Replicas that aren't synchronized need merge_moving_statistics before.

    Args:
      model: Functional or Sequential, built; nested ones are gone through.
      inputs: a batch to compare on, as the model takes it; None draws from a normal distribution.

    Returns:
      The model, of the same kind, with the same names and dtype policies, and the report.

    Raises:
      UsageError: nothing to fold, a model whose layers its code makes, a layer that its config
        doesn't describe, statistics that aren't finite, or inputs that don't fit.
      ArithmeticError: folded and given network differ in the first half of the digits.

    Source: Ioffe & Szegedy 2015, Algorithm 2, line 11.
    """
    plan = _Plan(model)
    folded_model = _Folder(plan).fold(model)
    inputs = _random_inputs(model) if inputs is None else inputs
    return folded_model, FoldReport(
        folded=tuple(plan.names[x] for x in plan.batch_norms if x not in plan.kept),
        kept=plan.reasons(),
        **_compare(model, folded_model, inputs),
    )


def unfoldable(model: keras.Model) -> dict[str, str]:
    """Gives the BatchNormalization layers that fold_batch_norm would keep, with the reason.

    Args:
      model: as there.

    Returns:
      By name, as in FoldReport; empty if all of them can be folded.

    Raises:
      UsageError: as there, of what concerns the model alone.
    """
    return _Plan(model).reasons()


class _Plan:
    """What becomes of each BatchNormalization of a model.

    Attributes:
      names: of the layers, after those of the models that they are nested in.
      batch_norms: all of them, in the order of the model's layers.
      into: by the layer that takes it up, the BatchNormalization.
      kept: by BatchNormalization, why it can't be folded.
      inside: the layers that are no part of a graph, but held by one that is.
      by_batch: the BatchNormalization layers that normalize by the batch whatever the mode.
    """

    def __init__(self, model: keras.Model) -> None:
        if not isinstance(model, keras.Sequential | keras.Function):
            raise UsageError(
                f"model {model.name!r} is a subclassed {type(model).__name__}, whose layers its"
                " code makes: give a Functional or Sequential model"
            )
        if graph_of(model) is None:
            raise UsageError(
                f"model {model.name!r} has no weights yet: call it, or give it a keras.Input, first"
            )
        # By the id of a tensor: the layer that makes it, and the calls that take it (None for
        # the outputs of a model).
        self._makers: dict[int, keras.Operation] = {}
        self._users: dict[int, list] = {}
        self._calls: dict[keras.Operation, list] = {}
        self.names: dict[keras.Operation, str] = {}
        self.inside: set[keras.Layer] = set()
        self.by_batch: set[keras.Layer] = set()
        self._read(model)

        self.batch_norms = [
            layer
            for layer in all_layers(model)
            if isinstance(layer, BATCH_NORMS) and (layer in self._calls or layer in self.inside)
        ]
        if not self.batch_norms:
            raise UsageError(f"model {model.name!r} has no BatchNormalization to fold")
        obstacles = {layer: self._obstacle(layer) for layer in self.batch_norms}
        self.kept = {layer: reason for layer, reason in obstacles.items() if reason}
        self.into = {
            self._maker(call): layer
            for layer in self.batch_norms
            if layer not in self.kept
            for call in self._calls[layer]
        }

    def reasons(self) -> dict[str, str]:
        """Gives `kept` by the layers' names."""
        return {self.names[layer]: reason for layer, reason in self.kept.items()}

    def _read(self, model: keras.Model, place: str = "") -> None:
        """Notes who makes and who takes each tensor of a model and of those nested in it."""
        graph = graph_of(model)
        for tensor in graph.outputs:
            self._users.setdefault(id(tensor), []).append(None)
        for call in graph_nodes(graph):
            layer = call.operation
            is_new = layer not in self._calls
            # Models that have layers in common may share calls as well, which then count twice.
            self._calls.setdefault(layer, []).append(call)
            for tensor in call.outputs:
                self._makers[id(tensor)] = layer
            for tensor in call.input_tensors:
                self._users.setdefault(id(tensor), []).append(call)
            if isinstance(layer, keras.Layer):
                self._read_layer(call, place + layer.name, is_new)

    def _read_layer(self, call: object, name: str, is_new: bool) -> None:
        layer = call.operation
        held = all_layers(layer, include_self=False)
        if _is_training(call):
            self.by_batch.update(
                x for x in (layer, *held) if isinstance(x, BATCH_NORMS) and x.trainable
            )
        if not is_new:
            return
        self.names.setdefault(layer, name)
        if graph_of(layer) is None:
            self.inside.update(held)
            for x in held:
                self.names.setdefault(x, f"{name}/{x.name}")
        else:
            self._read(layer, f"{name}/")

    def _obstacle(self, batch_norm: keras.Layer) -> str | None:
        """Says why a layer can't be folded; None if it can."""
        if batch_norm in self.by_batch:
            return "is called with training=True, and so normalizes by the batch"
        if batch_norm in self.inside:
            return "is inside of a layer that is no Functional or Sequential model"
        calls = self._calls[batch_norm]
        for call in calls:
            reason = self._obstacle_at(call)
            if reason:
                return reason if len(set(calls)) == 1 else f"is shared, and in one place {reason}"
        makers = [self._maker(call) for call in calls]
        for maker in makers:
            if maker in self.inside or makers.count(maker) < len(self._calls[maker]):
                return f"follows {_named(maker)}, which is used elsewhere too"
        return None

    def _obstacle_at(self, call: object) -> str | None:
        """Says what stands in the way where a BatchNormalization is called."""
        maker = self._maker(call)
        follows = f"follows {_named(maker)}"
        if type(maker) not in _FOLDABLE:
            return follows
        if maker.activation not in (None, keras.activations.linear):
            return f"{follows}, which has its activation inside"
        others = [user for user in self._users[id(call.input_tensors[0])] if user is not call]
        if others:
            takers = ["the outputs" if u is None else _named(u.operation) for u in others]
            return f"{follows}, whose output goes to {', '.join(takers)} too"
        if maker.compute_dtype != call.operation.compute_dtype:
            return f"{follows}, which computes in {maker.compute_dtype}"
        channels_first = getattr(maker, "data_format", None) == "channels_first"
        rank = call.operation.input_spec.ndim
        if _axes(call.operation) != [1 if channels_first else rank - 1]:
            return f"{follows}, but its axis={call.operation.axis} is not that layer's channels"
        if maker.quantization_mode or getattr(maker, "lora_enabled", False):
            return f"{follows}, whose kernel is quantized or has a LoRA part"
        return None

    def _maker(self, call: object) -> keras.Operation:
        return self._makers[id(call.input_tensors[0])]


def _is_training(call: object) -> bool:
    """Tells whether a layer is called with training=True, whatever the model's mode."""
    second = call.arguments.args[1] if len(call.arguments.args) > 1 else None
    return call.arguments.kwargs.get("training", second) not in (None, False)


def _axes(batch_norm: keras.Layer) -> list[int]:
    return normalized_axes(batch_norm.axis, [None] * batch_norm.input_spec.ndim)


def _named(layer: keras.Operation) -> str:
    return f"{type(layer).__name__} {layer.name!r}"


class _Folder:
    """Copies a model as its plan says.

    Args:
      plan: of the model that `fold` gets.
    """

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._copies: dict[keras.Operation, keras.Operation] = {}

    def fold(self, model: keras.Model) -> keras.Model:
        """Gives the folded model, with its weights."""
        folded = self._copy(model)
        copies = [(o, n) for o, n in self._copies.items() if isinstance(o, keras.Layer)]
        # A model comes after its layers here, and sets theirs too: the other way round.
        for old, new in reversed(copies):
            if new.trainable != old.trainable:
                new.trainable = old.trainable
        for old, new in copies:
            if graph_of(old) is None:
                self._fill(old, new)
        return folded

    def _copy(self, old: keras.Operation) -> keras.Operation:
        if old not in self._copies:
            self._copies[old] = self._model(old) if graph_of(old) is not None else self._layer(old)
        return self._copies[old]

    def _model(self, model: keras.Model) -> keras.Model:
        graph = graph_of(model)
        inputs = keras.tree.map_structure(
            lambda tensor: self._copy(tensor._keras_history.operation).output, graph.input
        )
        if isinstance(model, keras.Sequential):
            layers = [self._copy(x) for x in model.layers if not self._disappears(x)]
            return keras.Sequential([*keras.tree.flatten(inputs), *layers], name=model.name)
        outputs = graph._run_through_graph(inputs, operation_fn=self._operation)
        return keras.Model(inputs, outputs, name=model.name)

    def _operation(self, old: keras.Operation) -> Callable:
        """Gives what takes the place of a layer where it is called."""
        if self._disappears(old):
            return lambda inputs, *args, **kwargs: inputs
        if self._is_affine(old):
            return lambda inputs, *args, **kwargs: self._copy(old)(inputs)
        return self._copy(old)

    def _disappears(self, layer: keras.Operation) -> bool:
        return isinstance(layer, BATCH_NORMS) and layer not in self._plan.kept

    def _is_affine(self, layer: keras.Operation) -> bool:
        return layer in self._plan.kept and layer not in self._plan.by_batch

    def _layer(self, old: keras.Operation) -> keras.Operation:
        if self._is_affine(old):
            return _affine_layer(old)
        # Keras refuses Python lambdas from a file; this one is in memory already.
        options = {"safe_mode": False} if isinstance(old, keras.layers.Lambda) else {}
        try:
            config = old.get_config()
            if old in self._plan.into:
                config["use_bias"] = True
            return type(old).from_config(config, **options)
        except (NotImplementedError, TypeError) as error:
            raise UsageError(
                f"{_named(old)} can't be copied, since its config does not describe it: give its"
                f" class a get_config ({str(error).strip().splitlines()[0]})"
            ) from None

    def _fill(self, old: keras.Layer, new: keras.Layer) -> None:
        """Gives a copy its weights."""
        if old in self._plan.into:
            values = _folded_weights(old, *_scale_and_offset(self._plan.into[old]))
        elif self._is_affine(old):
            values = dict(zip(("kernel", "bias"), _scale_and_offset(old), strict=True))
        else:
            # As in a file: some layers, such as Normalization, make more of it than their weights.
            for o, n in zip(all_layers(old), all_layers(new), strict=True):
                store = {}
                o.save_own_variables(store)
                n.load_own_variables(store)
                # What stays a BatchNormalization keeps to its moving statistics.
                if isinstance(n, BATCH_NORMS) and o not in self._plan.by_batch:
                    n.trainable = False
            return
        for variable in new.weights:
            variable.assign(values[variable.name].reshape(variable.shape))


def _affine_layer(batch_norm: keras.Layer) -> keras.Layer:
    """Makes a layer for scale * x + offset, the quickest among Keras' own."""
    options = {"name": batch_norm.name, "dtype": batch_norm.dtype_policy}
    rank, axes = batch_norm.input_spec.ndim, _axes(batch_norm)
    if rank == 4 and axes == [3]:
        # One pass over the images, which is joined with the activation that follows.
        return keras.layers.DepthwiseConv2D(1, data_format="channels_last", **options)
    sizes = iter(batch_norm.moving_mean.shape)
    shape = [next(sizes) if axis in axes else 1 for axis in range(axes[0], rank)]
    scale, offset = (t.reshape(shape) for t in _scale_and_offset(batch_norm))
    return keras.layers.Rescaling(scale, offset, **options)


def _scale_and_offset(batch_norm: keras.Layer) -> tuple[np.ndarray, np.ndarray]:
    """Gives the affine map of a layer at inference, float64 of the shape of its statistics."""
    mean, variance, gamma, beta = (
        None if variable is None else _float64(variable)
        for variable in (
            batch_norm.moving_mean,
            batch_norm.moving_variance,
            batch_norm.gamma,
            batch_norm.beta,
        )
    )
    with np.errstate(invalid="ignore"):
        scale = (1 if gamma is None else gamma) / np.sqrt(variance + batch_norm.epsilon)
    offset = (0 if beta is None else beta) - mean * scale
    if not np.all(np.isfinite([scale, offset])):
        raise UsageError(
            f"the weights of layer {batch_norm.path!r} give no finite scale and offset: look for"
            " NaN, infinity or a negative variance in them"
        )
    return scale, offset


def _folded_weights(
    layer: keras.Layer, scale: np.ndarray, offset: np.ndarray
) -> dict[str, np.ndarray]:
    """Gives the weights by which a layer does what follows it too, float64 by their names.

    Args:
      layer: of _FOLDABLE.
      scale, offset: [C], of its output channels.
    """
    weights = {variable.name: _float64(variable) for variable in layer.weights}
    kernel = "pointwise_kernel" if isinstance(layer, _SEPARABLE) else "kernel"
    if isinstance(layer, _DEPTHWISE):
        # Its last two axes, input channel and multiple, make up the output channels.
        per_kernel = scale.reshape(weights[kernel].shape[-2:])
    elif isinstance(layer, _TRANSPOSED):
        per_kernel = scale[:, np.newaxis]
    else:
        per_kernel = scale
    return weights | {
        kernel: weights[kernel] * per_kernel,
        "bias": weights.get("bias", 0) * scale + offset,
    }


def _float64(variable: keras.Variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable).astype(np.float64)


def _random_inputs(model: keras.Model) -> object:
    """Draws inputs of a model: normal, or uniform for bytes."""
    generator = np.random.default_rng(0)

    def draw(tensor: keras.KerasTensor) -> np.ndarray:
        side = _VOLUME_SIDE if tensor.ndim > 4 else _SIDE
        examples, *rest = tensor.shape
        shape = (examples or _EXAMPLES, *(size or side for size in rest))
        if tensor.dtype == "uint8":
            return generator.integers(256, size=shape, dtype=np.uint8)
        if keras.backend.is_float_dtype(tensor.dtype):
            return generator.normal(size=shape).astype(np.float32)
        raise UsageError(
            f"model {model.name!r} takes {tensor.dtype}, of which random values may mean nothing:"
            " give inputs"
        )

    return keras.tree.map_structure(draw, graph_of(model).input)


def _compare(before: keras.Model, after: keras.Model, inputs: object) -> dict[str, object]:
    """Runs both networks on the same inputs, and gives what a FoldReport says of it."""
    inputs = keras.tree.map_structure(tf.convert_to_tensor, inputs)
    functions = [
        tf.function(lambda x, model=model: model(x, training=False), autograph=False)
        for model in (before, after)
    ]
    try:
        expected = _flat_arrays(functions[0](inputs))
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        raise UsageError(
            f"model {before.name!r} can't run on the inputs to compare on: give inputs that it"
            f" takes ({str(error).strip().splitlines()[0]})"
        ) from None
    outputs = _flat_arrays(functions[1](inputs))
    difference, size = check_agreement(before, expected, outputs, f"{before.name!r}, folded,")
    agreements = [
        np.mean(a.argmax(axis=1) == b.argmax(axis=1))
        for a, b in zip(outputs, expected, strict=True)
        if a.ndim == 2 and a.shape[1] > 1
    ]
    times = _milliseconds([lambda f=f: _flat_arrays(f(inputs)) for f in functions])
    return {
        "input_shapes": tuple(tuple(x.shape) for x in keras.tree.flatten(inputs)),
        "largest_difference": difference,
        "largest_output": size,
        "top1_agreement": float(np.mean(agreements)) if agreements else None,
        "milliseconds_before": times[0],
        "milliseconds_after": times[1],
    }


def check_agreement(
    model: keras.Model,
    expected: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    what: str,
) -> tuple[float, float]:
    """Compares outputs with those of a model, which may be rounded in the second half of digits.

    Args:
      model: whose dtypes say how many digits there are.
      expected: its outputs.
      outputs: of the same shapes.
      what: where they come from.

    Returns:
      The largest difference, of the output where it weighs most, and the largest absolute value
      of that output.

    Raises:
      ArithmeticError: they differ in the first half of the digits.
    """
    differences = [np.max(np.abs(a - b)) for a, b in zip(outputs, expected, strict=True)]
    sizes = [np.max(np.abs(a)) for a in expected]
    difference, size = max(
        zip(differences, sizes, strict=True), key=lambda pair: pair[0] / (pair[1] or 1)
    )
    precision = max(_PRECISIONS.get(x.compute_dtype, 0) for x in all_layers(model))
    # A difference of NaN is none that can be compared.
    if not difference <= precision**0.5 * size:
        raise ArithmeticError(
            f"{what} gives outputs that differ by up to {difference:.3g} from those of the network"
            f" {model.name!r}, which reach {size:.3g}: a network that amplifies rounding does that;"
            " any other has met a bug, which please report"
        )
    return float(difference), float(size)


def _flat_arrays(outputs: object) -> list[np.ndarray]:
    return [np.asarray(tf.cast(t, tf.float64)) for t in keras.tree.flatten(outputs)]


def _milliseconds(functions: Sequence[Callable[[], object]]) -> list[float]:
    """Gives each function's median time of a call; they take turns, so that both share a load."""
    times = [[] for _ in functions]
    for _ in range(_ROUNDS):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return [1e3 * statistics.median(own) for own in times]
