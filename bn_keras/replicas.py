"""Communication between replicas: an ordered gather, and sums kept per replica."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from bn_keras.errors import UsageError


def num_replicas() -> int:
    """Returns the number of replicas that run this code: 1 outside strategy.run."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def gather_replicas(packed: tf.Tensor, group_size: int | None = None) -> tf.Tensor:
    """Gathers a tensor from all replicas of this replica's group, with one all-reduce.

    Each replica fills its own row and leaves the others 0, so the sum is exact and the same on
    every replica.

    Args:
      packed: [...], the same shape on each replica.
      group_size: number of consecutive replicas in a group; None means all replicas.

    Returns:
      [R, ...] for the R replicas of the group.

    Raises:
      UsageError: group_size does not divide the number of replicas.
    """
    context = tf.distribute.get_replica_context()
    replicas, replica = context.num_replicas_in_sync, context.replica_id_in_sync_group
    group_size = group_size or replicas
    if replicas % group_size:
        raise UsageError(
            f"sync_group_size={group_size} does not divide the {replicas} replicas: expected a"
            " divisor, or None for all replicas"
        )
    static_replica = tf.get_static_value(replica)
    rows = np.arange(replicas).reshape([-1] + [1] * packed.shape.rank)
    own_row = rows == (replica if static_replica is None else static_replica)
    gathered = tf.where(own_row, packed, tf.zeros([], packed.dtype))
    gathered = _run_in_order(
        lambda t: context.all_reduce(tf.distribute.ReduceOp.SUM, t), gathered, replica
    )
    if group_size == replicas:
        return gathered
    first = replica // group_size * group_size
    # The replica's id is not static on a TPU, but the shape that tf.gather returns is.
    return tf.gather(gathered, first + tf.range(group_size))


def _run_in_order(
    collective: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor, replica: int | tf.Tensor
) -> tf.Tensor:
    """Runs a collective after all earlier ones of this graph.

    Otherwise workers could start the collectives of parallel branches in different orders, and wait
    for each other forever (tensorflow#42111).
    """
    if tf.executing_eagerly():
        return collective(x)

    def collection(name: str, replica: int | None) -> list[tf.Tensor]:
        # The graph of a function inherits the collections of the graph around it.
        tensors = x.graph.get_collection(f"bn_keras/{name}/{replica}")
        return [t for t in tensors if t.graph is x.graph]

    replica = tf.get_static_value(replica)
    earlier = collection("results", replica)
    # Replica 0 is traced first. Compare with its collective at the same position.
    for first in collection("inputs", 0)[len(earlier) :][:1]:
        if first.shape[1] != x.shape[1]:
            raise UsageError(
                f"replicas 0 and {replica} have {first.shape[1]} and {x.shape[1]} ghost batches,"
                " but synchronized=True requires equal numbers: pass the same number of examples"
                " to all replicas (drop_remainder=True)"
            )
    x.graph.add_to_collection(f"bn_keras/inputs/{replica}", x)
    with tf.control_dependencies(earlier[-1:]):
        x = tf.identity(x)
    result = collective(x)
    result.graph.add_to_collection(f"bn_keras/results/{replica}", result)
    return result


def per_replica_sum(shape: Sequence[int] = (), dtype: tf.DType = tf.float32) -> tf.Variable:
    """Returns a variable, initially 0, of which each replica has its own copy to add to.

    Reading it sums over the replicas; adding needs no communication. Create it in the strategy's
    scope.
    """
    # A layer without an input shape creates its variables when it is first called, in a graph.
    with tf.init_scope():
        return tf.Variable(
            lambda: tf.zeros(shape, dtype),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )
