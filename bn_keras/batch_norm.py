"""The Keras layer: its variables, its modes, its moving statistics, and how replicas share them."""

import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias, cast

import keras
import tensorflow as tf

from bn_keras import ops
from bn_keras.arguments import (
    as_axis,
    as_bool,
    as_epsilon,
    as_momentum,
    as_renorm_clipping,
    as_size,
    is_variable,
    read_variables,
)
from bn_keras.errors import UsageError
from bn_keras.keras_internals import implicit_mask
from bn_keras.replicas import gather_replicas, num_replicas, per_replica_sum

# As Keras accepts them: an instance, a function, a registered name, or a config.
Initializer: TypeAlias = keras.initializers.Initializer | Callable[..., tf.Tensor] | str | dict
Regularizer: TypeAlias = keras.regularizers.Regularizer | Callable[..., tf.Tensor] | str | dict
Constraint: TypeAlias = keras.constraints.Constraint | Callable[..., tf.Tensor] | str | dict


@keras.saving.register_keras_serializable("bn_keras")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization with the arguments and weights of keras.layers.BatchNormalization.

    Decisions:
      - Training normalizes by the biased batch variance (Algorithm 1). Bessel's correction enters
        only the moving variance, and only with unbiased=True.
      - Statistics and parameters are at least float32, whatever the dtype of the activations.
      - An empty or entirely masked batch leaves the moving statistics unchanged.
      - A frozen layer (trainable=False) runs in inference mode.
      - `training` may be a tensor. Both modes are then computed and one result is selected.
      - A mask excludes values from the statistics; all values are normalized. Its shape is that of
        the input without `axis` or, if that does not fit, without the last axis, like the masks of
        keras.layers.Masking.
      - With several ghost batches per step, the moving statistics use the count-weighted mean of
        their statistics.
      - Replicas that are not synchronized keep moving statistics of their own until
        merge_moving_statistics (in `fit`: MergeMovingStatistics) merges them.

    Args:
      axis: axis or list of axes with statistics and parameters of their own; the remaining axes
        are reduced. [1, 2, 3] normalizes each activation of an image separately.
      momentum: fraction of the moving statistics that is kept at each step, in [0, 1] (PyTorch's
        momentum is 1 minus it). None averages all batches so far equally, counted for the whole
        layer, which then has one more weight, num_updates, the last.
      epsilon: added to the variance under the root, > 0.
      center: whether to add beta.
      scale: whether to multiply by gamma.
      beta_initializer, gamma_initializer: initial parameters.
      moving_mean_initializer, moving_variance_initializer: initial moving statistics.
      beta_regularizer, gamma_regularizer: penalties on the parameters.
      beta_constraint, gamma_constraint: projections of the parameters after each update.
      renorm: whether to use batch renormalization (Ioffe 2017).
      renorm_clipping: bounds "rmin", "rmax" and "dmax" of the corrections r and d; a missing bound
        does not clip. Variables among them change the bounds during training; a config has their
        current values.
      renorm_momentum: like momentum, for the statistics that renorm corrects towards; not None.
      synchronized: whether the replicas share the statistics of their batches, with one collective
        forward and one backward.
      unbiased: whether the moving variance averages unbiased (Bessel-corrected) batch variances,
        m / (m - 1) times the biased ones (Algorithm 2). False averages biased variances, as Keras
        does.
      sync_group_size: number of consecutive replicas that share statistics if synchronized. None
        means all replicas.
      virtual_batch_size: number of consecutive examples per ghost batch, which has statistics of
        its own; must divide each replica's batch size. None means the whole batch. Not used at
        inference, unless `training` is a tensor. With synchronized=True the k-th ghost batches of
        all replicas share statistics, so each replica needs the same number of them.
      **kwargs: name, dtype, trainable.

    Raises:
      UsageError: an argument is invalid. When the layer is built or called: `axis` does not fit the
        input shape, the input is not a dense tensor of real numbers, the mask does not fit, or
        virtual_batch_size does not divide the batch.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.
    """

    # Number of values that entered the moving statistics since the last merge, or None if the
    # replicas' moving statistics cannot differ.
    values_since_merge: tf.Variable | None = None

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float | tf.Variable | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        moving_mean_initializer: Initializer = "zeros",
        moving_variance_initializer: Initializer = "ones",
        beta_regularizer: Regularizer | None = None,
        gamma_regularizer: Regularizer | None = None,
        beta_constraint: Constraint | None = None,
        gamma_constraint: Constraint | None = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float | tf.Variable | keras.Variable | None] | None = None,
        renorm_momentum: float | tf.Variable = 0.99,
        synchronized: bool = False,
        *,
        unbiased: bool = True,
        sync_group_size: int | None = None,
        virtual_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        # Checked here first: our messages say what is expected.
        momentum = None if momentum is None else as_momentum("momentum", momentum)
        super().__init__(
            momentum=momentum if isinstance(momentum, float) else 0.99,
            epsilon=as_epsilon(epsilon),
            center=as_bool("center", center),
            scale=as_bool("scale", scale),
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            synchronized=as_bool("synchronized", synchronized),
            **kwargs,
        )
        # Arguments that the Keras layer does not accept, or checks with other messages.
        self.axis = as_axis(axis)
        self.renorm = as_bool("renorm", renorm)
        bounds = as_renorm_clipping(renorm_clipping) if renorm else renorm_clipping
        values = momentum, as_momentum("renorm_momentum", renorm_momentum), bounds
        for name, value in zip(_SCHEDULES, values, strict=True):
            # Hidden from Keras, which would take variables among them for weights.
            object.__setattr__(self, name, value)
        self.unbiased = as_bool("unbiased", unbiased)
        self.sync_group_size = as_size("sync_group_size", sync_group_size)
        self.virtual_batch_size = as_size("virtual_batch_size", virtual_batch_size)
        self._check_combination()

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the weights, in the order of the Keras layer, each with the sizes of `axis`."""
        if not _is_shape(input_shape):
            raise UsageError(
                f"{self.name}: the input has the shape {input_shape}: expected a single tensor"
            )
        self._axes = canonical_axes(self.axis, input_shape)
        self._shape = tuple(input_shape[a] for a in self._axes)
        if None in self._shape:
            raise UsageError(
                f"axis={self.axis} has an unknown size in input shape {tuple(input_shape)}:"
                " pass the size to keras.Input"
            )
        if self.virtual_batch_size is not None and 0 in self._axes:
            raise UsageError(
                f"axis={self.axis} includes the batch axis, which virtual_batch_size splits:"
                " use one or the other"
            )
        self.gamma = self.beta = None
        if self.scale:
            self.gamma = self._add_parameter(
                "gamma", self.gamma_initializer, self.gamma_regularizer, self.gamma_constraint
            )
        if self.center:
            self.beta = self._add_parameter(
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
        self.num_updates: keras.Variable | None = None
        if self.momentum is None:
            self.num_updates = self.add_weight(
                shape=(), name="num_updates", initializer="zeros", dtype="int64", trainable=False
            )
        if self._replicas_may_diverge():
            # object.__setattr__ hides it from Keras. It is not saved: every save follows a merge.
            object.__setattr__(self, "values_since_merge", per_replica_sum())
        self.input_spec = keras.InputSpec(
            ndim=len(input_shape), axes=dict(zip(self._axes, self._shape, strict=True))
        )

    def call(
        self,
        inputs: tf.Tensor,
        training: bool | tf.Tensor | None = None,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Normalizes by batch statistics in training mode, by moving statistics at inference.

        Args:
          inputs: any shape of rank 2 or more; integers are cast to the dtype of the statistics.
          training: a bool, a boolean scalar tensor or variable, or None for inference.
          mask: only values where it is nonzero enter the statistics.

        Returns:
          Same shape as inputs, in the compute dtype.
        """
        x = self._check_inputs(inputs)
        if mask is None and (isinstance(training, tf.Tensor) or is_variable(training)):
            # Keras passes on the mask of its Masking layer only to a call with a single tensor.
            mask = implicit_mask(inputs)
        mask = self._expand_mask(mask, x)
        training = self.trainable and _static_value(training, self.name)
        if isinstance(training, tf.Tensor):
            training = tf.cast(training, tf.bool)
            # No tf.cond: a collective cannot run inside a branch.
            y = tf.where(training, self._train(x, mask, training), self._infer(x))
        else:
            y = self._train(x, mask) if training else self._infer(x)
        return tf.cast(y, self.compute_dtype)

    def _infer(self, x: tf.Tensor) -> tf.Tensor:
        mean, variance = map(tf.convert_to_tensor, (self.moving_mean, self.moving_variance))
        return ops.normalize(x, mean, variance, *self._parameters(), self.epsilon, self._axes)

    def _train(
        self, x: tf.Tensor, mask: tf.Tensor | None, training: bool | tf.Tensor = True
    ) -> tf.Tensor:
        """Normalizes by batch statistics, and updates the moving statistics if `training`."""
        x, parameters = self._check_batch(x), self._parameters()
        if self._is_plain(mask, training) and ops.uses_averaging_kernel(x, *parameters, self._axes):
            return self._train_in_kernel(x, *parameters)
        dtype = x.dtype
        if self.renorm:
            # Half precision would round x_hat before its correction.
            x = tf.cast(x, ops.statistics_dtype(x.dtype))
        y, moments = ops.batch_normalize(
            x,
            *((None, None) if self.renorm else parameters),
            self.epsilon,
            axes=self._axes,
            mask=mask,
            virtual_batch_size=self.virtual_batch_size,
            gather=self._gather if self._is_synchronized() else None,
        )
        if self.renorm:
            y = tf.cast(self._renormalize(y, moments, *parameters, mask), dtype)
        self.update_moving_statistics(moments, training)
        return y

    def _is_plain(self, mask: tf.Tensor | None, training: bool | tf.Tensor) -> bool:
        """Returns whether the fused kernel can also update the moving statistics, the fastest path.

        It cannot if update_moving_statistics does anything else.
        """
        update = getattr(self.update_moving_statistics, "__func__", None)
        return (
            training is True
            and mask is None
            and self.momentum is not None
            and not is_variable(self.momentum)
            and self.virtual_batch_size is None
            and self.values_since_merge is None
            and self._weight_dtype == "float32"
            and not self.renorm
            and not self._is_synchronized()
            and update is BatchNormalization.update_moving_statistics
        )

    def _train_in_kernel(
        self, x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None
    ) -> tf.Tensor:
        moving = ops.MovingStatistics(
            _flatten(self.moving_mean),
            _flatten(self.moving_variance),
            cast(float, self.momentum),
            self.unbiased,
        )
        y, (mean, variance) = ops.batch_normalize_and_average(
            x, gamma, beta, self.epsilon, moving, self._axes
        )
        self.moving_mean.assign(self._unflatten(mean))
        self.moving_variance.assign(self._unflatten(variance))
        return y

    def _renormalize(
        self,
        x_hat: tf.Tensor,
        moments: ops.Moments,
        gamma: tf.Tensor | None,
        beta: tf.Tensor | None,
        mask: tf.Tensor | None,
    ) -> tf.Tensor:
        """Computes gamma * (r * x_hat + d) + beta, which normalizes by the renorm statistics.

        Clipping r and d limits this correction.

        Source: Ioffe 2017 (arXiv 1702.03275), Algorithm 1.
        """
        mean, stddev, gamma, beta = (
            p if p is None else self._broadcast(tf.cast(p, x_hat.dtype))
            for p in (self.renorm_mean, self.renorm_stddev, gamma, beta)
        )
        batch_mean, variance = (self._broadcast(self._unflatten(t)) for t in moments[1:])
        stddev = tf.maximum(stddev, self.epsilon**0.5)
        r = tf.sqrt(variance + self.epsilon) / stddev
        d = (batch_mean - mean) / stddev
        # Constants: no gradient flows through r and d, or to the bounds.
        r, d = map(tf.stop_gradient, self._clip(r, d))
        scale, offset = (r, d) if gamma is None else (r * gamma, d * gamma)
        # A masked value may be NaN; where its dy is 0 it must not reach gamma's gradient.
        multiply = tf.multiply if mask is None else tf.math.multiply_no_nan
        return multiply(x_hat, scale) + (offset if beta is None else offset + beta)

    def _clip(self, r: tf.Tensor, d: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        bounds = {
            name: tf.cast(bound, r.dtype) if is_variable(bound) else bound
            for name, bound in (self.renorm_clipping or {}).items()
        }
        rmin, rmax, dmax = map(bounds.get, ("rmin", "rmax", "dmax"))
        if rmin is not None:
            r = tf.maximum(r, rmin)
        if rmax is not None:
            r = tf.minimum(r, rmax)
        if dmax is not None:
            d = tf.clip_by_value(d, -dmax, dmax)
        return r, d

    # --- Moving statistics.

    def update_moving_statistics(
        self, moments: ops.Moments, training: bool | tf.Tensor = True
    ) -> None:
        """Updates the moving statistics, unless the batch is empty or entirely masked.

        Called once per call in training mode, in replica context. Override it to use the batch
        statistics differently. If it is neither overridden nor replaced on the layer, the fused
        kernel may make the same update instead.

        Args:
          moments: moments of the call or of its G ghost batches, merged over synchronized replicas;
            variances are biased.
          training: whether to update; a tensor if the mode is known only at run time.
        """
        count, mean, biased = moments
        # Bessel's correction enters here.
        variance = ops.unbias(biased, count) if self.unbiased else biased
        if mean.shape.rank == 2:
            total = tf.reduce_sum(count, axis=0)
            share = tf.math.divide_no_nan(count, total)
            mean, variance = (tf.reduce_sum(share * t, axis=0) for t in (mean, variance))
            count = total
        weight = self._compute_weight(count, training)
        self._average(self.moving_mean, mean, weight, training)
        if not self.renorm:
            self._average(self.moving_variance, variance, weight, training)
        else:
            # As in the Keras layer, standard deviations are averaged and the moving variance
            # follows from them.
            stddev = tf.sqrt(variance + self.epsilon)
            stddev = self._average(self.moving_stddev, stddev, weight, training)
            moving_variance = tf.nn.relu(tf.square(stddev) - self.epsilon)
            # A weight that is a number is 0 for an empty batch and for momentum=1.
            if training is not True or isinstance(weight, tf.Tensor) or not weight:
                is_update = tf.logical_and(weight > 0, training)
                old = _flatten(self.moving_variance)
                moving_variance = tf.where(is_update, moving_variance, old)
            self.moving_variance.assign(self._unflatten(moving_variance))
            weight = _weight_where_counted(1 - self.renorm_momentum, count)
            self._average(self.renorm_mean, mean, weight, training)
            stddev = tf.sqrt(biased + self.epsilon)
            self._average(self.renorm_stddev, stddev, weight, training)
        if self.values_since_merge is not None and num_replicas() > 1:
            num_values = tf.cast(tf.reduce_mean(count), tf.float32)
            self.values_since_merge.assign_add(tf.where(training, num_values, 0.0))

    def _compute_weight(self, count: ops.Count, training: bool | tf.Tensor) -> ops.Count:
        """Computes the weight of a batch in the moving statistics, 1 - momentum.

        With momentum=None, this also counts the update.
        """
        if self.momentum is not None:
            return _weight_where_counted(1 - self.momentum, count)
        if self.num_updates is None:
            raise UsageError(
                f"{self.name}: momentum=None was set after the layer was built, without the counter"
                " that it needs: pass it to the constructor"
            )
        is_update = tf.logical_and(tf.reduce_any(count > 0), training)
        num_updates = self.num_updates.value + tf.cast(is_update, tf.int64)
        self.num_updates.assign(num_updates)
        weight = 1 / tf.cast(tf.maximum(num_updates, 1), self._weight_dtype)
        return _weight_where_counted(weight, count)

    def _average(
        self,
        variable: keras.Variable,
        value: tf.Tensor,
        weight: ops.Count,
        training: bool | tf.Tensor,
    ) -> tf.Tensor:
        """Sets a moving average to (1 - weight) * average + weight * value.

        Args:
          variable: moving average, with the shape of the weights.
          value: [C].
          weight: in [0, 1]; scalar, [1] or [C].
          training: whether to update.

        Returns:
          The average after the update, [C].
        """
        old = _flatten(variable)
        new = tf.cast(value, old.dtype)
        if isinstance(weight, tf.Tensor):
            weight = tf.cast(weight, old.dtype)
        momenta = self.momentum, self.renorm_momentum
        if all(not is_variable(momentum) and momentum for momentum in momenta):
            new = old - (old - new) * weight
        else:
            # With a weight of 1, the difference above would lose the digits of a small new value.
            new = old * (1 - weight) + new * weight
        if training is not True:
            new = tf.where(training, new, old)
        variable.assign(self._unflatten(new))
        return new

    # --- Replicas.

    def _is_synchronized(self) -> bool:
        return self.synchronized and num_replicas() > 1

    def _gather(self, packed: tf.Tensor) -> tf.Tensor:
        return gather_replicas(packed, self.sync_group_size)

    def _replicas_may_diverge(self) -> bool:
        """Returns whether the replicas' moving statistics can come to differ."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        share_all = self.synchronized and self.sync_group_size in (None, replicas)
        return replicas > 1 and not share_all

    # --- Shapes and checks.

    def _parameters(self) -> tuple[tf.Tensor | None, tf.Tensor | None]:
        """Returns gamma and beta, or None for those that the layer lacks."""
        gamma, beta = (p if p is None else tf.convert_to_tensor(p) for p in (self.gamma, self.beta))
        return gamma, beta

    def _broadcast(self, t: tf.Tensor) -> tf.Tensor:
        """Reshapes a tensor with the shape of the weights so that it broadcasts with the input."""
        sizes = dict(zip(self._axes, self._shape, strict=True))
        return tf.reshape(t, [sizes.get(a, 1) for a in range(self.input_spec.ndim)])

    def _unflatten(self, t: tf.Tensor) -> tf.Tensor:
        """Reshapes [C] to the shape of the weights."""
        return t if len(self._shape) == 1 else tf.reshape(t, self._shape)

    def _add_parameter(
        self,
        name: str,
        initializer: Initializer,
        regularizer: Regularizer | None,
        constraint: Constraint | None,
    ) -> keras.Variable:
        return self.add_weight(
            shape=self._shape,
            name=name,
            initializer=initializer,
            regularizer=regularizer,
            constraint=constraint,
            dtype=self._weight_dtype,
            autocast=False,
        )

    def _add_statistic(self, name: str, initializer: Initializer) -> keras.Variable:
        return self.add_weight(
            shape=self._shape,
            name=name,
            initializer=initializer,
            trainable=False,
            dtype=self._weight_dtype,
            autocast=False,
        )

    @property
    def _weight_dtype(self) -> str:
        # With dtype="bfloat16" a moving average in that dtype would stall far from its target.
        return "float64" if self.variable_dtype == "float64" else "float32"

    def _initial_stddev(self, shape: Sequence[int], dtype: str | None = None) -> tf.Tensor:
        # A clone, because a second call of the same initializer may fail or draw other values.
        initializer = self.moving_variance_initializer
        if isinstance(initializer, keras.initializers.Initializer):
            initializer = initializer.clone()
        return keras.ops.sqrt(initializer(shape, dtype=dtype))

    def _expand_mask(self, mask: tf.Tensor | None, inputs: tf.Tensor) -> tf.Tensor | None:
        """Returns the mask with the rank of the input, or None."""
        if mask is None:
            return None
        mask = tf.convert_to_tensor(mask)
        rank = inputs.shape.rank
        reduced = [a for a in range(rank) if a not in self._axes]
        if _fits(mask.shape, [inputs.shape[a] for a in reduced]):
            for a in self._axes:
                mask = tf.expand_dims(mask, a)
        elif _fits(mask.shape, inputs.shape[:-1]):
            mask = tf.broadcast_to(mask[..., None], tf.shape(inputs))
        else:
            raise UsageError(
                f"{self.name}: mask shape {mask.shape} does not fit input shape"
                f" {tuple(inputs.shape)}: expected the input shape without axis={self.axis}"
            )
        return mask

    def _check_inputs(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns the inputs in a floating-point dtype, with the sizes of `axis` known.

        The dtype is at least as wide as that of the outputs.
        """
        if isinstance(inputs, tf.RaggedTensor | tf.SparseTensor):
            is_ragged = isinstance(inputs, tf.RaggedTensor)
            advice = (
                "inputs.to_tensor(), and a mask that excludes the padding"
                if is_ragged
                else "tf.sparse.to_dense(inputs)"
            )
            raise UsageError(
                f"{self.name}: inputs are a {type(inputs).__name__}, but a dense tensor is"
                f" expected: pass {advice}"
            )
        x = tf.convert_to_tensor(inputs)
        if not (x.dtype.is_floating or x.dtype.is_integer or x.dtype.is_bool):
            raise UsageError(
                f"{self.name}: inputs have dtype {x.dtype.name}: expected real numbers"
            )
        if not x.dtype.is_floating:
            # Half precision cannot represent large integers.
            x = tf.cast(x, self._weight_dtype)
        if x.dtype != self.compute_dtype:
            # With autocast=False the inputs keep their dtype.
            x = tf.cast(x, keras.backend.result_type(x.dtype.name, self.compute_dtype))
        if None in [x.shape[a] for a in self._axes]:
            sizes = dict(zip(self._axes, self._shape, strict=True))
            x = tf.ensure_shape(x, [sizes.get(a) for a in range(self.input_spec.ndim)])
        return x

    def _check_batch(self, x: tf.Tensor) -> tf.Tensor:
        """Returns x after checking that it consists of whole ghost batches."""
        size = self.virtual_batch_size
        if size is None or x.shape[0] is not None and x.shape[0] % size == 0:
            return x
        message = (
            f"{self.name}: virtual_batch_size={size} does not divide this replica's batch size:"
            f" use a multiple of {size} (drop_remainder=True), or another virtual_batch_size"
        )
        if x.shape[0] is not None:
            raise UsageError(f"{message}; the batch has {x.shape[0]} examples")
        with tf.control_dependencies(
            [tf.debugging.assert_equal(tf.shape(x)[0] % size, 0, message)]
        ):
            return tf.identity(x)

    def _check_combination(self) -> None:
        if self.sync_group_size is not None and not self.synchronized:
            raise UsageError(
                f"sync_group_size={self.sync_group_size} requires synchronized=True: set it, or"
                " remove sync_group_size"
            )
        if self.renorm and self.virtual_batch_size is not None:
            raise UsageError(
                f"renorm=True and virtual_batch_size={self.virtual_batch_size} are mutually"
                " exclusive: renorm undoes the effect of ghost batches"
            )

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        """Returns the input shape, after checking `axis` against it."""
        canonical_axes(self.axis, input_shape)
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments. Includes those that the Keras layer lacks only if they are set.

        A layer that behaves like the Keras layer therefore has a config that the Keras layer
        accepts, and vice versa.
        """
        additional = {name: getattr(self, name) for name in _NOT_IN_KERAS}
        config = super().get_config() | {n: value for n, value in additional.items() if value}
        return config | read_variables({name: getattr(self, name) for name in _SCHEDULES})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Builds a layer from a config of this layer or of the Keras layer.

        A config without "unbiased" builds a layer with unbiased=False, unless the constructor of a
        subclass does not accept this argument.
        """
        layer = cls(**config)
        parameters = inspect.signature(cls.__init__).parameters.values()
        is_accepted = any(p.name == "unbiased" or p.kind is p.VAR_KEYWORD for p in parameters)
        if is_accepted and "unbiased" not in config:
            # Not as an argument, which a subclass may pass on with a value of its own.
            layer.unbiased = False
        return layer


# Arguments that may be, or contain, variables which schedule them.
_SCHEDULES = ("momentum", "renorm_momentum", "renorm_clipping")
_NOT_IN_KERAS = ("unbiased", "sync_group_size", "virtual_batch_size")


def canonical_axes(axis: int | Sequence[int], shape: Sequence[int | None]) -> list[int]:
    """Returns the axes as non-negative numbers in ascending order.

    Args:
      axis: axis or list of axes, each in [-rank, rank).
      shape: input shape.

    Raises:
      UsageError: the shape has fewer than two axes, an axis is out of bounds or repeated, or no
        axis is left to reduce.
    """
    rank = len(shape)
    if rank < 2:
        raise UsageError(
            f"input shape {tuple(shape)} is invalid: expected two or more axes, the batch axis"
            " included"
        )
    given = [axis] if isinstance(axis, int) else list(axis)
    if not given or not all(-rank <= a < rank for a in given):
        raise UsageError(
            f"axis={axis} is out of bounds for input shape {tuple(shape)}: expected {-rank} to"
            f" {rank - 1}"
        )
    axes = sorted(a % rank for a in given)
    if len(set(axes)) < len(axes):
        raise UsageError(
            f"axis={axis} repeats an axis of input shape {tuple(shape)}: pass each axis once"
        )
    if len(axes) == rank:
        raise UsageError(
            f"axis={axis} covers all axes of input shape {tuple(shape)}: leave at least one axis"
            " to compute statistics over"
        )
    return axes


def _is_shape(shape: Any) -> bool:
    """Returns whether an argument of `build` is the shape of a single tensor."""
    if not isinstance(shape, Sequence | tf.TensorShape):
        return False
    return all(size is None or isinstance(size, numbers.Integral) for size in shape)


def _weight_where_counted(weight: ops.Count, count: ops.Count) -> ops.Count:
    """Returns the weight, or 0 where no value was counted."""
    if isinstance(count, float):
        return weight if count else 0.0
    # Counts are integers, so the minimum is 0 or the weight.
    return tf.minimum(count, weight if isinstance(weight, float) else tf.cast(weight, count.dtype))


def _static_value(training: bool | tf.Tensor | None, name: str) -> bool | tf.Tensor | None:
    """Returns `training` as a bool if its value is known while a graph is built.

    Raises:
      UsageError: it is not a scalar truth value. The message names the layer, `name`.
    """
    if training is None or isinstance(training, bool):
        return training
    value = tf.convert_to_tensor(training)
    is_number = value.dtype.is_bool or value.dtype.is_integer or value.dtype.is_floating
    if value.shape.rank or not is_number:
        raise UsageError(f"{name}: training={training!r} is invalid: expected True, False or None")
    static = tf.get_static_value(value)
    return value if static is None else bool(static)


def _flatten(variable: keras.Variable) -> tf.Tensor:
    value = tf.convert_to_tensor(variable)
    return value if value.shape.rank == 1 else tf.reshape(value, [-1])


def _fits(shape: tf.TensorShape, expected: Sequence[int | None]) -> bool:
    """Returns whether each dimension equals the expected one, is 1, or is unknown."""
    return shape.rank == len(expected) and all(
        d in (1, None) or e in (d, None) for d, e in zip(shape, expected, strict=True)
    )
