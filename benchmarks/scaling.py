"""Estimated images/s of BN-Inception on devices that it has not been run on.

    python benchmarks/scaling.py [--measure]

Prints the tables of docs/scaling.md, which explains the model. A layer takes as long as its
multiply-adds or its memory traffic, whichever takes longer. The peak rates of devices and links are
published; the fraction of them that a step reaches is assumed, once conservatively and once
optimistically. --measure instead predicts the time of a step on this machine's CPU and measures it.
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


class Devices(NamedTuple):
    """Several equal devices and the links between them.

    Attributes:
      number: number of devices.
      flops: peak FLOP/s of a device, dense bfloat16.
      memory: peak bytes/s of its memory.
      tile: number of channels that its matrix unit processes at a time.
      links: bytes/s that a device sends in an all-reduce of large arrays, lower and upper estimate.
      latency: seconds that an all-reduce of a few bytes takes, lower and upper estimate.
      cores: virtual cores of all hosts.
    """

    number: int
    flops: float
    memory: float
    tile: int = 1
    links: tuple[float, float] = (float("inf"), float("inf"))
    latency: tuple[float, float] = (0.0, 0.0)
    cores: int = 0


class Assumptions(NamedTuple):
    """Fractions of the peak rates that a step reaches.

    Attributes:
      optimistic: whether to use the better of a device's two estimates.
      flops, memory: fraction of the peak.
      fused: whether operations other than products pass over memory as rarely as a good compiler
        can achieve.
      tiled: whether channels that do not fill a tile take as long as a full tile.
    """

    optimistic: bool
    flops: float
    memory: float
    fused: bool
    tiled: bool


OPTIMISTIC = Assumptions(optimistic=True, flops=0.6, memory=0.9, fused=True, tiled=False)
CONSERVATIVE = Assumptions(optimistic=False, flops=0.35, memory=0.7, fused=False, tiled=True)

V5E = dict(flops=197e12, memory=819e9, tile=128)
# docs/scaling.md lists the sources of these numbers.
DEVICES = {
    # 2x4 chips have no wrap-around links: at worst, one direction of one axis is busy at a time.
    "v5e-8": Devices(8, **V5E, links=(5e10, 1e11), latency=(5e-6, 15e-6), cores=224),
    "v5e-256": Devices(256, **V5E, links=(1e11, 2e11), latency=(16e-6, 45e-6), cores=7168),
    "8 x H100": Devices(
        8, 989e12, 3.35e12, tile=64, links=(3e11, 4.5e11), latency=(10e-6, 50e-6), cores=208
    ),
}
# Published training speeds of ResNet-50, to compare the estimates with: devices, images per device
# and step, images/s.
PUBLISHED = {
    "TPU v3, 256 chips, 32,768 images per step": (
        Devices(256, 123e12, 900e9, tile=128, links=(7e10, 1.4e11), latency=(16e-6, 45e-6)),
        128,
        480_000,
    ),
    "8 x H100, 3,264 images per step": (DEVICES["8 x H100"], 408, 1_281_167 * 35 / (13.466 * 60)),
}
IMAGES_PER_REPLICA = (32, 128)
PAPER_STEPS = {"6e6 paper steps": 6e6, "BN-x5's 2.1e6": 2.1e6}
# Photographs per second and core, decoded, cropped and fully distorted: benchmarks/input.py
# measures 2.4 ms each.
IMAGES_PER_SECOND_AND_CORE = 415

# Number of passes of a training step over memory: (over a layer's input and its gradient, over its
# output and its gradient).
_PASSES = {
    # Input: read for the statistics, for y, for the two sums of the backward pass and for dx; dx is
    # written. Output: y is written; dy is read for the sums and for dx.
    "BatchNormalization": (5, 3),
    "Activation": (2, 3),
    "MaxPooling2D": (3, 3),
    "AveragePooling2D": (2, 2),
    "GlobalAveragePooling2D": (2, 2),
    "Concatenate": (2, 2),
    "Add": (2, 2),
    "ZeroPadding2D": (2, 2),
}
# With a compiler that computes statistics and sums while the tensors are produced, and fuses
# nonlinearity, concatenation and padding into other writes.
_FUSED_PASSES = _PASSES | {
    "BatchNormalization": (4, 2),
    "Activation": (0, 0),
    "Concatenate": (0, 0),
    "Add": (0, 0),
    "ZeroPadding2D": (0, 0),
}
# Input: read for y and for the weights' gradient; dx is written. Output: y is written; dy is read
# for each of the two gradients.
_PRODUCT_PASSES = (3, 3)
# The optimizer reads weight, gradient and momentum and writes two of them, float32.
_OPTIMIZER_BYTES = 5 * 4


def step_seconds(
    network: cost.Cost, images: int, devices: Devices, assumed: Assumptions, itemsize: int = 2
) -> float:
    """Computes the time of a step on one device, without communication.

    Args:
      network: cost of the network.
      images: images per device.
      devices: their peak rates.
      assumed: fractions of the peak rates.
      itemsize: bytes per activation.
    """
    layers = sum(
        _layer_seconds(layer, images, devices, assumed, itemsize) for layer in network.layers
    )
    return layers + network.trainable * _OPTIMIZER_BYTES / (devices.memory * assumed.memory)


def _layer_seconds(layer, images, devices, assumed, itemsize):
    inputs = sum(map(math.prod, layer.input_shapes))
    outputs = math.prod(layer.output_shape)
    passes = (_FUSED_PASSES if assumed.fused else _PASSES).get(layer.kind, (0, 0))
    if layer.multiply_adds:
        passes = _PRODUCT_PASSES
    num_bytes = images * itemsize * (passes[0] * inputs + passes[1] * outputs)
    # The backward pass has one product for the weights' gradient and one for the input's.
    flops = 3 * 2 * layer.multiply_adds * images
    if assumed.tiled and layer.multiply_adds:
        # Each output sums over the input channels and the kernel's window.
        flops /= _filled_fraction(layer.multiply_adds / outputs, devices.tile)
        flops /= _filled_fraction(layer.output_shape[-1], devices.tile)
    return max(
        flops / (devices.flops * assumed.flops), num_bytes / (devices.memory * assumed.memory)
    )


def _filled_fraction(size, tile):
    return size / (math.ceil(size / tile) * tile)


def all_reduce_seconds(num_bytes: float, devices: Devices, assumed: Assumptions) -> float:
    """Computes the time of one all-reduce over all devices."""
    links, latency = devices.links[assumed.optimistic], devices.latency[not assumed.optimistic]
    return latency + 2 * (devices.number - 1) / devices.number * num_bytes / links


def synchronization_seconds(network: cost.Cost, devices: Devices, assumed: Assumptions) -> float:
    """Computes the time that synchronized BN adds to a step: two sequential collectives per layer.

    Each replica fills its own row of a table with a row for each replica, which makes the sum
    exact. A row has count, mean and variance in the forward pass, and two sums in the backward
    pass, float32.
    """
    channels = [layer.output_shape[-1] for layer in network.layers if _is_batch_norm(layer)]
    rows = [n for c in channels for n in (2 * c + 1, 2 * c)]
    return sum(all_reduce_seconds(4 * devices.number * row, devices, assumed) for row in rows)


def _is_batch_norm(layer):
    return layer.kind == "BatchNormalization"


class Speed(NamedTuple):
    """Images/s of all devices together, and the seconds of each part of a step."""

    images_per_second: float
    step: float
    gradients: float
    synchronization: float

    @property
    def synchronized_images_per_second(self) -> float:
        """Images/s with synchronized BN."""
        unsynchronized = self.step + self.gradients
        return self.images_per_second * unsynchronized / (unsynchronized + self.synchronization)


def estimate_speed(
    network: cost.Cost, images: int, devices: Devices, assumed: Assumptions
) -> Speed:
    """Estimates the speed with this many images per device; the parts of a step do not overlap."""
    step = step_seconds(network, images, devices, assumed)
    gradients = all_reduce_seconds(4 * network.trainable, devices, assumed)
    synchronization = synchronization_seconds(network, devices, assumed)
    return Speed(devices.number * images / (step + gradients), step, gradients, synchronization)


def main():
    network = cost.count_cost(BNInception("bn_x30"))
    batch_norms = sum(map(_is_batch_norm, network.layers))
    print(
        f"BN-x30: {network.trainable:,} parameters, {network.multiply_adds / 1e9:.2f} G"
        f" multiply-adds per image,\n{batch_norms} BN layers, {2 * batch_norms} collectives per"
        " step if they are synchronized.\n"
    )
    _print_table(
        [
            "devices",
            "images per step",
            "images/s",
            *(f"time for {name}" for name in PAPER_STEPS),
            "cores for the input",
            "time per step",
            "synchronized BN adds",
            "images/s with it",
            "time for 6e6 with it",
        ],
        [
            _row(network, name, devices, images)
            for name, devices in DEVICES.items()
            for images in IMAGES_PER_REPLICA
        ],
    )
    print("\nThe same model, and published speeds of ResNet-50:\n")
    resnet = cost.count_cost(keras.applications.ResNet50(weights=None))
    rows = []
    for name, (devices, images, published) in PUBLISHED.items():
        low, high = _speeds(resnet, images, devices)
        images_per_second = _range(low.images_per_second, high.images_per_second)
        rows.append([name, images_per_second, _rounded(published)])
    _print_table(["devices", "images/s, estimated", "images/s, published"], rows)


def _speeds(network, images, devices):
    return [estimate_speed(network, images, devices, a) for a in (CONSERVATIVE, OPTIMISTIC)]


def _row(network, name, devices, images):
    low, high = _speeds(network, images, devices)
    cores = [s.images_per_second / IMAGES_PER_SECOND_AND_CORE for s in (low, high)]
    examples = 6e6 * PAPER_BATCH_SIZE
    return [
        name,
        f"{devices.number} x {images} = {devices.number * images:,}",
        _range(low.images_per_second, high.images_per_second),
        *(
            _duration(*(steps * PAPER_BATCH_SIZE / s.images_per_second for s in (high, low)))
            for steps in PAPER_STEPS.values()
        ),
        f"{_range(*cores)} of {devices.cores:,}",
        f"{_range(*(1e3 * (s.step + s.gradients) for s in (high, low)))} ms",
        f"{_range(*(1e3 * s.synchronization for s in (high, low)))} ms",
        _range(low.synchronized_images_per_second, high.synchronized_images_per_second),
        _duration(*(examples / s.synchronized_images_per_second for s in (high, low))),
    ]


def _print_table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def _rounded(number):
    """Formats a number with two digits, which is more than the model knows."""
    digits = 1 - math.floor(math.log10(number))
    return f"{round(number, digits):,.{max(0, digits)}f}"


def _range(low, high):
    return f"{_rounded(low)}-{_rounded(high)}"


def _duration(low, high):
    unit, seconds = ("h", 3600) if high > 2 * 3600 else ("min", 60)
    return f"{_range(low / seconds, high / seconds)} {unit}"


def measure():
    """Prints the predicted and the measured time of a step on this machine's CPU."""
    square, long = tf.random.normal([2048, 2048]), tf.random.normal([2**26])
    milliseconds = compare({"product": lambda: square @ square, "copy": lambda: long + 1})
    devices = Devices(
        1,
        flops=2 * 2048**3 / milliseconds["product"] * 1e3,
        memory=2 * 4 * 2**26 / milliseconds["copy"] * 1e3,
        tile=16,
    )
    config = inception_config()
    network = cost.count_cost(BNInception(config.model.variant))
    images, steps = config.train.global_batch_size, 5
    low, high = (
        step_seconds(network, images, devices, assumed, itemsize=4)
        for assumed in (OPTIMISTIC, CONSERVATIVE)
    )
    loop, _ = make_bare_loop(config)
    seconds = statistics.median(seconds_of(lambda: loop(tf.constant(steps))) for _ in range(5))
    print(
        f"this CPU: {devices.flops / 1e9:.0f} GFLOP/s in a product, {devices.memory / 1e9:.0f} GB/s"
        f" in a copy; a step of {images} images in float32: {low:.2f}-{high:.2f} s predicted,"
        f" {seconds / steps:.2f} s measured"
    )


if __name__ == "__main__":
    measure() if "--measure" in sys.argv[1:] else main()
