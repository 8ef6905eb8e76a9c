"""The training step, and the loop of steps that runs on the device."""

import hashlib
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from bn_keras import models
from bn_keras.data.pipeline import Data
from bn_keras.distribute import gather_from_workers
from bn_keras.models.weights_file import HEAD
from bn_keras.replicas import per_replica_sum

# Dynamic loss scaling: the first scale, and the steps without overflow after which it doubles
# (Micikevicius et al. 2018, arXiv 1710.03740; the values are Keras').
_FIRST_SCALE = 2.0**15
_STEPS_TO_GROW = 2000


class Trainer:
    """A model with its optimizer, and the training step that changes them.

    The reported loss is the mean softmax cross-entropy over the global batch. The minimized
    objective adds what the reported loss leaves out: class weights, label smoothing, the auxiliary
    classifier's loss, and L2, which enters the gradients of kernels as l2 * w, the gradient of
    l2/2 * |w|^2. The class weights multiply each example's part of the objective, except L2; in a
    mixed example, each label's share is weighted by its class. The sum is divided by the number
    of examples, not by the sum of their weights, and so does not depend on the other examples.
    Each replica computes the gradients of its share of the global mean; the optimizer sums them
    over the replicas.

    Args:
      model: maps images to logits, or to the logits and those of an auxiliary classifier.
      optimizer: optimizer, not built yet.
      strategy: strategy in whose scope both were made.
      global_batch_size: examples per step, over all replicas.
      l2: weight of the L2 penalty.
      auxiliary_weight: weight of the auxiliary classifier's cross-entropy.
      label_smoothing: share of each label that is spread over all classes.
      micro_batches: micro-batches per global batch, whose gradients are accumulated.
      ema: fraction that the exponential moving average (EMA) of the weights keeps at each step; 0
        keeps no EMA. At step t it is at most (1 + t) / (10 + t), so that the initial weights are
        soon forgotten.
      loss_scaling: whether to scale the loss for float16 gradients. A step whose gradients
        overflow on any replica is skipped and not counted by the optimizer, and the scale is
        halved; after 2,000 steps without overflow it doubles. At a scale of 1 an overflowing step
        is not skipped, and the next loss is not finite. (Keras' own scaling checks the first
        replica only.)
      head_factor: factor on the learning rate of the head: of the layers whose names begin with
        one of weights_file.HEAD.
      class_weights: weight of each class in the objective; None weighs all equally.

    Attributes:
      model, optimizer, strategy, global_batch_size, micro_batches: as passed.
      global_micro_batch_size: examples per micro-batch, over all replicas: BN's mini-batches.
      inference_model: the model without its auxiliary classifier.
      averages: EMA of the trainable variables of inference_model, in their order; empty without
        ema.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        strategy: tf.distribute.Strategy,
        global_batch_size: int,
        *,
        l2: float = 0.0,
        auxiliary_weight: float = 0.0,
        label_smoothing: float = 0.0,
        micro_batches: int = 1,
        ema: float = 0.0,
        loss_scaling: bool = False,
        head_factor: float = 1.0,
        class_weights: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.strategy = strategy
        self.global_batch_size = global_batch_size
        self.micro_batches = micro_batches
        self.global_micro_batch_size = global_batch_size // micro_batches
        self._l2_per_replica = l2 / strategy.num_replicas_in_sync
        self._auxiliary_weight = auxiliary_weight
        self._label_smoothing = label_smoothing
        self._ema = ema
        self._loss_scaling = loss_scaling
        self._head_factor = head_factor
        self._class_weights = (
            None if class_weights is None else np.asarray(class_weights, np.float32)
        )
        self._head = {
            id(v)
            for layer in model.layers
            if layer.name.startswith(HEAD)
            for v in layer.trainable_variables
        }
        with strategy.scope():
            self.inference_model = models.without_auxiliary(model)
            optimizer.build(model.trainable_variables)
            # Each replica averages its own copy of the same weights, without communication.
            self.averages = [
                keras.Variable(
                    tf.convert_to_tensor(v.value),
                    dtype=v.dtype,
                    trainable=False,
                    name=v.name,
                    synchronization="on_read",
                    aggregation="only_first_replica",
                )
                for v in (self.inference_model.trainable_variables if ema else [])
            ]
            self._scaling = []
            if loss_scaling:
                self._scaling = [
                    keras.Variable(value, dtype="float32", trainable=False, name=name)
                    for name, value in (("loss_scale", _FIRST_SCALE), ("steps_at_scale", 0.0))
                ]
            # Sums of loss and hits, and the number of batches before the first non-finite loss.
            self._sums = per_replica_sum([3])
            self._gradient_sums = []
            if self._accumulates:
                self._gradient_sums = [per_replica_sum(v.shape) for v in model.trainable_variables]

    @property
    def _accumulates(self) -> bool:
        """Whether a step's gradients are summed before they are checked and applied."""
        return self.micro_batches > 1 or self._loss_scaling

    @property
    def parts(self) -> dict[str, list[keras.Variable]]:
        """All variables that resuming restores, by part of the checkpoint."""
        shared = {id(v) for v in self.inference_model.variables}
        return {
            "model": self.inference_model.variables,
            "auxiliary": [v for v in self.model.variables if id(v) not in shared],
            "optimizer": self.optimizer.variables,
            "averages": self.averages,
            "scaling": self._scaling,
        }

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables of all parts, in one list."""
        return [v for part in self.parts.values() for v in part]

    def open_batches(self, data: Data, step: int) -> tf.distribute.DistributedIterator:
        """Returns an iterator over the training input after a number of steps."""
        size, first = self.global_micro_batch_size, step * self.micro_batches
        return iter(data.train_batches(self.strategy, size, first, mix=True))

    def hash(self) -> str:
        """Returns the SHA-256 over the names and values of all variables."""
        digest = hashlib.sha256()
        for variable in self.variables:
            digest.update(variable.name.encode())
            digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
        return digest.hexdigest()

    def snapshot(self) -> list[tf.Tensor]:
        """Returns the values of all variables; each is copied only when its variable changes."""
        return [tf.convert_to_tensor(v.value) for v in self.variables]

    def restore(self, snapshot: Sequence[tf.Tensor]) -> None:
        """Assigns a snapshot to the variables, on every replica."""
        for variable, value in zip(self.variables, snapshot, strict=True):
            variable.assign(value)

    def restart_averages(self) -> None:
        """Resets the EMA to the current weights after weights were loaded."""
        weights = self.inference_model.trainable_variables
        for average, weight in zip(self.averages, weights, strict=bool(self.averages)):
            average.assign(tf.convert_to_tensor(weight.value))

    def assign_averages(self) -> None:
        """Assigns the EMA of the weights to the weights."""
        weights = self.inference_model.trainable_variables
        for weight, average in zip(weights, self.averages, strict=True):
            weight.assign(tf.convert_to_tensor(average.value))

    def step(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Trains one step on a replica's part of the global batch.

        Only without micro-batches and loss scaling, whose steps consist of several calls; `train`
        supports both.

        Args:
          images, labels: see `compute_gradients`.

        Returns:
          The part's share of the mean loss, and the number of its correctly classified examples.
        """
        loss, hits, gradients = self.compute_gradients(images, labels)
        self._update(gradients)
        return loss, hits

    def compute_gradients(
        self, images: tf.Tensor, labels: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Computes loss, hits and gradients of a replica's part of a global batch.

        Args:
          images: float32 [N, H, W, C].
          labels: int32 [N], or float32 [N, classes] with the share of each class.

        Returns:
          The part's share of the mean loss, and the number of its correctly classified examples,
          both float32; and the gradients of the objective with respect to the model's trainable
          variables, multiplied by the loss scale if there is one.
        """
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(self.model(images, training=True))
            logits, *auxiliary = [tf.cast(output, tf.float32) for output in outputs]
            loss = self._mean(_cross_entropy(labels, logits))
            objective = self._objective(labels, logits, loss)
            for other in auxiliary:
                other_loss = self._mean(_cross_entropy(labels, other))
                objective += self._auxiliary_weight * self._objective(labels, other, other_loss)
            if self._loss_scaling:
                objective *= self._scaling[0].value
        gradients = tape.gradient(objective, [v.value for v in self.model.trainable_variables])
        targets = labels if labels.shape.rank == 1 else tf.argmax(labels, -1, tf.int32)
        hits = tf.argmax(logits, axis=-1, output_type=tf.int32) == targets
        return loss, tf.reduce_sum(tf.cast(hits, tf.float32)), gradients

    def _objective(self, labels: tf.Tensor, logits: tf.Tensor, loss: tf.Tensor) -> tf.Tensor:
        weights = None
        if self._class_weights is not None:
            weights, loss = self._weigh(labels, logits)
        if not self._label_smoothing:
            return loss
        # Cross-entropy with the uniform distribution over the classes.
        uniform = tf.reduce_logsumexp(logits, -1) - tf.reduce_mean(logits, -1)
        uniform = self._mean(uniform if weights is None else weights * uniform)
        return (1 - self._label_smoothing) * loss + self._label_smoothing * uniform

    def _weigh(self, labels: tf.Tensor, logits: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the weight of each example, float32 [N], and the weighted mean loss."""
        if labels.shape.rank == 1:
            weights = tf.gather(self._class_weights, labels)
            return weights, self._mean(weights * _cross_entropy(labels, logits))
        # The operation for the cross-entropy of soft labels is wrong if they do not add up to 1.
        weighted = labels * self._class_weights
        losses = -tf.reduce_sum(weighted * tf.nn.log_softmax(logits), -1)
        return tf.reduce_sum(weighted, -1), self._mean(losses)

    def _mean(self, losses: tf.Tensor) -> tf.Tensor:
        """Returns the share of these losses in the mean over the global batch."""
        return tf.reduce_sum(losses) / self.global_batch_size

    def _update(self, gradients: Sequence[tf.Tensor]) -> None:
        variables = self.model.trainable_variables
        if self._l2_per_replica:
            gradients = [
                g + self._l2_per_replica * v.value if v.name.endswith("kernel") else g
                for g, v in zip(gradients, variables, strict=True)
            ]
        if self._head_factor != 1:
            # SGD with momentum is linear in the gradient: this is a factor on the learning rate.
            gradients = [
                g * self._head_factor if id(v) in self._head else g
                for g, v in zip(gradients, variables, strict=True)
            ]
        self.optimizer.apply(gradients, variables)
        if self.averages:
            steps = tf.cast(self.optimizer.iterations.value, tf.float32)
            rate = 1 - tf.minimum(self._ema, (1 + steps) / (10 + steps))
            weights = self.inference_model.trainable_variables
            for average, weight in zip(self.averages, weights, strict=True):
                average.assign(average.value + rate * (weight.value - average.value))

    # AutoGraph would take a second at every start, and has nothing to convert here.
    @tf.autograph.experimental.do_not_convert
    def _train_whole_batch(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        self._add_to_sums(*self.step(images, labels))

    @tf.autograph.experimental.do_not_convert
    def _accumulate_micro_batch(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        loss, hits, gradients = self.compute_gradients(images, labels)
        for total, gradient in zip(self._gradient_sums, gradients, strict=True):
            total.assign_add(gradient)
        self._add_to_sums(loss, hits)

    @tf.autograph.experimental.do_not_convert
    def _apply_accumulated(self) -> None:
        gradients = [total.read_value() for total in self._gradient_sums]
        if self._loss_scaling:
            gradients = [g / self._scaling[0].value for g in gradients]
        self._update(gradients)

    def _add_to_sums(self, loss: tf.Tensor, hits: tf.Tensor) -> None:
        # The sum is never finite again after the first non-finite loss.
        finite = tf.math.is_finite(self._sums[0] + loss)
        self._sums.assign_add([loss, hits, tf.cast(finite, tf.float32)])

    @tf.function
    def _train_loop(self, batches: tf.distribute.DistributedIterator, num_steps: tf.Tensor) -> None:
        for _ in tf.range(num_steps):
            if self._accumulates:
                self._train_micro_batches(batches)
            else:
                self.strategy.run(self._train_whole_batch, args=next(batches))

    def _train_micro_batches(self, batches: tf.distribute.DistributedIterator) -> None:
        # Outside strategy.run: collectives cannot run under control flow inside a replica.
        self.strategy.run(_set_to_zero, args=(self._gradient_sums,))
        for _ in tf.range(self.micro_batches):
            self.strategy.run(self._accumulate_micro_batch, args=next(batches))
        if not self._loss_scaling:
            self.strategy.run(self._apply_accumulated)
        else:
            scale, steps = self._scaling
            overflowed = self.strategy.run(_any_not_finite, args=(self._gradient_sums,))
            overflowed = self.strategy.reduce(tf.distribute.ReduceOp.SUM, overflowed, axis=None)
            # At a scale of 1, scaling is not the cause of the overflow.
            if tf.logical_and(overflowed > 0, scale.value > 1):
                scale.value.assign(scale.value / 2)
                steps.value.assign(0.0)
            else:
                self.strategy.run(self._apply_accumulated)
                grows = tf.equal(steps.value, _STEPS_TO_GROW - 1)
                scale.value.assign(tf.where(grows, scale.value * 2, scale.value))
                steps.value.assign(tf.where(grows, 0.0, steps.value + 1))

    def trace(self, batches: tf.distribute.DistributedIterator) -> None:
        """Builds the graph of the loop, which takes seconds, without training."""
        self._train_loop.get_concrete_function(batches, tf.constant(0))

    def train(
        self, batches: tf.distribute.DistributedIterator, num_steps: int
    ) -> tuple[float, float, int]:
        """Trains on the next batches.

        Args:
          batches: micro-batches of global_micro_batch_size examples.
          num_steps: number of steps, at least 1; each uses micro_batches batches.

        Returns:
          Mean loss and mean accuracy over the steps, and the number of steps before the first
          non-finite loss.
        """
        self._sums.assign(tf.zeros([3]))
        self._train_loop(batches, tf.constant(num_steps))
        loss, hits, _ = (float(s) for s in self._sums.read_value())
        local = self.strategy.experimental_local_results(self._sums)
        finite = gather_from_workers(self.strategy, min(float(s[2]) for s in local))
        finite_steps = int(min(finite)) // self.micro_batches
        return loss / num_steps, hits / (num_steps * self.global_batch_size), finite_steps


def _cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    if labels.shape.rank == 1:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.nn.softmax_cross_entropy_with_logits(labels, logits)


def _set_to_zero(variables: Sequence[tf.Variable]) -> None:
    for variable in variables:
        variable.assign(tf.zeros_like(variable))


def _any_not_finite(variables: Sequence[tf.Variable]) -> tf.Tensor:
    finite = [tf.reduce_all(tf.math.is_finite(v.read_value())) for v in variables]
    return tf.cast(tf.logical_not(tf.reduce_all(finite)), tf.float32)
