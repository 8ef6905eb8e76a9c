"""All uses of Keras' private attributes, each with the reason for it."""

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf
from keras.src.utils.tracking import Tracker


class Call(Protocol):
    """One call of an operation in a graph: Keras' Node, which has no public name.

    Attributes:
      operation: the called operation.
      arguments: `args` and `kwargs` of the call.
      input_tensors, outputs: flat lists of symbolic tensors.
      is_input: whether the operation is an InputLayer.
    """

    operation: keras.Operation
    arguments: Any
    input_tensors: Sequence[keras.KerasTensor]
    outputs: Sequence[keras.KerasTensor]
    is_input: bool


def all_layers(model: keras.Layer, include_self: bool = True) -> list[keras.Layer]:
    """Returns the layers of a model, including those of nested models, wrappers and cells.

    `model.layers` contains only the outermost layers, and Keras has no public access to the others.

    Args:
      model: model or layer.
      include_self: whether the list starts with `model` itself.
    """
    return list(model._flatten_layers(include_self=include_self))


def layer_names(model: keras.Layer) -> dict[keras.Layer, str]:
    """Returns a unique name of each layer of a model, itself included.

    The name is the layer's path. Layers of two nested models may have the same path, such as those
    of two backbones of one architecture: then the names of the models are added in front.
    """
    layers = all_layers(model)
    count = collections.Counter(layer.path for layer in layers)
    # A layer of a model that was not called as a whole may have no path.
    names = {x: x.path for x in layers if x.path and count[x.path] == 1}

    def add_prefixed(parent: keras.Layer, prefix: str) -> None:
        for child in parent._flatten_layers(include_self=False, recursive=False):
            # Layers may refer to each other.
            if child in visited:
                continue
            visited.add(child)
            name = prefix + child.name
            if child not in names:
                names[child] = name if name not in taken else f"{name} ({len(names)})"
                taken.add(names[child])
            add_prefixed(child, f"{name}/")

    visited, taken = {model}, set(names.values())
    add_prefixed(model, "")
    return names | {model: model.name}


def implicit_mask(tensor: Any) -> tf.Tensor | None:
    """Returns the mask that a layer such as Masking has attached to its output, or None."""
    return getattr(tensor, "_keras_mask", None)


def batch_norm_layers(model: keras.Layer) -> list[keras.layers.BatchNormalization]:
    """Returns the BatchNormalization layers of a model, ours and Keras', among `all_layers`."""
    return [v for v in all_layers(model) if isinstance(v, keras.layers.BatchNormalization)]


def trains_batch_norm(model: keras.Layer) -> bool:
    """Returns whether a model has a BatchNormalization layer that is not frozen."""
    return any(layer.trainable for layer in batch_norm_layers(model))


# Objects whose attributes may contain variables.
_OWNERS = (
    keras.Operation,
    keras.Metric,
    keras.random.SeedGenerator,
    tf.Module,
    tf.__internal__.tracking.AutoTrackable,
)


def all_variables(model: keras.Layer) -> list[keras.Variable | tf.Variable]:
    """Returns each variable that a model contains, except those of optimizers.

    `model.variables` contains neither the states of recurrent layers, nor metrics, nor a layer's
    variables of TensorFlow.
    """
    found: list[keras.Variable | tf.Variable] = []
    seen: set[int] = set()
    pending: list[Any] = [model]
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, keras.optimizers.Optimizer):
            continue
        seen.add(id(value))
        if isinstance(value, keras.Variable | tf.Variable):
            found.append(value)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
        elif isinstance(value, _OWNERS):
            pending += vars(value).values()
    return found


def graph_of(layer: keras.Operation) -> keras.Function | None:
    """Returns the graph of a functional or sequential model, or None for any other layer.

    A Sequential keeps its graph in a private attribute, which is None until the model is built.
    """
    if isinstance(layer, keras.Sequential):
        return layer._functional
    return layer if isinstance(layer, keras.Model) and isinstance(layer, keras.Function) else None


def graph_calls(graph: keras.Function) -> list[Call]:
    """Returns the calls of a graph in the order of execution.

    The public `operations` lists each operation once, however often it is called.
    """
    return [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
    ]


def overrides_call(layer: keras.Layer) -> bool:
    """Returns whether a layer's `call` is neither Keras' nor ours."""
    definer = next(base for base in type(layer).__mro__ if "call" in vars(base))
    is_known = definer.__module__.partition(".")[0] in ("keras", "bn_keras")
    return not is_known or "call" in vars(layer)


def producer(tensor: keras.KerasTensor) -> keras.Operation | None:
    """Returns the operation that computes a symbolic tensor, or None for a free tensor."""
    history = getattr(tensor, "_keras_history", None)
    return history and history.operation


# Attributes of a Function, and hence of a Functional model, that describe its graph.
_GRAPH_ATTRIBUTES = (
    "_inputs_struct",
    "_outputs_struct",
    "_inputs",
    "_outputs",
    "_nodes",
    "_nodes_by_depth",
    "_operations",
    "_operations_by_depth",
)
# Calls of an operation, and the losses of its last call.
_CALL_ATTRIBUTES = ("_inbound_nodes", "_outbound_nodes", "_losses", "_loss_ids")
# Set by compile() and fit(). The compiled functions refer to the model.
_TRAINER_ATTRIBUTES = (
    "train_function",
    "test_function",
    "predict_function",
    "history",
    "_compile_loss",
    "_compile_metrics",
    "_compiled_trainable_state",
    "_loss_tracker",
    "_eval_epoch_iterator",
)


def graph_ends(graph: keras.Function) -> tuple[Any, Any]:
    """Returns the symbolic inputs and outputs of a graph, in their structure.

    The public `input` and `output` of a keras.Function are those of its first call.
    """
    return graph._inputs_struct, graph._outputs_struct


def graph_attributes(graph: keras.Function) -> dict[str, Any]:
    """Returns the attributes that describe a graph, by name."""
    return {name: getattr(graph, name) for name in _GRAPH_ATTRIBUTES}


def attributes_to_copy(value: Any) -> dict[str, Any]:
    """Returns the attributes that a copy of an object has, by name.

    A copied operation has not been called, and its graph, if any, is built anew. A copied model has
    not been compiled.
    """
    attributes = dict(vars(value))
    if isinstance(value, keras.Operation):
        attributes |= {name: [] for name in _CALL_ATTRIBUTES if name in attributes}
        if "_loss_ids" in attributes:
            attributes["_loss_ids"] = set()
    if isinstance(value, keras.Function):
        for name in _GRAPH_ATTRIBUTES:
            del attributes[name]
    if isinstance(value, keras.Model):
        attributes |= {name: None for name in _TRAINER_ATTRIBUTES if name in attributes}
        if compile_arguments(value):
            attributes |= {"optimizer": None, "_compile_config": None, "compiled": False}
    # TensorFlow's records of the other attributes come last, so that an error names the others.
    return dict(sorted(attributes.items(), key=lambda item: item[0].startswith("_self_")))


def build_like(old: keras.Layer, new: keras.Layer) -> None:
    """Builds a layer for the input shape of another one; the weights get the same paths."""
    new._parent_path = old._parent_path
    new.build_from_config(old.get_build_config())


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Returns the arguments of the last call of compile(), by name; none if there was no call.

    The public get_compile_config serializes them, which fails for most custom objects.
    """
    config = getattr(model, "_compile_config", None)
    return config.config if model.compiled and config is not None else {}


def refresh_identities(value: Any) -> None:
    """Updates the tables of a copied object that identify other objects by their id or key."""
    if isinstance(value, Tracker):
        value.stored_ids = {
            name: {id(x) for x in store} for name, (_, store) in value.config.items()
        }
    if isinstance(value, keras.optimizers.Optimizer) and value.built:
        value._trainable_variables_indices = {
            value._var_key(variable): i for i, variable in enumerate(value._trainable_variables)
        }


def unbuild_optimizer(optimizer: keras.optimizers.Optimizer) -> None:
    """Removes an optimizer's slot variables, and keeps its iterations."""
    kept = (optimizer._iterations, optimizer._learning_rate)
    for variable in list(optimizer._variables):
        if not any(variable is v for v in kept):
            optimizer._untrack_variable(variable)
    optimizer._trainable_variables, optimizer._trainable_variables_indices = [], {}
    optimizer.built = False
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        unbuild_optimizer(inner)


def empty_like(container: Any) -> Any:
    """Returns an empty list, set or dict of the same class, with the same default_factory.

    Keras wraps the containers of a layer, and so does TensorFlow. Keras' classes have a tracker,
    which checks that the layer may get new variables; set it when the container is filled.
    """
    if isinstance(container, collections.defaultdict):
        return type(container)(container.default_factory)
    return type(container)([]) if isinstance(container, list) else type(container)()


# Their variables or entries can change. AutoTrackable includes what tf.saved_model.load returns.
_CHANGEABLE_IN_TENSORFLOW = (
    tf.__internal__.tracking.AutoTrackable,
    tf.types.experimental.ConcreteFunction,
    tf.lookup.experimental.DenseHashTable,
    tf.queue.QueueBase,
)


def is_of_tensorflow(value: Any) -> bool:
    """Returns whether TensorFlow defines an object's class; False for a tf.Module."""
    package = type(value).__module__.partition(".")[0]
    return package == "tensorflow" and not isinstance(value, tf.Module)


def copy_tensorflow_object(value: Any, copy: Callable[[Any], Any]) -> Any:
    """Returns a copy of an object that can change, or the object itself.

    Tensors, static tables, datasets and strategies do not change. Variables are created in the
    current strategy.

    Args:
      value: object of a class that TensorFlow defines.
      copy: copies the Python function of a tf.function.

    Raises:
      TypeError: the object can change, and TensorFlow has no way to copy it.
    """
    if isinstance(value, tf.types.experimental.PolymorphicFunction):
        return value._clone(copy(value.python_function))
    if isinstance(value, tf.Variable):
        variable = tf.Variable(
            tf.convert_to_tensor(value),
            trainable=value.trainable,
            name=value.name.partition(":")[0],
            dtype=value.dtype,
            synchronization=value.synchronization,
            aggregation=value.aggregation,
            shape=value.shape,
        )
        if value.synchronization == tf.VariableSynchronization.ON_READ:
            # The initial value is that of each replica. A sum over replicas is not.
            variable.assign(tf.convert_to_tensor(value))
        return variable
    if isinstance(value, tf.lookup.experimental.MutableHashTable):
        table = type(value)(value.key_dtype, value.value_dtype, value._default_value)
        table.insert(*value.export())
        return table
    if isinstance(value, tf.random.Generator):
        return tf.random.Generator.from_state(tf.convert_to_tensor(value.state), value.algorithm)
    if isinstance(value, _CHANGEABLE_IN_TENSORFLOW):
        raise TypeError(f"TensorFlow cannot copy a {type(value).__name__}")
    return value


@contextlib.contextmanager
def replaced_method(layer: keras.Layer, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replaces a method of one layer inside a `with` block; other layers keep theirs.

    Keras calls `layer.call`, `layer._moments` and the like on the instance, whose attributes take
    precedence over the class's methods.

    Args:
      layer: layer to change.
      name: method name.
      function: replacement, called without `self`.
    """
    attributes = vars(layer)
    previous = {name: attributes[name]} if name in attributes else {}
    attributes[name] = function
    try:
        yield
    finally:
        # Restores the class's method, unless another one had been set.
        del attributes[name]
        attributes.update(previous)


@contextlib.contextmanager
def without_traces(model: keras.Layer) -> Iterator[None]:
    """Replaces each tf.function of the layers by one without traces inside a `with` block.

    A layer's `call`, or a method that it calls, may be a tf.function. Its earlier traces contain
    the methods that `replaced_method` replaces, and traces of the replacements must not be used
    later.
    """
    with contextlib.ExitStack() as stack:
        for layer in all_layers(model):
            for name in _function_names(layer):
                function = getattr(layer, name)
                new = function._clone(function.python_function)
                stack.enter_context(replaced_method(layer, name, new))
        yield


def _function_names(layer: keras.Layer) -> list[str]:
    """Returns the names of a layer's methods and attributes that are a tf.function."""
    attributes: dict[str, Any] = {}
    for base in reversed(type(layer).__mro__):
        attributes |= vars(base)
    attributes |= vars(layer)
    kind = tf.types.experimental.PolymorphicFunction
    return [name for name, value in attributes.items() if isinstance(value, kind)]


def observed_moments(
    layer: keras.layers.BatchNormalization,
    observer: Callable[[tf.Tensor, tf.Tensor | None, tf.Tensor, tf.Tensor], None],
) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which `observer` receives the moments that a layer computes.

    keras.layers.BatchNormalization computes its moments in a private method.

    Args:
      layer: Keras' layer.
      observer: called with the inputs, mask, mean and variance of each training-mode call.
    """
    moments = layer._moments

    def compute_moments(inputs: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        mean, variance = moments(inputs, mask)
        observer(inputs, mask, mean, variance)
        return mean, variance

    return replaced_method(layer, "_moments", compute_moments)
