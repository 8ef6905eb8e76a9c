"""Scaling on paper: images/s of BN-Inception on devices that nobody here has run it on.

    python benchmarks/scaling.py [--measure]

prints the tables of docs/scaling.md, where the model is explained. Each layer takes as long as
its multiply-adds or its bytes, whichever is longer; what devices and links can do is published,
what share of it is reached is assumed, once boldly and once cautiously. With --measure the same
model predicts a step on this machine's CPU instead, and the step is measured.
"""

import math
import os
import pathlib
import statistics
import sys
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import keras
import tensorflow as tf
from _timing import compare
from trainer import inception_config, make_bare_loop, seconds_of

from bn_keras import BNInception, cost
from bn_keras.training.schedule import PAPER_BATCH_SIZE


class Device(NamedTuple):
    """One of several alike, and what joins them.

    Attributes:
      flops: peak FLOP/s, dense bfloat16.
      memory: peak bytes/s.
      tile: channels of a convolution are worked on so many at a time.
      links: bytes/s that a device sends into an all-reduce of large arrays, at worst and at best.
      latency: seconds of an all-reduce of a few bytes, at best and at worst.
      cores: virtual cores of all hosts.
    """

    count: int
    flops: float
    memory: float
    tile: int = 1
    links: tuple[float, float] = (float("inf"), float("inf"))
    latency: tuple[float, float] = (0.0, 0.0)
    cores: int = 0


class Assumptions(NamedTuple):
    """What share of the peaks is reached.

    Attributes:
      bold: which of a device's two figures to take.
      flops, memory: share of the peak.
      fused: whether what is not a product passes over memory as seldom as a compiler can make it.
      tiled: whether channels that don't fill a tile take as long as those that do.
    """

    bold: bool
    flops: float
    memory: float
    fused: bool
    tiled: bool


BOLD = Assumptions(bold=True, flops=0.6, memory=0.9, fused=True, tiled=False)
CAUTIOUS = Assumptions(bold=False, flops=0.35, memory=0.7, fused=False, tiled=True)

V5E = dict(flops=197e12, memory=819e9, tile=128)
# Where each number comes from stands in docs/scaling.md.
DEVICES = {
    # 2x4 has no wrap-around links: at worst one direction of one axis is busy at a time.
    "v5e-8": Device(8, **V5E, links=(5e10, 1e11), latency=(5e-6, 15e-6), cores=224),
    "v5e-256": Device(256, **V5E, links=(1e11, 2e11), latency=(16e-6, 45e-6), cores=7168),
    "8 x H100": Device(
        8, 989e12, 3.35e12, tile=64, links=(3e11, 4.5e11), latency=(10e-6, 50e-6), cores=208
    ),
}
# Published training speeds of ResNet-50 that the same model is held against.
PUBLISHED = {
    "TPU v3, 256 chips, 32,768 images a step": (
        Device(256, 123e12, 900e9, tile=128, links=(7e10, 1.4e11), latency=(16e-6, 45e-6)),
        128,
        480_000,
    ),
    "8 x H100, 3,264 images a step": (DEVICES["8 x H100"], 408, 1_281_167 * 35 / (13.466 * 60)),
}
IMAGES_PER_REPLICA = (32, 128)
PAPER_STEPS = {"6e6 paper steps": 6e6, "BN-x5's 2.1e6": 2.1e6}
# Of photographs decoded, cropped and fully distorted: 1.7 ms of a core, by benchmarks/input.py.
IMAGES_PER_CORE = 590

# How often a training step passes over a layer's input and its gradient, and over its output and
# its gradient, in memory.
_PASSES = {
    # Reads x for the statistics, for y, for the two sums of the backward pass and for x's gradient,
    # and writes that; writes y, and reads its gradient for the sums and for x's.
    "BatchNormalization": (5, 3),
    "Activation": (2, 3),
    "MaxPooling2D": (3, 3),
    "AveragePooling2D": (2, 2),
    "GlobalAveragePooling2D": (2, 2),
    "Concatenate": (2, 2),
    "Add": (2, 2),
    "ZeroPadding2D": (2, 2),
}
# The same where the compiler takes statistics and sums as the tensors are made, and lets the
# nonlinearity, the concatenation and the padding go along with what is written anyway.
_FUSED_PASSES = _PASSES | {
    "BatchNormalization": (4, 2),
    "Activation": (0, 0),
    "Concatenate": (0, 0),
    "Add": (0, 0),
    "ZeroPadding2D": (0, 0),
}
# Reads x, and again for the weights' gradient, and writes x's; writes y, and reads its gradient for
# each of the two.
_PRODUCT_PASSES = (3, 3)
# The optimizer reads weight, gradient and momentum and writes two of them, float32.
_OPTIMIZER_BYTES = 5 * 4


def step_seconds(
    network: cost.Cost, images: int, device: Device, assumed: Assumptions, itemsize: int = 2
) -> float:
    """Gives the time of a step on one device alone.

    Args:
      network: of what.
      images: of the device's part of the batch.
      device: whose peaks.
      assumed: which share of them.
      itemsize: bytes of an activation.
    """
    layers = sum(
        _layer_seconds(layer, images, device, assumed, itemsize) for layer in network.layers
    )
    return layers + network.trainable * _OPTIMIZER_BYTES / (device.memory * assumed.memory)


def _layer_seconds(layer, images, device, assumed, itemsize):
    inputs = sum(map(math.prod, layer.input_shapes))
    outputs = math.prod(layer.output_shape)
    passes = (_FUSED_PASSES if assumed.fused else _PASSES).get(layer.kind, (0, 0))
    if layer.multiply_adds:
        passes = _PRODUCT_PASSES
    moved = images * itemsize * (passes[0] * inputs + passes[1] * outputs)
    # The backward pass has a product for the weights' gradient and one for the input's.
    flops = 3 * 2 * layer.multiply_adds * images
    if assumed.tiled and layer.multiply_adds:
        # An output is a sum over the channels in and the kernel's window.
        flops /= _filled(layer.multiply_adds / outputs, device.tile)
        flops /= _filled(layer.output_shape[-1], device.tile)
    return max(flops / (device.flops * assumed.flops), moved / (device.memory * assumed.memory))


def _filled(size, tile):
    return size / (math.ceil(size / tile) * tile)


def all_reduce_seconds(num_bytes: float, device: Device, assumed: Assumptions) -> float:
    """Gives the time of one all-reduce over all devices."""
    links, latency = device.links[assumed.bold], device.latency[not assumed.bold]
    return latency + 2 * (device.count - 1) / device.count * num_bytes / links


def synchronization_seconds(network: cost.Cost, device: Device, assumed: Assumptions) -> float:
    """Gives what synchronized BN adds to a step: two collectives a layer, one after the other.

    Each replica fills in its own row of a table with one row for each of them, so that the sum is
    exact: count, mean and variance forward, two sums backward, float32.
    """
    channels = [layer.output_shape[-1] for layer in network.layers if _is_batch_norm(layer)]
    rows = [n for c in channels for n in (2 * c + 1, 2 * c)]
    return sum(all_reduce_seconds(4 * device.count * row, device, assumed) for row in rows)


def _is_batch_norm(layer):
    return layer.kind == "BatchNormalization"


class Speed(NamedTuple):
    """Images/s of all devices together, and of that step the parts in seconds."""

    images: float
    step: float
    gradients: float
    synchronization: float

    @property
    def synchronized_images(self) -> float:
        """Images/s with synchronized BN."""
        before = self.step + self.gradients
        return self.images * before / (before + self.synchronization)


def speed(network: cost.Cost, images: int, device: Device, assumed: Assumptions) -> Speed:
    """Gives the speed of a step of images on each device, nothing of which overlaps."""
    step = step_seconds(network, images, device, assumed)
    gradients = all_reduce_seconds(4 * network.trainable, device, assumed)
    synchronization = synchronization_seconds(network, device, assumed)
    return Speed(device.count * images / (step + gradients), step, gradients, synchronization)


def main():
    network = cost.count_cost(BNInception("bn_x30"))
    batch_norms = sum(map(_is_batch_norm, network.layers))
    print(
        f"BN-x30: {network.trainable:,} parameters, {network.multiply_adds / 1e9:.2f} G"
        f" multiply-adds an image,\n{batch_norms} layers of BN, {2 * batch_norms} collectives a"
        " step where they are synchronized.\n"
    )
    _print_table(
        [
            "devices",
            "images a step",
            "images/s",
            *(f"{name} take" for name in PAPER_STEPS),
            "cores for the input",
            "synchronized BN adds",
            "images/s then",
            "6e6 then take",
        ],
        [
            _row(network, name, device, images)
            for name, device in DEVICES.items()
            for images in IMAGES_PER_REPLICA
        ],
    )
    print("\nThe same model and published speeds of ResNet-50:\n")
    resnet = cost.count_cost(keras.applications.ResNet50(weights=None))
    rows = []
    for name, (device, images, published) in PUBLISHED.items():
        low, high = (speed(resnet, images, device, a) for a in (CAUTIOUS, BOLD))
        rows.append([name, _range(low.images, high.images), _rounded(published)])
    _print_table(["devices", "images/s by the model", "published"], rows)


def _row(network, name, device, images):
    low, high = (speed(network, images, device, a) for a in (CAUTIOUS, BOLD))
    before = (high.step + high.gradients, low.step + low.gradients)
    added = (high.synchronization, low.synchronization)
    return [
        name,
        f"{device.count} x {images} = {device.count * images:,}",
        _range(low.images, high.images),
        *(
            _duration(*(steps * PAPER_BATCH_SIZE / s.images for s in (high, low)))
            for steps in PAPER_STEPS.values()
        ),
        f"{_range(*(s.images / IMAGES_PER_CORE for s in (low, high)))} of {device.cores:,}",
        f"{_range(*(1e3 * s for s in added))} ms to {_range(*(1e3 * s for s in before))}",
        _range(low.synchronized_images, high.synchronized_images),
        _duration(*(6e6 * PAPER_BATCH_SIZE / s.synchronized_images for s in (high, low))),
    ]


def _print_table(heads, rows):
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def _rounded(number):
    """Two digits are more than is known."""
    digits = 1 - math.floor(math.log10(number))
    return f"{round(number, digits):,.{max(0, digits)}f}"


def _range(low, high):
    return f"{_rounded(low)}-{_rounded(high)}"


def _duration(low, high):
    unit, seconds = ("h", 3600) if high > 2 * 3600 else ("min", 60)
    return f"{_range(low / seconds, high / seconds)} {unit}"


def measure():
    """A step on this machine's CPU, by the model and by the clock."""
    square, long = tf.random.normal([2048, 2048]), tf.random.normal([2**26])
    milliseconds = compare({"product": lambda: square @ square, "copy": lambda: long + 1})
    device = Device(
        1,
        flops=2 * 2048**3 / milliseconds["product"] * 1e3,
        memory=2 * 4 * 2**26 / milliseconds["copy"] * 1e3,
        tile=16,
    )
    config = inception_config()
    network = cost.count_cost(BNInception(config.model.variant))
    images, steps = config.train.global_batch_size, 5
    low, high = (
        step_seconds(network, images, device, assumed, itemsize=4) for assumed in (BOLD, CAUTIOUS)
    )
    loop, _ = make_bare_loop(config)
    seconds = statistics.median(seconds_of(lambda: loop(tf.constant(steps))) for _ in range(5))
    print(
        f"this CPU: {device.flops / 1e9:.0f} GFLOP/s in a product, {device.memory / 1e9:.0f} GB/s"
        f" in a copy; a step of {images} images in float32 takes {low:.2f}-{high:.2f} s by the"
        f" model, {seconds / steps:.2f} s by the clock"
    )


if __name__ == "__main__":
    measure() if "--measure" in sys.argv[1:] else main()
