"""Rows of the global batch for an input pipeline, and options for tf.data."""

import tensorflow as tf

# Number of chunks or batches to prefetch.
PREFETCH = 2


class Rows:
    """Rows of each global batch that one input pipeline reads.

    Attributes:
      global_batch_size: examples per step, over all replicas.
      num_replicas: replicas that this pipeline feeds.
      per_replica_batch_size: rows per replica.
      first, count: this pipeline reads rows [first, first + count).
    """

    def __init__(self, global_batch_size: int, context: tf.distribute.InputContext) -> None:
        self.global_batch_size = global_batch_size
        self.num_replicas = context.num_replicas_in_sync // context.num_input_pipelines
        self.count = global_batch_size // context.num_input_pipelines
        self.per_replica_batch_size = self.count // self.num_replicas
        self.first = context.input_pipeline_id * self.count


def without_autotuning(dataset: tf.data.Dataset, threads: int = 0) -> tf.data.Dataset:
    """Disables tf.data's autotuning and graph rewrites, which cost more here than they save.

    Args:
      dataset: any dataset.
      threads: size of a private thread pool; 0 uses the shared one.
    """
    options = tf.data.Options()
    options.deterministic = True
    if threads:
        options.threading.private_threadpool_size = threads
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    # With this rewrite, the iterator owns its functions. Without it, TensorFlow's multi-device
    # iterator crashes when it is deleted while it prefetches.
    options.experimental_optimization.noop_elimination = True
    return dataset.with_options(options)
