"""Shared by all batches: the rows of one input pipeline, and options for tf.data."""

import tensorflow as tf

# Chunks or batches prepared ahead.
PREFETCH = 2


class Rows:
    """Rows of each global batch that one input pipeline reads.

    Attributes:
      global_batch_size: examples per step, over all replicas.
      num_replicas: replicas that this pipeline feeds.
      per_replica_batch_size: rows per replica.
      first, count: the pipeline reads rows [first, first + count) of each global batch.
    """

    def __init__(self, global_batch_size: int, context: tf.distribute.InputContext) -> None:
        self.global_batch_size = global_batch_size
        self.num_replicas = context.num_replicas_in_sync // context.num_input_pipelines
        self.count = global_batch_size // context.num_input_pipelines
        self.per_replica_batch_size = self.count // self.num_replicas
        self.first = context.input_pipeline_id * self.count


def without_tuning(dataset: tf.data.Dataset, threads: int = 0) -> tf.data.Dataset:
    """Turns off tf.data's autotuning and graph rewrites, which cost more here than they save.

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
    # This rewrite gives the iterator functions of its own. Without it, TensorFlow's multi-device
    # iterator crashes when it is dropped while it reads ahead.
    options.experimental_optimization.noop_elimination = True
    return dataset.with_options(options)
