"""Lowers for a TPU what a run hands to its cores, on a machine that has none."""

import collections
import contextlib
import re
from typing import NamedTuple

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

NUM_CORES = 8


class CoreContext:
    """Stands in for the replica context of one of 8 cores.

    TPUStrategy's all_reduce is this same operation, and there too the graph doesn't know which
    replica it will be.
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
    """A strategy that only notes what it is to run.

    Attributes:
      runs: (function, arguments) by the function's name.
    """

    def __init__(self, strategy):
        self._strategy = strategy
        self.runs = {}

    def run(self, function, args=()):
        self.runs[function.__name__] = function, args

    def __getattr__(self, name):
        return getattr(self._strategy, name)


class Lowered(NamedTuple):
    """What came of a function.

    Attributes:
      hlo: XLA's operations for TPU.
      assigned: the variables that it assigns.
    """

    hlo: str
    assigned: list[tf.Variable]


def lower(function, args=(), constants=()):
    """Lowers a function for TPU, with what it does to variables.

    Args:
      function, args, constants: as `without_variables`.
    """
    pure, inputs, assigned = without_variables(function, args, constants)
    compiled = tf.function(pure, jit_compile=True, autograph=False)
    give_ir = compiled.experimental_get_compiler_ir(*_specs(inputs))
    return Lowered(give_ir(stage="hlo", platform_name="TPU"), assigned)


def without_variables(function, args=(), constants=()):
    """Makes a function of values out of one that reads and assigns variables.

    XLA takes no variables here, where no device holds any. In the function's own graph each reading
    of one gives way to what it would read: the value that was assigned last, or that of before.
    Anything else that is done to a variable is an error.

    Args:
      function: as strategy.run would get it.
      args: of it; only the shapes and dtypes of tensors matter.
      constants: Keras variables that it merely reads, within control flow too.

    Returns:
      A function that gives the results and the new values of what was assigned; what it takes:
      the tensors of args, and the variables that are read; and the variables that are assigned.
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
    graph = tf.function(call, autograph=False).get_concrete_function(*_specs(given)).graph
    variables = _by_handle(graph)
    graph_def, last = _of_values(graph, variables)
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
    """Gives the variables by the names that their handles have in the graph."""
    variables = {id(v.handle): v for v in graph.variables}
    return {
        inner.op.name: variables[id(outer)]
        for outer, inner in graph.captures
        if inner.dtype == tf.resource
    }


def _of_values(graph, variables):
    """Gives the graph of values, and the last ones of what was assigned."""
    now, last = {name: name for name in variables}, {}
    graph_def = graph.as_graph_def()
    # In the order in which the operations were made, which is the program's.
    for node in graph_def.node:
        inputs = [name for name in node.input if not name.startswith("^")]
        handle, *rest = inputs or [""]
        if handle not in variables:
            node.input[:] = inputs
        elif node.op == "ReadVariableOp":
            _become(node, "Identity", [now[handle]])
        elif node.op == "AssignVariableOp":
            _become(node, "Identity", rest)
            now[handle] = last[handle] = f"{node.name}:0"
        elif node.op in ("AssignAddVariableOp", "AssignSubVariableOp"):
            _become(node, {"A": "AddV2", "S": "Sub"}[node.op[6]], [now[handle], *rest])
            now[handle] = last[handle] = f"{node.name}:0"
        else:
            raise NotImplementedError(f"{node.op} of {variables[handle].name}")
    nodes = [node for node in graph_def.node if node.op != "Placeholder"]
    del graph_def.node[:]
    graph_def.node.extend(nodes)
    return graph_def, last


def _become(node, op, inputs):
    dtype = node.attr["dtype"].type
    node.op, node.input[:] = op, inputs
    node.attr.clear()
    node.attr["T"].type = dtype


def check_runs_on_a_core(hlo):
    """Finds sizes that are only known at run time, and whatever waits for the host."""
    # A bound in the place of a size, as in f32[<=8,10].
    assert re.findall(r"\[[^]\n]*<=[^]\n]*\]", hlo) == []
    assert {"infeed", "outfeed", "recv", "send"} & set(opcodes(hlo)) == set()
    # What the TPU's compiler has ready-made.
    assert set(re.findall(r'custom_call_target="(\w+)"', hlo)) <= {"ResizeBilinear"}


def opcodes(hlo):
    """Counts each of XLA's operations."""
    instruction = r"^\s+(?:ROOT )?\S+ = (?:\(.*?\)|\S+) ([a-z][a-z-]*)\("
    return collections.Counter(re.findall(instruction, hlo, flags=re.MULTILINE))
