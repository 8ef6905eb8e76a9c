"""The Keras layer: variables, moving statistics, modes; it brings the replicas together for ops."""

import functools
import weakref
from collections.abc import Sequence

import keras
import tensorflow as tf

from bn_keras import ops


@keras.saving.register_keras_serializable("bn_keras")
class BatchNormalization(keras.layers.Layer):
    """Batch normalization: keras.layers.BatchNormalization, complete, exact and fast.

    Decisions:
      - Training normalizes by the biased batch variance (Algorithm 1). Bessel's correction enters
        only in the moving variance, and only with unbiased=True.
      - Statistics and parameters are float32 at least, whatever the dtype of the activations.
      - A batch of which nothing counts (empty, or all masked) leaves the moving statistics alone.
      - Frozen (trainable=False) is inference.

    Args:
      axis: the axis, or list of axes, with statistics and parameters of their own; the others are
        reduced over. [1, 2, 3] of images is the per-activation transform.
      momentum: fraction of the moving statistics that is kept at each step, in [0, 1]; None
        averages over all batches so far with equal weight.
      epsilon: added to the variance under the root, > 0.
      center, scale: whether there is a beta, a gamma.
      beta_initializer, gamma_initializer, moving_mean_initializer,
      moving_variance_initializer, beta_regularizer, gamma_regularizer, beta_constraint,
      gamma_constraint: as everywhere in Keras.
      renorm: batch renormalization (Ioffe 2017).
      renorm_clipping: "rmin", "rmax", "dmax"; what is missing does not clip.
      renorm_momentum: as momentum, for the statistics that renorm corrects towards.
      synchronized: statistics of the batches of all replicas together, in one collective forward
        and one backward.
      unbiased: the moving variance takes the unbiased estimate, m / (m - 1) times the batch's
        (Algorithm 2); False takes the biased one, as Keras does.
      sync_group_size: with synchronized, how many consecutive replicas share their statistics;
        None is all of them.
      virtual_batch_size: statistics of ghost batches of so many consecutive examples; None is of
        the whole batch. Without effect at inference.
      **kwargs: name, dtype, trainable.

    Raises:
      UsageError: a value that can't be meant.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: object = "zeros",
        gamma_initializer: object = "ones",
        moving_mean_initializer: object = "zeros",
        moving_variance_initializer: object = "ones",
        beta_regularizer: object = None,
        gamma_regularizer: object = None,
        beta_constraint: object = None,
        gamma_constraint: object = None,
        renorm: bool = False,
        renorm_clipping: dict | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        unbiased: bool = True,
        sync_group_size: int | None = None,
        virtual_batch_size: int | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.axis = int(axis) if not isinstance(axis, list | tuple) else [int(a) for a in axis]
        self.momentum = momentum if momentum is None else float(momentum)
        self.epsilon = float(epsilon)
        self.center = center
        self.scale = scale
        self.beta_initializer = keras.initializers.get(beta_initializer)
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.moving_mean_initializer = keras.initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = keras.initializers.get(moving_variance_initializer)
        self.beta_regularizer = keras.regularizers.get(beta_regularizer)
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.beta_constraint = keras.constraints.get(beta_constraint)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self.renorm = renorm
        self.renorm_clipping = (renorm_clipping or {}) if renorm else renorm_clipping
        self.renorm_momentum = renorm_momentum
        self.synchronized = synchronized
        self.unbiased = unbiased
        self.sync_group_size = sync_group_size
        self.virtual_batch_size = virtual_batch_size
        self.supports_masking = True

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Makes the weights, in Keras' order."""
        shape = (input_shape[self.axis],)
        self.gamma = self.beta = None
        if self.scale:
            self.gamma = self.add_weight(
                shape=shape,
                name="gamma",
                initializer=self.gamma_initializer,
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
                autocast=False,
            )
        if self.center:
            self.beta = self.add_weight(
                shape=shape,
                name="beta",
                initializer=self.beta_initializer,
                regularizer=self.beta_regularizer,
                constraint=self.beta_constraint,
                autocast=False,
            )
        self.moving_mean = self.add_weight(
            shape=shape,
            name="moving_mean",
            initializer=self.moving_mean_initializer,
            trainable=False,
            autocast=False,
        )
        self.moving_variance = self.add_weight(
            shape=shape,
            name="moving_variance",
            initializer=self.moving_variance_initializer,
            trainable=False,
            autocast=False,
        )

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Normalizes by the batch's statistics in training, by the moving ones otherwise."""
        parameters = [p if p is None else tf.convert_to_tensor(p) for p in (self.gamma, self.beta)]
        if not (training and self.trainable):
            mean = tf.convert_to_tensor(self.moving_mean)
            variance = tf.convert_to_tensor(self.moving_variance)
            return ops.normalize(inputs, mean, variance, *parameters, self.epsilon)
        gather = self._gather if self._num_replicas() > 1 and self.synchronized else None
        outputs, moments = ops.batch_normalize(inputs, *parameters, self.epsilon, gather=gather)
        self._update(moments)
        return outputs

    def _update(self, moments: ops.Moments) -> None:
        count, mean, variance = moments
        if self.unbiased:
            variance = variance * count / tf.maximum(count - 1, 1)
        for moving, batch in ((self.moving_mean, mean[0]), (self.moving_variance, variance[0])):
            old = tf.convert_to_tensor(moving)
            new = old * self.momentum + batch * (1 - self.momentum)
            moving.assign(tf.where(count[0] > 0, new, old))

    def _num_replicas(self) -> int:
        context = tf.distribute.get_replica_context()
        return context.num_replicas_in_sync if context else 1

    def _gather(self, packed: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        own = tf.equal(tf.range(replicas), context.replica_id_in_sync_group)
        rows = tf.where(own[:, None], packed[None], tf.zeros([], packed.dtype))
        return context.all_reduce(tf.distribute.ReduceOp.SUM, rows)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict:
        """The arguments."""
        return {
            **super().get_config(),
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "beta_initializer": keras.initializers.serialize(self.beta_initializer),
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "moving_mean_initializer": keras.initializers.serialize(self.moving_mean_initializer),
            "moving_variance_initializer": keras.initializers.serialize(
                self.moving_variance_initializer
            ),
            "beta_regularizer": keras.regularizers.serialize(self.beta_regularizer),
            "gamma_regularizer": keras.regularizers.serialize(self.gamma_regularizer),
            "beta_constraint": keras.constraints.serialize(self.beta_constraint),
            "gamma_constraint": keras.constraints.serialize(self.gamma_constraint),
            "renorm": self.renorm,
            "renorm_clipping": self.renorm_clipping,
            "renorm_momentum": self.renorm_momentum,
            "synchronized": self.synchronized,
            "unbiased": self.unbiased,
            "sync_group_size": self.sync_group_size,
            "virtual_batch_size": self.virtual_batch_size,
        }


def merge_moving_statistics(
    model: keras.Model, strategy: tf.distribute.Strategy | None = None
) -> None:
    """Gives all replicas the same moving statistics: the mixture's mean and variance.

    Call it from Python, outside strategy.run, before each save and each evaluation. Layers that
    aren't synchronized keep the statistics of their own replica's batches, and only the first
    replica's would be saved. One collective for the whole model; nothing at one replica.

    Args:
      model: with BatchNormalization layers anywhere inside.
      strategy: under which the model was made; None is the current one.

    Source: the law of total variance.
    """
    strategy = strategy or tf.distribute.get_strategy()
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, BatchNormalization) and not layer.synchronized
    ]
    if strategy.num_replicas_in_sync == 1 or not layers:
        return
    merges = _merges.setdefault(model, {})
    if strategy not in merges:
        variables = [(layer.moving_mean, layer.moving_variance) for layer in layers]
        merges[strategy] = tf.function(
            lambda: strategy.run(functools.partial(_merge_in_replica, variables))
        )
    merges[strategy]()


# One traced merge for each model and strategy; gone with the model.
_merges: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _merge_in_replica(variables: Sequence[tuple[keras.Variable, keras.Variable]]) -> None:
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync
    flat = [tf.cast(v, tf.float64) for pair in zip(*variables, strict=True) for v in pair]
    packed = tf.concat(flat, axis=0)
    own = tf.equal(tf.range(replicas), context.replica_id_in_sync_group)
    rows = tf.where(own[:, None], packed[None], tf.zeros([], packed.dtype))
    rows = context.all_reduce(tf.distribute.ReduceOp.SUM, rows)
    means, stds = tf.split(rows, 2, axis=1)
    # Differences from the first replica's, so that merging what agrees changes no bit of it.
    mean = means[0] + tf.reduce_mean(means - means[0], axis=0)
    variance = stds[0] + tf.reduce_mean(stds - stds[0] + tf.square(means - mean), axis=0)
    sizes = [pair[0].shape[0] for pair in variables]
    for column, merged in enumerate((mean, variance)):
        for pair, value in zip(variables, tf.split(merged, sizes), strict=True):
            pair[column].assign(tf.cast(value, pair[column].dtype))
