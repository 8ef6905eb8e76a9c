"""What replicas exchange: one ordered gather, and sums that each replica keeps by itself."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from bn_keras.errors import UsageError


def gather_replicas(packed: tf.Tensor, group_size: int | None = None) -> tf.Tensor:
    """Gives the [...] of each replica of this one's group as [R, ...], by one all-reduce.

    Each replica fills a row of its own and leaves the others 0; the sum is then exact, and the
    same everywhere.
    """
    context = tf.distribute.get_replica_context()
    replicas, replica = context.num_replicas_in_sync, context.replica_id_in_sync_group
    group_size = group_size or replicas
    if replicas % group_size:
        raise UsageError(
            f"sync_group_size={group_size} does not divide the {replicas} replicas: give a"
            " divisor, or None for all of them"
        )
    known = tf.get_static_value(replica)
    rank = np.arange(replicas).reshape([-1] + [1] * packed.shape.rank)
    rows = tf.where(
        rank == (replica if known is None else known), packed, tf.zeros([], packed.dtype)
    )
    rows = _in_order(
        lambda rows: context.all_reduce(tf.distribute.ReduceOp.SUM, rows), rows, replica
    )
    if group_size == replicas:
        return rows
    first = replica // group_size * group_size
    # Of a size that is known where the replica isn't, as on a TPU.
    return tf.gather(rows, first + tf.range(group_size))


def _in_order(
    collective: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor, replica: int | tf.Tensor
) -> tf.Tensor:
    """Runs a collective after those before it in this graph.

    Parallel branches would otherwise start theirs in whatever order, another one in each worker,
    and could wait for each other forever (tensorflow#42111).
    """
    if tf.executing_eagerly():
        return collective(x)

    def collection(what: str, replica: int | None) -> list[tf.Tensor]:
        # A function's graph inherits the collections of the one around it.
        ours = x.graph.get_collection(f"bn_keras/{what}/{replica}")
        return [t for t in ours if t.graph is x.graph]

    replica = tf.get_static_value(replica)
    before = collection("results", replica)
    # The same collective of the first replica, whose graph is built first.
    for first in collection("inputs", 0)[len(before) :][:1]:
        if first.shape[1] != x.shape[1]:
            raise UsageError(
                f"replicas 0 and {replica} have {first.shape[1]} and {x.shape[1]} ghost batches, of"
                " which synchronized=True joins one of each: give all replicas equally many"
                " examples (drop_remainder=True)"
            )
    x.graph.add_to_collection(f"bn_keras/inputs/{replica}", x)
    with tf.control_dependencies(before[-1:]):
        x = tf.identity(x)
    result = collective(x)
    result.graph.add_to_collection(f"bn_keras/results/{replica}", result)
    return result


def per_replica_sum(shape: Sequence[int] = (), dtype: tf.DType = tf.float32) -> tf.Variable:
    """Returns a variable of zeros to which each replica adds by itself; reading sums over them.

    Adding costs no communication. Make it in the strategy's scope.
    """
    return tf.Variable(
        tf.zeros(shape, dtype),
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )
