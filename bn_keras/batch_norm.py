"""The Keras layer: variables, moving statistics, modes; it brings the replicas together for ops."""

from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from bn_keras import ops
from bn_keras.errors import UsageError
from bn_keras.replicas import gather_replicas, per_replica_sum


@keras.saving.register_keras_serializable("bn_keras")
class BatchNormalization(keras.layers.Layer):
    """Batch normalization: keras.layers.BatchNormalization, complete, exact and fast.

    Decisions:
      - Training normalizes by the biased batch variance (Algorithm 1). Bessel's correction enters
        only in the moving variance, and only with unbiased=True.
      - Statistics and parameters are float32 at least, whatever the dtype of the activations.
      - A batch of which nothing counts (empty, or all masked) leaves the moving statistics alone.
      - Frozen (trainable=False) is inference.
      - `training` may be a tensor; both modes are then computed and one is chosen.
      - A mask says which values make up the statistics; all values are normalized. It has the
        input's shape without `axis`; or, where only that fits, without the last axis, which is
        how keras.layers.Masking makes it.
      - Of several ghost batches in one step, the moving statistics take the count-weighted mean.
      - Replicas that aren't synchronized keep moving statistics of their own between two calls
        of merge_moving_statistics (MergeMovingStatistics in `fit`).

    Args:
      axis: the axis, or list of axes, with statistics and parameters of their own; the others are
        reduced over. [1, 2, 3] of images is the per-activation transform.
      momentum: fraction of the moving statistics that is kept at each step, in [0, 1]; None
        averages over all batches so far with equal weight, which takes one more weight, the last:
        how many there were.
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
        the whole batch. Without effect at inference. With synchronized, the replicas' first ghost
        batches make up one, and so on; all replicas then need equally many.
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
        self.axis = [int(a) for a in axis] if isinstance(axis, list | tuple) else int(axis)
        self.momentum = None if momentum is None else float(momentum)
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
        self._merge_weight = None
        self._check_arguments()

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Makes the weights, in Keras' order, each of the shape of `axis`."""
        self._axes = normalized_axes(self.axis, input_shape)
        self._shape = tuple(input_shape[a] for a in self._axes)
        if None in self._shape:
            raise UsageError(
                f"axis={self.axis} of the input {tuple(input_shape)} has no known size:"
                " give keras.Input one"
            )
        if self.virtual_batch_size is not None and 0 in self._axes:
            raise UsageError(
                f"axis={self.axis} includes the batch, which virtual_batch_size splits:"
                " give one of them"
            )
        self.gamma = self.beta = None
        if self.scale:
            self.gamma = self._add_weight(
                "gamma", self.gamma_initializer, self.gamma_regularizer, self.gamma_constraint
            )
        if self.center:
            self.beta = self._add_weight(
                "beta", self.beta_initializer, self.beta_regularizer, self.beta_constraint
            )
        self.moving_mean = self._add_statistic("moving_mean", self.moving_mean_initializer)
        self.moving_variance = self._add_statistic(
            "moving_variance", self.moving_variance_initializer
        )
        if self.renorm:
            self.moving_stddev = self._add_statistic("moving_stddev", self._initial_stddev)
            self.renorm_mean = self._add_statistic("renorm_mean", self.moving_mean_initializer)
            self.renorm_stddev = self._add_statistic("renorm_stddev", self._initial_stddev)
        if self.momentum is None:
            self.num_updates = self.add_weight(
                shape=(), name="num_updates", initializer="zeros", dtype="int64", trainable=False
            )
        if self._may_diverge():
            # How many values went into the moving statistics since the last merge. No weight of
            # the layer, and tracked by nobody: every save comes right after a merge.
            object.__setattr__(self, "_merge_weight", per_replica_sum())
        self.input_spec = keras.InputSpec(
            ndim=len(input_shape), axes=dict(zip(self._axes, self._shape, strict=True))
        )

    def call(
        self,
        inputs: tf.Tensor,
        training: bool | tf.Tensor | None = None,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Normalizes by the batch's statistics in training, by the moving ones otherwise.

        Args:
          inputs: of any rank from 2 on.
          training: a bool, a boolean scalar tensor, or None, which is False.
          mask: nonzero where a value counts in the statistics.
        """
        mask = self._full_mask(mask, inputs)
        x = ops.channels_last(inputs, self._axes)
        if isinstance(training, tf.Tensor | tf.Variable) and self.trainable:
            training = tf.cast(training, tf.bool)
            # Both, and one of them chosen: in a branch of tf.cond no collective can run.
            y = tf.where(training, self._train(x, mask, training), self._infer(x))
        else:
            y = self._train(x, mask) if self.trainable and training else self._infer(x)
        return tf.cast(ops.channels_back(y, inputs, self._axes), self.compute_dtype)

    def _infer(self, x: tf.Tensor) -> tf.Tensor:
        mean, variance = _flat(self.moving_mean), _flat(self.moving_variance)
        return ops.normalize(x, mean, variance, *self._parameters(), self.epsilon)

    def _train(
        self, x: tf.Tensor, mask: tf.Tensor | None, if_: bool | tf.Tensor = True
    ) -> tf.Tensor:
        """Normalizes, and updates the moving statistics if `if_`."""
        x, dtype = self._checked(x), x.dtype
        if self.renorm:
            # The correction goes on top of x_hat, which half precision would round once more.
            x = tf.cast(x, ops.statistics_dtype(x.dtype))
        y, moments = ops.batch_normalize(
            x,
            *((None, None) if self.renorm else self._parameters()),
            self.epsilon,
            mask=mask,
            group_size=self.virtual_batch_size,
            gather=self._gather if self._is_synchronized() else None,
        )
        if self.renorm:
            y = tf.cast(self._renormalize(y, moments), dtype)
        self.update_moving_statistics(moments, if_)
        return y

    def _renormalize(self, x_hat: tf.Tensor, moments: ops.Moments) -> tf.Tensor:
        """Corrects x_hat towards the renorm statistics.

        Source: Ioffe 2017 (arXiv 1702.03275), Algorithm 1.
        """
        floor = self.epsilon**0.5
        stddev = tf.maximum(tf.cast(_flat(self.renorm_stddev), x_hat.dtype), floor)
        r = tf.sqrt(moments.variance[0] + self.epsilon) / stddev
        d = (moments.mean[0] - tf.cast(_flat(self.renorm_mean), x_hat.dtype)) / stddev
        r, d = self._clipped(r, d)
        gamma, beta = (p if p is None else tf.cast(p, x_hat.dtype) for p in self._parameters())
        scale, offset = (r, d) if gamma is None else (r * gamma, d * gamma)
        return x_hat * scale + (offset if beta is None else offset + beta)

    def _clipped(self, r: tf.Tensor, d: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        clip = self.renorm_clipping
        if clip.get("rmin") is not None:
            r = tf.maximum(r, clip["rmin"])
        if clip.get("rmax") is not None:
            r = tf.minimum(r, clip["rmax"])
        if clip.get("dmax") is not None:
            d = tf.clip_by_value(d, -clip["dmax"], clip["dmax"])
        return r, d

    def update_moving_statistics(self, moments: ops.Moments, if_: bool | tf.Tensor = True) -> None:
        """Moves the moving statistics on, where the batch had anything to say.

        Each call in training mode comes by here once, in the replica's context. Whoever makes
        other use of batch statistics overrides it, or puts a function in its place on one layer
        for a while, as population.py does.

        Args:
          moments: of the G ghost batches of the call, synchronized as the layer is; variances
            are biased.
          if_: whether the call is in training mode, where `training` is a tensor.
        """
        count, mean, variance = moments
        known = tf.get_static_value(count)
        if known is None:
            total = tf.reduce_sum(count, axis=0)
            share, fewer = tf.math.divide_no_nan(count, total), tf.maximum(count - 1, 1)
        else:
            # Mostly the batch's size is known, and none of this has to be in the graph.
            count, total = known, known.sum(axis=0)
            share, fewer = count / np.maximum(total, 1), np.maximum(count - 1, 1)
        updates = tf.logical_and(total > 0, if_) if known is None or not total.all() else if_
        # Bessel's correction enters here; a single value is taken for two.
        correction = count / fewer if self.unbiased else 1.0
        new_mean = tf.reduce_sum(share * mean, axis=0)
        new_variance = tf.reduce_sum(share * correction * variance, axis=0)
        keep = self.momentum
        if keep is None:
            done = self.num_updates.value + tf.cast(tf.reduce_any(updates), tf.int64)
            self.num_updates.assign(done)
            keep = 1 - 1 / tf.cast(tf.maximum(done, 1), tf.float64)

        def move(moving: keras.Variable, new: tf.Tensor, keep: float | tf.Tensor) -> tf.Tensor:
            old = _flat(moving)
            kept, rate = keep, 1 - keep
            if isinstance(keep, tf.Tensor):
                kept, rate = tf.cast(kept, old.dtype), tf.cast(rate, old.dtype)
            moved = old * kept + tf.cast(new, old.dtype) * rate
            if updates is not True:
                moved = tf.where(updates, moved, old)
            moving.assign(self._shaped(moved))
            return moved

        move(self.moving_mean, new_mean, keep)
        if not self.renorm:
            move(self.moving_variance, new_variance, keep)
        else:
            # Keras' choice: the standard deviation moves, and the variance follows from it.
            stddev = move(self.moving_stddev, tf.sqrt(new_variance + self.epsilon), keep)
            self.moving_variance.assign(self._shaped(tf.nn.relu(tf.square(stddev) - self.epsilon)))
            move(self.renorm_mean, new_mean, self.renorm_momentum)
            biased = tf.reduce_sum(share * variance, axis=0)
            move(self.renorm_stddev, tf.sqrt(biased + self.epsilon), self.renorm_momentum)
        if self._merge_weight is not None:
            values = tf.cast(tf.reduce_mean(total), tf.float32)
            self._merge_weight.assign_add(tf.where(if_, values, 0.0))

    # --- Replicas.

    def _is_synchronized(self) -> bool:
        context = tf.distribute.get_replica_context()
        return self.synchronized and context is not None and context.num_replicas_in_sync > 1

    def _gather(self, packed: tf.Tensor) -> tf.Tensor:
        return gather_replicas(packed, self.sync_group_size)

    def _may_diverge(self) -> bool:
        """Tells whether the replicas' moving statistics may come to differ."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        alike = self.synchronized and self.sync_group_size in (None, replicas)
        return replicas > 1 and not alike

    def _mixed(self) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """The means and variances that a merge mixes, [C]."""
        pairs = [(_flat(self.moving_mean), _flat(self.moving_variance))]
        if self.renorm:
            pairs.append((_flat(self.renorm_mean), tf.square(_flat(self.renorm_stddev))))
        return pairs

    def _take_merged(
        self, mixed: Iterator[tuple[tf.Tensor, tf.Tensor]], num_updates: Iterator[tf.Tensor]
    ) -> None:
        """Takes its own from what the merge of all layers made of `_mixed` and `num_updates`."""

        def assign(variable: keras.Variable, value: tf.Tensor) -> None:
            variable.assign(tf.cast(tf.reshape(value, variable.shape), variable.dtype))

        mean, variance = next(mixed)
        assign(self.moving_mean, mean)
        assign(self.moving_variance, variance)
        if self.renorm:
            assign(self.moving_stddev, tf.sqrt(variance + self.epsilon))
            mean, variance = next(mixed)
            assign(self.renorm_mean, mean)
            assign(self.renorm_stddev, tf.sqrt(variance))
        if self.momentum is None:
            assign(self.num_updates, next(num_updates))
        self._merge_weight.assign(0.0)

    # --- Shapes and checks.

    def _parameters(self) -> tuple[tf.Tensor | None, tf.Tensor | None]:
        return tuple(None if p is None else _flat(p) for p in (self.gamma, self.beta))

    def _shaped(self, t: tf.Tensor) -> tf.Tensor:
        """Gives a [C] the shape of the weights."""
        return t if len(self._shape) == 1 else tf.reshape(t, self._shape)

    def _add_weight(
        self, name: str, initializer: object, regularizer: object, constraint: object
    ) -> keras.Variable:
        return self.add_weight(
            shape=self._shape,
            name=name,
            initializer=initializer,
            regularizer=regularizer,
            constraint=constraint,
            autocast=False,
        )

    def _add_statistic(self, name: str, initializer: object) -> keras.Variable:
        return self.add_weight(
            shape=self._shape, name=name, initializer=initializer, trainable=False, autocast=False
        )

    def _initial_stddev(self, shape: Sequence[int], dtype: str | None = None) -> tf.Tensor:
        # A clone: an initializer that is asked twice may refuse, or draw anew.
        initializer = self.moving_variance_initializer
        if isinstance(initializer, keras.initializers.Initializer):
            initializer = initializer.clone()
        return keras.ops.sqrt(initializer(shape, dtype=dtype))

    def _full_mask(self, mask: tf.Tensor | None, inputs: tf.Tensor) -> tf.Tensor | None:
        """Gives the mask with every axis of the input, channels last."""
        if mask is None:
            return None
        mask = tf.convert_to_tensor(mask)
        rank = inputs.shape.rank

        def fits(axes: Sequence[int]) -> bool:
            return mask.shape.rank == len(axes) and all(
                m in (1, None) or inputs.shape[a] in (m, None)
                for m, a in zip(mask.shape, axes, strict=True)
            )

        reduced = [a for a in range(rank) if a not in self._axes]
        if fits(reduced):
            for a in self._axes:
                mask = tf.expand_dims(mask, a)
        elif fits(range(rank - 1)):
            mask = tf.broadcast_to(mask[..., None], tf.shape(inputs))
        else:
            raise UsageError(
                f"{self.name}: a mask of shape {tuple(mask.shape)} does not fit an input of shape"
                f" {tuple(inputs.shape)} with axis={self.axis}: give it the input's shape without"
                " axis"
            )
        return ops.channels_last(mask, self._axes)

    def _checked(self, x: tf.Tensor) -> tf.Tensor:
        """Gives x, if the ghost batches divide it."""
        size = self.virtual_batch_size
        if size is None or x.shape[0] is not None and x.shape[0] % size == 0:
            return x
        message = (
            f"{self.name}: virtual_batch_size={size} does not divide the batch of this replica:"
            " give batches that are a multiple of it (drop_remainder=True), or another size"
        )
        if x.shape[0] is not None:
            raise UsageError(f"{message}; the batch is {x.shape[0]}")
        with tf.control_dependencies(
            [tf.debugging.assert_equal(tf.shape(x)[0] % size, 0, message)]
        ):
            return tf.identity(x)

    def _check_arguments(self) -> None:
        for name in ("momentum", "renorm_momentum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(
                    f"{name}={value}: it is the fraction that is kept, from 0 to 1"
                    " (PyTorch's momentum is 1 minus it)"
                )
        if not self.epsilon > 0:
            raise UsageError(f"epsilon={self.epsilon}: it has to be greater than 0")
        for name in ("virtual_batch_size", "sync_group_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise UsageError(
                    f"{name}={value!r}: it has to be a whole number from 1 on, or None"
                )
        if self.sync_group_size is not None and not self.synchronized:
            raise UsageError(
                f"sync_group_size={self.sync_group_size} without synchronized=True has no meaning:"
                " set synchronized=True as well"
            )
        if self.renorm:
            self._check_renorm()

    def _check_renorm(self) -> None:
        keys = ["rmax", "rmin", "dmax"]
        clipping = self.renorm_clipping
        if set(clipping) - set(keys):
            raise UsageError(
                f"Received invalid keys for renorm_clipping: {clipping}; accepted are {keys}"
            )
        rmin, rmax, dmax = (clipping.get(k) for k in ("rmin", "rmax", "dmax"))
        if rmin is not None and rmax is not None and rmax < rmin:
            raise UsageError(
                f"rmax should be greater than rmin in renorm_clipping: rmax={rmax}, rmin={rmin}"
            )
        if dmax is not None and dmax < 0:
            raise UsageError(f"dmax should be non-negative in renorm_clipping: dmax={dmax}")
        if self.virtual_batch_size is not None:
            raise UsageError(
                f"renorm=True with virtual_batch_size={self.virtual_batch_size}: renorm undoes"
                " what ghost batches are for; give one of them"
            )

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        """The shape of the input."""
        normalized_axes(self.axis, input_shape)
        return input_shape

    def get_config(self) -> dict:
        """The arguments; ours only where they say something that Keras' layer can't.

        So a layer that does what Keras' does has a config that Keras' takes, and the other way.
        """
        config = {
            **super().get_config(),
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "synchronized": self.synchronized,
            "renorm": self.renorm,
            "renorm_clipping": self.renorm_clipping,
            "renorm_momentum": self.renorm_momentum,
        }
        for name in ("beta", "gamma", "moving_mean", "moving_variance"):
            initializer = getattr(self, f"{name}_initializer")
            config[f"{name}_initializer"] = keras.initializers.serialize(initializer)
        for name in ("beta", "gamma"):
            regularizer = getattr(self, f"{name}_regularizer")
            config[f"{name}_regularizer"] = keras.regularizers.serialize(regularizer)
            constraint = getattr(self, f"{name}_constraint")
            config[f"{name}_constraint"] = keras.constraints.serialize(constraint)
        ours = {name: getattr(self, name) for name in _NOT_IN_KERAS}
        return config | {name: value for name, value in ours.items() if value}

    @classmethod
    def from_config(cls, config: dict) -> "BatchNormalization":
        """Makes the layer of a config, ours or Keras': one without "unbiased" is biased."""
        return cls(**{"unbiased": False, **config})


_NOT_IN_KERAS = ("unbiased", "sync_group_size", "virtual_batch_size")


# What folding, population statistics and the check-up are about: ours, and Keras'.
BATCH_NORMS = (BatchNormalization, keras.layers.BatchNormalization)


def normalized_axes(axis: int | Sequence[int], shape: Sequence[int | None]) -> list[int]:
    """Gives the axes from 0 on and in order."""
    rank = len(shape)
    given = [axis] if isinstance(axis, int) else list(axis)
    if not given or not all(-rank <= a < rank for a in given):
        raise UsageError(
            f"axis={axis} is out of bounds for an input of shape {tuple(shape)}: accepted are"
            f" {-rank} to {rank - 1}"
        )
    axes = sorted(a % rank for a in given)
    if len(set(axes)) < len(axes):
        raise UsageError(f"axis={axis} names an axis of the input {tuple(shape)} twice")
    if len(axes) == rank:
        raise UsageError(
            f"axis={axis} leaves no axis of the input {tuple(shape)} to take statistics over"
        )
    return axes


def _flat(variable: keras.Variable) -> tf.Tensor:
    value = tf.convert_to_tensor(variable)
    return value if value.shape.rank == 1 else tf.reshape(value, [-1])
