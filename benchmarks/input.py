"""Cost of the input pipeline: relative to a small network's step, and in images/s on photographs.

    python benchmarks/input.py [folder]

The folder may contain `tfds/mnist`, prepared by TFDS (otherwise the digits are used), and
`imagenet_manual` with ImageNet's archives, or a sample of them in the same layout. They are
prepared in a temporary folder; without them, the second part is skipped.
"""

import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tensorflow as tf
import tensorflow_datasets as tfds

from bn_keras.data import transforms
from bn_keras.data.pipeline import open_data
from bn_keras.training.config import default_config
from configs import mnist_bn

STEPS, ROUNDS = 500, 15
# Batches of 32 photographs; tf.data tunes itself during the warm-up.
WARM_UP_BATCHES, PHOTOGRAPH_BATCHES, PHOTOGRAPH_ROUNDS = 20, 40, 5
STRATEGY = tf.distribute.get_strategy()


def main(folder):
    time_small_network(folder)
    if (folder / "imagenet_manual").is_dir():
        with tempfile.TemporaryDirectory() as data_dir:
            time_photographs(folder / "imagenet_manual", data_dir)
    else:
        print("photographs: skipped, no folder with imagenet_manual was passed")


def time_small_network(folder):
    """Times a step of section 4.1's network on a constant batch and with the input pipeline."""
    config = mnist_bn.get_config().data.copy_and_resolve_references()
    if (folder / "tfds" / "mnist").is_dir():
        config.data_dir = str(folder / "tfds")
    else:
        config.update({"name": "digits", "validation_split": "validation"})
    data = open_data(config, seed=0)
    batches = iter(data.train_batches(STRATEGY, 60))
    train_step = make_mlp_step(data.input_shape)
    constant = next(batches)

    @tf.function
    def run_constant(steps):
        for _ in tf.range(steps):
            STRATEGY.run(train_step, args=constant)

    @tf.function
    def run_with_input(steps):
        for _ in tf.range(steps):
            STRATEGY.run(train_step, args=next(batches))

    # Interleaved, so that a slow phase of the machine affects both.
    seconds = {run_constant: [], run_with_input: []}
    for loop in seconds:
        loop(tf.constant(STEPS))
    for _ in range(ROUNDS):
        for loop, times in seconds.items():
            begin = time.perf_counter()
            loop(tf.constant(STEPS))
            times.append(time.perf_counter() - begin)
    print(f"{config.name}, batch 60, three layers of 100 sigmoids:")
    for name, times in zip(("constant batch", "with input"), seconds.values(), strict=True):
        print(f"{name:40}{1e6 * statistics.median(times) / STEPS:6.0f} us/step")
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    print(f"{'with input / constant':40}{ratio:6.2f}")


def make_mlp_step(input_shape):
    """Returns a training step in plain TensorFlow, fast enough for the input's cost to show."""
    sizes = [input_shape[0] * input_shape[1], 100, 100, 100, 10]
    kernels = [
        tf.Variable(tf.random.stateless_normal(shape, [0, 0]) * 0.05)
        for shape in zip(sizes, sizes[1:], strict=False)
    ]
    biases = [tf.Variable(tf.zeros([size])) for size in sizes[1:]]
    variables = kernels + biases
    velocities = [tf.Variable(tf.zeros_like(variable)) for variable in variables]
    total = tf.Variable(0.0)

    def step(images, labels):
        with tf.GradientTape() as tape:
            x = tf.reshape(images, [images.shape[0], -1])
            for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
                x = tf.sigmoid(x @ kernel + bias)
            logits = x @ kernels[-1] + biases[-1]
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, variables)
        for variable, velocity, gradient in zip(variables, velocities, gradients, strict=True):
            variable.assign_sub(0.01 * velocity.assign(0.9 * velocity + gradient))
        total.assign_add(loss)

    return step


def time_photographs(manual_dir, data_dir):
    """Times the input pipeline, with and without distortions, against a common hand-written one."""
    import keras_cv

    tfds.disable_progress_bar()
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    download = tfds.download.DownloadConfig(manual_dir=manual_dir, num_shards=4)
    builder.download_and_prepare(download_config=download)
    config = default_config().data.copy_and_resolve_references()
    config.update({"data_dir": data_dir, "shuffle": "examples"})
    plain = config.copy_and_resolve_references()
    plain.distortion = 0.0
    jitter = keras_cv.layers.RandomColorJitter((0, 255), 32 / 255, 0.5, (0.25, 0.75), 0.2)
    baseline = "decode_and_crop_jpeg + resize + flip"
    datasets = {
        "records only": hand_written_batches(builder, tf.strings.length),
        "decode_and_crop_jpeg": hand_written_batches(
            builder, lambda encoded: decode_crop(encoded)[0, 0]
        ),
        baseline: hand_written_batches(builder, resize_and_flip),
        "the same + keras_cv.RandomColorJitter": hand_written_batches(builder, resize_and_flip).map(
            lambda images, labels: (jitter(images, training=True), labels),
            num_parallel_calls=tf.data.AUTOTUNE,
        ),
        "bn_keras, no distortion": train_batches(plain),
        "bn_keras, full distortion": train_batches(config),
    }
    # Interleaved, as above.
    costs = {name: [] for name in datasets}
    for _ in range(PHOTOGRAPH_ROUNDS):
        for name, dataset in datasets.items():
            costs[name].append(seconds_per_image(dataset))
    print("photographs:                             images/s  ratio  CPU ms/image  ratio")
    for name, rounds in costs.items():
        columns = []
        for scale, ours, theirs in zip(
            (1, 1000), zip(*rounds, strict=True), zip(*costs[baseline], strict=True), strict=True
        ):
            cost = scale * statistics.median(ours)
            ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
            columns += [1 / cost if scale == 1 else cost, ratio]
        print("{:40}{:9.0f}{:7.2f}{:14.2f}{:7.2f}".format(name, *columns))


def seconds_per_image(dataset):
    """Returns wall-clock and CPU seconds per image of a warmed-up pipeline, with no network."""
    batches = iter(dataset)
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    begin = time.perf_counter(), time.process_time()
    for _ in range(PHOTOGRAPH_BATCHES):
        next(batches)
    end = time.perf_counter(), time.process_time()
    return [(e - b) / (PHOTOGRAPH_BATCHES * 32) for b, e in zip(begin, end, strict=True)]


def train_batches(config):
    return open_data(config, seed=0).train_batches(STRATEGY, 32)


def hand_written_batches(builder, transform):
    """Returns an input pipeline as commonly written by hand, with tf.data's defaults."""
    decoders = {"image": tfds.decode.SkipDecoding()}
    examples = builder.as_dataset(split="train", decoders=decoders, shuffle_files=True)
    examples = examples.shuffle(300).repeat()
    examples = examples.map(
        lambda example: (transform(example["image"]), example["label"]),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return examples.batch(32, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def decode_crop(encoded):
    height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(encoded))
    window = transforms.inception_windows(tf.random.uniform([1, 4]), height, width)[0]
    return tf.io.decode_and_crop_jpeg(encoded, window, channels=3)


def resize_and_flip(encoded):
    return tf.image.random_flip_left_right(tf.image.resize(decode_crop(encoded), (224, 224)))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "."))
