"""Lowers the functions of a run for TPU, on a machine without one."""

import collections
import contextlib
import re
from typing import NamedTuple

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

NUM_CORES = 8


class CoreContext:
    """Fakes the replica context of one of 8 cores.

    TPUStrategy's all_reduce is the same operation, and its graph does not know its replica either.
    """

    num_replicas_in_sync = NUM_CORES

    @property
    def replica_id_in_sync_group(self):
        return xla.replica_id()

    def all_reduce(self, reduce_op, value):
        assert reduce_op == tf.distribute.ReduceOp.SUM
        cores = [list(range(NUM_CORES))]
        return tf.nest.map_structure(
            lambda t: tf.raw_ops.CrossReplicaSum(input=t, group_assignment=cores), value
        )


class Recorder:
    """A strategy that records the functions to run instead of running them.

    Attributes:
      runs: (function, arguments) by function name.
    """

    def __init__(self, strategy):
        self._strategy = strategy
        self.runs = {}

    def run(self, function, args=()):
        self.runs[function.__name__] = function, args

    def __getattr__(self, name):
        return getattr(self._strategy, name)


class Lowered(NamedTuple):
    """A lowered function.

    Attributes:
      hlo: XLA's operations for TPU.
      assigned: variables that the function assigns.
    """

    hlo: str
    assigned: list[tf.Variable]


def lower(function, args=(), constants=()):
    """Lowers a function that may read and assign variables for TPU.

    Args:
      function, args, constants: see `without_variables`.
    """
    pure, inputs, assigned = without_variables(function, args, constants)
    compiled = tf.function(pure, jit_compile=True, autograph=False)
    get_ir = compiled.experimental_get_compiler_ir(*_specs(inputs))
    return Lowered(get_ir(stage="hlo", platform_name="TPU"), assigned)


def without_variables(function, args=(), constants=()):
    """Turns a function that reads and assigns variables into a function of their values.

    XLA accepts no variables here, because no device holds any. In the graph of the function each
    read of a variable is replaced by its current value: the last one assigned, or the initial one.
    Any other operation on a variable is an error.

    Args:
      function: function to pass to strategy.run.
      args: its arguments; only the shapes and dtypes of tensors matter.
      constants: Keras variables that the function only reads, possibly inside control flow.

    Returns:
      A function that returns the results and the new values of the assigned variables; its inputs,
      which are the tensors of args and the variables read; and the assigned variables.
    """
    flat = tf.nest.flatten(args)
    tensors = [a for a in flat if isinstance(a, tf.Tensor)]

    def call(*given):
        own, values = iter(given[: len(tensors)]), given[len(tensors) :]
        flat_args = [next(own) if isinstance(a, tf.Tensor) else a for a in flat]
        read = keras.StatelessScope(zip(constants, values, strict=True)) if constants else None
        with read or contextlib.nullcontext():
            return function(*tf.nest.pack_sequence_as(args, flat_args))

    given = [*tensors, *constants]
    # Traced as for XLA, as TPUStrategy traces it.
    traced = tf.function(call, autograph=False, jit_compile=True)
    graph = traced.get_concrete_function(*_specs(given)).graph
    variables = _by_handle(graph)
    graph_def, last = _replace_variables(graph, variables)
    names = [t.op.name for t in graph.inputs if t.dtype != tf.resource]
    inputs = dict(zip(names, given, strict=True))
    read = {name.split(":")[0] for node in graph_def.node for name in node.input}
    inputs |= {name: v for name, v in variables.items() if name in read}
    outputs = [t.name for t in graph.outputs] + list(last.values())

    def pure(*values):
        return tf.import_graph_def(graph_def, dict(zip(inputs, values, strict=True)), outputs)

    return pure, list(inputs.values()), [variables[name] for name in last]


def _specs(values):
    return [tf.TensorSpec(v.shape, v.dtype) for v in values]


def _by_handle(graph):
    """Returns the variables by the names of their handles in the graph."""
    variables = {id(v.handle): v for v in graph.variables}
    return {
        inner.op.name: variables[id(outer)]
        for outer, inner in graph.captures
        if inner.dtype == tf.resource
    }


def _replace_variables(graph, variables):
    """Returns the graph without variables, and the last value of each assigned variable."""
    now, last = {name: name for name in variables}, {}
    graph_def = graph.as_graph_def()
    # The nodes are in the order of their creation, which is the order of the program.
    for node in graph_def.node:
        inputs = [name for name in node.input if not name.startswith("^")]
        handle, *rest = inputs or [""]
        if handle not in variables:
            node.input[:] = inputs
        elif node.op == "ReadVariableOp":
            _rewrite(node, "Identity", [now[handle]])
        elif node.op == "AssignVariableOp":
            _rewrite(node, "Identity", rest)
            now[handle] = last[handle] = f"{node.name}:0"
        elif node.op in ("AssignAddVariableOp", "AssignSubVariableOp"):
            _rewrite(node, {"A": "AddV2", "S": "Sub"}[node.op[6]], [now[handle], *rest])
            now[handle] = last[handle] = f"{node.name}:0"
        else:
            raise NotImplementedError(f"{node.op} of {variables[handle].name}")
    nodes = [node for node in graph_def.node if node.op != "Placeholder"]
    del graph_def.node[:]
    graph_def.node.extend(nodes)
    return graph_def, last


def _rewrite(node, op, inputs):
    dtype = node.attr["dtype"].type
    node.op, node.input[:] = op, inputs
    node.attr.clear()
    node.attr["T"].type = dtype


def check_runs_on_a_core(hlo):
    """Checks that every size is static and that nothing waits for the host."""
    # A size known only at run time has a bound, as in f32[<=8,10].
    assert re.findall(r"\[[^]\n]*<=[^]\n]*\]", hlo) == []
    assert {"infeed", "outfeed", "recv", "send"} & set(opcodes(hlo)) == set()
    # The TPU's compiler provides this operation.
    assert set(re.findall(r'custom_call_target="(\w+)"', hlo)) <= {"ResizeBilinear"}


def opcodes(hlo):
    """Counts the operations of each kind in HLO."""
    instruction = r"^\s+(?:ROOT )?\S+ = (?:\(.*?\)|\S+) ([a-z][a-z-]*)\("
    return collections.Counter(re.findall(instruction, hlo, flags=re.MULTILINE))
