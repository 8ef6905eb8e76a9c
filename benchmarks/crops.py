"""Evaluation with GoogLeNet's 144 crops of photographs, against the network alone.

Both call BN-Inception at full width in float32 with batches of the same size. One is a complete
evaluation: it reads records, decodes and resizes JPEGs, cuts the crops, averages probabilities and
counts hits. The other calls the network repeatedly on one batch.

    python benchmarks/crops.py [folder]

The folder must contain `imagenet_manual` with ImageNet's archives, or a sample of them in the same
layout. They are prepared in a temporary folder.
"""

import os
import pathlib
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tensorflow as tf
import tensorflow_datasets as tfds
from _timing import compare

from bn_keras.data.multi_crop import Crops
from bn_keras.data.pipeline import open_data
from bn_keras.models import BNInception
from bn_keras.training.evaluator import Evaluator
from configs import bn_x30

CROPS = Crops.parse("144")
BATCH_SIZE, IMAGES, ROUNDS = 36, 4, 3
TARGET = 0.9


def main(folder):
    if not (folder / "imagenet_manual").is_dir():
        print("144 crops: skipped, no folder with imagenet_manual was passed")
        return
    model = BNInception("bn_x30")
    batches = IMAGES * CROPS.count // BATCH_SIZE
    with tempfile.TemporaryDirectory() as data_dir:
        data = open_photographs(folder / "imagenet_manual", data_dir)
        strategy = tf.distribute.get_strategy()
        functions = {
            "network": make_network_loop(model, batches),
            "144 crops": Evaluator([model], data, strategy, BATCH_SIZE, CROPS),
        }
        times = compare(functions, rounds=ROUNDS, block=1)
    for name, milliseconds in times.items():
        print(f"{name:12}{1e3 * IMAGES * CROPS.count / milliseconds:8.1f} crops/s")
    ratio = times["network"] / times["144 crops"]
    print(f"{'ratio':12}{ratio:8.3f} (target: at least {TARGET})")
    sys.exit(ratio < TARGET)


def make_network_loop(model, batches):
    """Returns a function that calls the network on one batch, again and again."""
    images = tf.random.stateless_uniform([BATCH_SIZE, *model.input.shape[1:]], [0, 0], -1, 1)
    network = tf.function(lambda: model(images, training=False))

    def loop():
        for _ in range(batches):
            network().numpy()

    return loop


def open_photographs(manual_dir, data_dir):
    tfds.disable_progress_bar()
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    download = tfds.download.DownloadConfig(manual_dir=manual_dir, num_shards=1)
    builder.download_and_prepare(download_config=download)
    config = bn_x30.get_config().data.copy_and_resolve_references()
    config.update({"data_dir": data_dir, "validation_split": f"validation[:{IMAGES}]"})
    return open_data(config, seed=0)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "."))
