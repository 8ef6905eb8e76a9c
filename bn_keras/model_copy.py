"""Copies a Keras model object by object, which preserves everything that the model contains."""

import contextlib
import copy
import functools
import inspect
import types
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

import keras
import tensorflow as tf

from bn_keras import keras_internals as internals
from bn_keras.errors import UsageError
from bn_keras.text import first_line

_LayerT = TypeVar("_LayerT", bound=keras.Layer)

# Shared with the copy, because nothing can change them.
_IMMUTABLE = (
    *(str, bytes, int, float, complex, bool, type(None), type(Ellipsis), slice, range),
    *(type, types.ModuleType, types.BuiltinFunctionType),
)
_CONTAINERS = (tuple, list, set, frozenset, dict)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_WITH_STATE = (keras.Operation, keras.Variable, keras.Metric, tf.Variable)


class _Removed:
    """Type of REMOVED."""


# The copy of a removed layer. Lists do not contain it, and attributes are None instead.
REMOVED = _Removed()


class ModelCopier:
    """Copies a model with everything in it; a subclass can replace or remove layers.

    Decisions:
      - Layers, variables, losses, metrics and optimizers are copied attribute by attribute, not
        through their configs. A layer therefore needs no get_config, and later changes to it are
        preserved: adapted state, LoRA, quantization, frozen weights, seeds.
      - The graph of a model is built again: the copied layers are called as the given ones were.
      - Each object has one copy. What is shared inside the model is shared inside the copy.
      - A function is shared with the given model, unless it captures layers or variables, or uses
        global variables that are layers or variables of the model, as in a notebook.
      - The copy is compiled with copies of the arguments. The state of the optimizer is copied;
        metrics start anew.
    """

    def __init__(self) -> None:
        # Copies by the id of the original, as for copy.deepcopy. The originals are kept alive, so
        # that no other object gets the same id.
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []
        self._copied_calls: set[int] = set()
        self._layers: list[keras.Layer] = []
        # Ids of the layers and their variables.
        self._own: set[int] = set()

    def copy_model(self, model: keras.Model) -> keras.Model:
        """Returns the copy of a model, in the same strategy.

        Raises:
          UsageError: the model contains an object that cannot be copied.
        """
        self._layers = internals.all_layers(model)
        self._own = {id(x) for layer in self._layers for x in (layer, *layer.variables)}
        strategy = model.distribute_strategy
        is_current = strategy is tf.distribute.get_strategy()
        with contextlib.nullcontext() if is_current else strategy.scope():
            new = self.copy(model)
        for original in self._originals:
            # Again, for objects that contain each other.
            internals.refresh_identities(self._copies[id(original)])
        return new

    def copy(self, value: Any) -> Any:
        """Returns the copy of an object, the same one each time."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, _IMMUTABLE) or value is REMOVED:
            return value
        if isinstance(value, keras.Operation):
            return self.copy_operation(value)
        if isinstance(value, keras.KerasTensor):
            return self._copy_symbolic_tensor(value)
        if isinstance(value, _CONTAINERS):
            return self._copy_container(value)
        if isinstance(value, _FUNCTIONS):
            return self._copy_function(value)
        if isinstance(value, weakref.ref):
            target = value()
            # An object outside of the model is not copied: nothing else would keep its copy alive.
            is_own = any(target is layer for layer in self._layers)
            return weakref.ref(self.copy(target)) if is_own else value
        if internals.is_of_tensorflow(value):
            return self.record(value, internals.copy_tensorflow_object(value, self.copy))
        if _consists_of_attributes(value):
            return self._copy_attributes(value)
        return self.record(value, copy.deepcopy(value, self._copies))

    def record(self, old: Any, new: Any) -> Any:
        """Makes an object the copy of another one, and returns it."""
        self._copies[id(old)] = new
        self._originals.append(old)
        return new

    def construct_like(
        self, old: keras.Layer, layer_class: type[_LayerT], **changes: Any
    ) -> _LayerT:
        """Constructs a layer with the arguments and weights of another one, as its copy.

        Args:
          old: layer that keeps each argument of its constructor in an attribute of that name.
          layer_class: class of the new layer, which accepts the same arguments.
          **changes: arguments to add or to change.
        """
        names = set(inspect.signature(type(old).__init__).parameters) - {"self", "kwargs"}
        names |= {"name", "trainable", "activity_regularizer", "autocast"}
        arguments = {name: self.copy(getattr(old, name)) for name in names}
        new = layer_class(dtype=self.copy(old.dtype_policy), **arguments | changes)
        self.record(old, new)
        if old.built:
            internals.build_like(old, new)
        weights = {weight.name: weight for weight in new.weights}
        for weight in old.weights:
            self.record(weight, weights[weight.name])
            weights[weight.name].assign(weight)
            weights[weight.name].trainable = weight.trainable
        # The user may have added attributes to the layer, replaced methods, or changed the only
        # setting that is not an argument.
        for name, value in vars(old).items():
            if not name.startswith("_") and name not in vars(new):
                vars(new)[name] = self.copy(value)
        new.supports_masking = old.supports_masking
        return new

    # --- Methods to override.

    def copy_operation(self, old: keras.Operation) -> Any:
        """Returns the copy of a layer, model or other operation, or REMOVED."""
        if isinstance(old, keras.layers.InputLayer):
            new = self.record(old, type(old).from_config(old.get_config()))
            self.record(old.output, new.output)
            return new
        new = self._copy_attributes(old)
        if isinstance(old, keras.Model) and internals.compile_arguments(old):
            self._compile(old, new)
        return new

    def call_copy(self, old: keras.Operation, args: Any, kwargs: Any) -> Any:
        """Calls the copy of an operation, or returns its input if the operation is removed."""
        new = self.copy(old)
        return keras.tree.flatten((args, kwargs))[0] if new is REMOVED else new(*args, **kwargs)

    def copy_optimizer(self, old: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
        """Returns the copy of a model's optimizer."""
        return self.copy(old)

    # --- Models.

    def _copy_graph(self, old: keras.Function) -> dict[str, Any]:
        """Returns the attributes of a copied model that describe its graph."""
        inputs, outputs = internals.graph_ends(old)
        inputs = keras.tree.map_structure(self.copy, inputs)
        for call in internals.graph_calls(old):
            # Models with common layers may also share calls.
            if not call.is_input and id(call) not in self._copied_calls:
                self._copied_calls.add(id(call))
                self._copy_call(call)
        outputs = keras.tree.map_structure(self.copy, outputs)
        return internals.graph_attributes(keras.Function(inputs, outputs))

    def _copy_call(self, call: internals.Call) -> None:
        args, kwargs = (
            keras.tree.map_structure(self.copy, arguments)
            for arguments in (call.arguments.args, call.arguments.kwargs)
        )
        outputs = keras.tree.flatten(self.call_copy(call.operation, args, kwargs))
        for old, new in zip(call.outputs, outputs, strict=True):
            self.record(old, new)

    def _copy_symbolic_tensor(self, old: keras.KerasTensor) -> keras.KerasTensor:
        operation = internals.producer(old)
        if isinstance(operation, keras.layers.InputLayer):
            self.copy(operation)
            return self._copies[id(old)]
        # The input of a keras.Function, or a tensor of a graph outside the model.
        return self.record(old, keras.KerasTensor(old.shape, old.dtype, name=old.name))

    def _compile(self, old: keras.Model, new: keras.Model) -> None:
        arguments = {
            name: self.copy(value)
            for name, value in internals.compile_arguments(old).items()
            if name != "optimizer"
        }
        for metric in keras.tree.flatten([arguments["metrics"], arguments["weighted_metrics"]]):
            if isinstance(metric, keras.Metric):
                # Before the first batch, Keras does not reset the metrics.
                metric.reset_state()
        # The optimizer is wrapped already if it scales the loss.
        optimizer = None if old.optimizer is None else self.copy_optimizer(old.optimizer)
        # Keras' method, because the attributes that an override sets are copied already.
        keras.Model.compile(new, optimizer, **arguments, auto_scale_loss=False)

    # --- Other objects.

    def _copy_attributes(self, old: Any) -> Any:
        new = self.record(old, object.__new__(type(old)))
        if isinstance(old, keras.Function):
            vars(new).update(self._copy_graph(old))
        for name, value in internals.attributes_to_copy(old).items():
            try:
                value = self.copy(value)
            except Exception as error:
                if isinstance(error, UsageError) or not isinstance(old, keras.Operation):
                    raise
                raise UsageError(
                    f"attribute {name!r} of {describe_layer(old)} cannot be copied"
                    f" ({first_line(error)}): remove it, or define __deepcopy__ in its class"
                ) from error
            vars(new)[name] = None if value is REMOVED else value
        internals.refresh_identities(new)
        return new

    def _copy_container(self, old: Any) -> Any:
        if isinstance(old, tuple):
            values = self._copy_items(old)
            if len(values) < len(old):
                return REMOVED
            # Not type(old), which is a wrapper if a layer contains a named tuple.
            kind = old.__class__
            return kind(*values) if hasattr(kind, "_fields") else kind(values)
        if isinstance(old, frozenset):
            return type(old)(self._copy_items(old))
        # Recorded before it is filled, because it may contain itself.
        new = self.record(old, internals.empty_like(old))
        if isinstance(old, list):
            new.extend(self._copy_items(old))
        elif isinstance(old, set):
            new.update(self._copy_items(old))
        else:
            items = [self.copy(item) for item in old.items()]
            new.update(dict(item for item in items if item is not REMOVED))
        if hasattr(old, "tracker"):
            new.tracker = self.copy(old.tracker)
        return new

    def _copy_items(self, values: Iterable[Any]) -> list[Any]:
        return [new for new in map(self.copy, values) if new is not REMOVED]

    def _copy_function(self, old: Any) -> Any:
        """Returns a function with copies of the layers and variables that it captures."""
        if isinstance(old, types.MethodType):
            if not self._has_state(old.__self__):
                return old
            return types.MethodType(old.__func__, self._copy_captured(old.__self__))
        if isinstance(old, functools.partial):
            parts = (old.func, old.args, old.keywords)
            if not self._has_state(parts):
                return old
            function, args, keywords = self._copy_captured(parts)
            return type(old)(function, *args, **keywords)
        self.record(old, old)  # The function may capture itself.
        cells, defaults = old.__closure__ or (), (old.__defaults__, old.__kwdefaults__)
        own_globals = {
            name: value for name, value in _globals_used(old).items() if self._is_own(value)
        }
        captured = [*map(_cell_contents, cells), *defaults]
        if not own_globals and not any(map(self._has_state, captured)):
            return old
        new_cells = (
            types.CellType(self._copy_captured(_cell_contents(cell)))
            if self._has_state(_cell_contents(cell))
            else cell
            for cell in cells
        )
        copied = {name: self._copy_captured(value) for name, value in own_globals.items()}
        # Later changes of other global variables are not seen by the copy.
        new_globals = old.__globals__ | copied if copied else old.__globals__
        new = types.FunctionType(old.__code__, new_globals, closure=tuple(new_cells))
        self.record(old, new)
        functools.update_wrapper(new, old, updated=())
        del vars(new)["__wrapped__"]
        new.__defaults__, new.__kwdefaults__ = map(self._copy_captured, defaults)
        vars(new).update({name: self.copy(value) for name, value in vars(old).items()})
        return new

    def _is_own(self, value: Any) -> bool:
        """Returns whether a value is part of the model, or a function that uses a part of it."""
        if isinstance(value, types.FunctionType):
            return self.copy(value) is not value
        return id(value) in self._own

    def _copy_captured(self, value: Any) -> Any:
        new = self.copy(value)
        if new is REMOVED:
            raise TypeError("it is a function that uses a removed layer")
        return new

    def _has_state(self, value: Any) -> bool:
        """Returns whether something that a function captures has to be copied."""
        if isinstance(value, _CONTAINERS):
            values = value.values() if isinstance(value, dict) else value
            return any(map(self._has_state, values))
        if isinstance(value, _FUNCTIONS) or id(value) in self._copies:
            return self.copy(value) is not value
        return isinstance(value, _WITH_STATE)


def find_state(values: Iterable[Any]) -> list[Any]:
    """Returns the layers, variables and metrics that objects refer to, wherever ModelCopier copies.

    It searches containers, attributes, weak references, and functions with what they capture, but
    not the layers, variables and metrics that it finds.
    """
    found, queue = [], list(values)
    # By id. The objects are kept alive, so that no other object gets the same id.
    seen: dict[int, Any] = {}
    while queue:
        value = queue.pop()
        if isinstance(value, _IMMUTABLE) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, _WITH_STATE):
            found.append(value)
        else:
            queue += _parts(value)
    return found


def _parts(value: Any) -> list[Any]:
    """Returns the objects that an object other than a layer or variable refers to."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, _CONTAINERS):
        return list(value)
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.FunctionType):
        captured = map(_cell_contents, value.__closure__ or ())
        used = _globals_used(value).values()
        return [*captured, *used, value.__defaults__, value.__kwdefaults__]
    if isinstance(value, tf.types.experimental.PolymorphicFunction):
        return [value.python_function]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, keras.KerasTensor) or internals.is_of_tensorflow(value):
        return []
    if _consists_of_attributes(value):
        return list(internals.attributes_to_copy(value).values())
    return []


def describe_layer(operation: keras.Operation) -> str:
    """Returns the class and name of a layer, such as "Dense 'dense'"."""
    return f"{type(operation).__name__} {operation.name!r}"


def _globals_used(function: types.FunctionType) -> dict[str, Any]:
    """Returns the global variables of a function that may be, or lead to, parts of a model.

    These are layers, variables and functions of the same module, by name.
    """
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    namespace = function.__globals__
    return {
        name: value
        for name in sorted(names & namespace.keys())
        if isinstance(value := namespace[name], _WITH_STATE)
        or (isinstance(value, types.FunctionType) and value.__globals__ is namespace)
    }


def _cell_contents(cell: types.CellType) -> Any:
    """Returns what a cell of a closure contains, or None for a cell that is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _consists_of_attributes(value: Any) -> bool:
    """Returns whether an object has attributes, and no rules of its own for copying them."""
    kind: Any = type(value)
    if isinstance(value, keras.Variable):
        return True
    # Keras' classes define __reduce__, which saves a model.
    has_own_rules = (
        hasattr(kind, "__deepcopy__")
        or kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__reduce__ not in (object.__reduce__, keras.Operation.__reduce__)
        or kind.__getstate__ is not object.__getstate__
    )
    has_slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    return bool(kind.__dictoffset__) and not has_slots and not has_own_rules
