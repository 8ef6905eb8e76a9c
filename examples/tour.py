# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Batch normalization on MNIST, in three minutes
#
# The notebook reproduces section 4.1 of [Ioffe & Szegedy 2015](https://arxiv.org/abs/1502.03167): a
# network of three hidden layers of 100 sigmoids, with and without batch normalization (BN). `make
# tour` runs it again from `examples/tour.py`. It needs `bn_keras[cpu,train]`.

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import bn_keras

tf.get_logger().setLevel("ERROR")
NAMES = {"baseline": "without BN", "bn": "with BN"}
STEPS, BATCH_SIZE = 5000, 60


def load(split):
    """Returns images with pixels 0 and 1, and labels."""
    images, labels = tfds.load("mnist", split=split, batch_size=-1, as_supervised=True)
    return tf.cast(images >= 128, tf.float32), labels


train_images, train_labels = load("train")
test_images, test_labels = load("test")
print(train_images.shape, test_images.shape)

# %% [markdown]
# ## Training
#
# Plain SGD. During training we record the accuracy on the test images, and the input of one
# sigmoid of the last hidden layer: the 15th, 50th and 85th percentiles over a fixed set of 1,000
# images.


# %%
def train_network(variant, rate, steps=STEPS, every=50):
    """Returns the steps of the recordings, the accuracies, and the percentiles [recordings, 3]."""
    keras.utils.set_random_seed(0)
    network = bn_keras.SigmoidMLP(variant)
    to_sigmoid = keras.Model(network.input, network.get_layer("sigmoid_3").input)
    optimizer = keras.optimizers.SGD(rate)
    optimizer.build(network.trainable_variables)

    @tf.function
    def train_steps(count):
        for _ in tf.range(count):
            rows = tf.random.uniform((BATCH_SIZE,), maxval=len(train_images), dtype=tf.int32)
            images, labels = tf.gather(train_images, rows), tf.gather(train_labels, rows)
            with tf.GradientTape() as tape:
                logits = network(images, training=True)
                loss = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
                )
            optimizer.apply(
                tape.gradient(loss, network.trainable_variables), network.trainable_variables
            )

    @tf.function
    def measure():
        hits = tf.argmax(network(test_images), axis=1) == test_labels
        # In training mode: BN normalizes by the statistics of these images.
        inputs = to_sigmoid(train_images[:1000], training=True)
        return tf.reduce_mean(tf.cast(hits, tf.float32)), inputs

    recorded, accuracies, percentiles = [], [], []
    for step in range(0, steps + 1, every):
        accuracy, inputs = measure()
        recorded.append(step)
        accuracies.append(float(accuracy))
        percentiles.append(np.percentile(inputs[:, 0], (15, 50, 85)))
        train_steps(tf.constant(every))
    return recorded, accuracies, np.array(percentiles)


runs = {variant: train_network(variant, rate=0.1) for variant in NAMES}

# %% [markdown]
# ## Figure 1: BN learns faster, and stabilizes the input of the sigmoid
#
# Without BN, the network hardly learns at first, because its sigmoids receive almost the same value
# for all images. With BN they receive a spread-out input from the first step on.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
for variant, name in NAMES.items():
    steps, accuracies, _ = runs[variant]
    axes[0].plot(steps, accuracies, label=name)
axes[0].set(title="(a) test accuracy", xlabel="training steps", ylim=(0, 1))
axes[0].legend()
for axis, (variant, name), letter in zip(axes[1:], NAMES.items(), "bc", strict=True):
    steps, _, percentiles = runs[variant]
    axis.plot(steps, percentiles)
    axis.set(title=f"({letter}) input of a sigmoid, {name}", xlabel="training steps", ylim=(-5, 5))
plt.show()

# %% [markdown]
# ## The spread of the input
#
# A sigmoid distinguishes inputs between about -4 and 4. If all inputs are nearly equal, its
# output is a constant, and the layers before it receive almost no gradient.

# %%
for variant, name in NAMES.items():
    steps, accuracies, percentiles = runs[variant]
    spread = percentiles[:, 2] - percentiles[:, 0]
    for step in (0, 500, STEPS):
        index = steps.index(step)
        accuracy = accuracies[index]
        print(f"{name:10}  step {step:5,}: spread {spread[index]:.3f}, accuracy {accuracy:.1%}")

# %% [markdown]
# ## Growing learning rates
#
# BN makes the network insensitive to the scale of its weights, and tolerates learning rates that
# leave the other network at chance.

# %%
rates = [0.01, 0.1, 1.0, 10.0, 30.0]
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
for variant, name in NAMES.items():
    accuracies = [train_network(variant, rate, steps=500, every=250)[1][-1] for rate in rates]
    axis.semilogx(rates, accuracies, "o-", label=name)
axis.set(xlabel="learning rate", ylabel="test accuracy after 500 steps", ylim=(0, 1))
axis.legend()
plt.show()
