"""Predicts the classes of image files: one at a time, or many in batches."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import tensorflow as tf
from absl import logging

from bn_keras import storage
from bn_keras.cores import num_usable_cores
from bn_keras.data.folder_walk import EXTENSIONS, log_ignored, walk_folder
from bn_keras.data.multi_crop import SINGLE_CROP, CropPreprocessing, Crops
from bn_keras.data.single_image import read_encoded, reporting_undecodable
from bn_keras.errors import BucketUnavailableError, StorageError, UsageError
from bn_keras.inference.loading import TrainedNetwork, describe_statistics, load_trained
from bn_keras.storage import AnyPath, read_text, reading
from bn_keras.training.evaluator import make_scorer

# Largest number of crops that a network is called with.
_MAX_BATCH_SIZE = 36


class Prediction(NamedTuple):
    """A class and its predicted probability."""

    class_name: str
    probability: float


class ImagePrediction(NamedTuple):
    """The predictions for one image.

    Attributes:
      path: path of the image, as given.
      classes: the most probable classes in descending order; empty if the image is unreadable.
      error: why the image is unreadable; "" if it is not.
    """

    path: str
    classes: list[Prediction]
    error: str = ""


class Predictor:
    """Predicts the classes of images; built by `make_predictor`.

    Attributes:
      class_names: name of each class, in the order of the logits.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        channels: int,
        preprocessing: CropPreprocessing,
        score: Callable[[tf.Tensor | tuple[tf.Tensor, ...]], tf.Tensor],
        top_k: int,
    ) -> None:
        self.class_names = tuple(class_names)
        self._batch_size = max(1, _MAX_BATCH_SIZE // preprocessing.crops.count)
        self._read = tf.function(
            lambda encoded: preprocessing.process_encoded(encoded, None, channels),
            autograph=False,
            input_signature=[tf.TensorSpec([], tf.string)],
        )
        top_k = min(top_k or len(class_names), len(class_names))

        @tf.function(autograph=False)
        def most_probable(images: list[tf.Tensor | tuple[tf.Tensor, ...]]) -> tuple[tf.Tensor, ...]:
            batch = tf.nest.map_structure(lambda *each: tf.stack(each), *images)
            # The last row belongs to the ensemble or to the only network.
            return tf.nn.top_k(tf.exp(score(batch)[-1]), top_k)

        self._most_probable = most_probable

    def __call__(self, path: AnyPath) -> list[Prediction]:
        """Returns the most probable classes of an image.

        Raises:
          UsageError: the file does not exist or is not a complete image.
          BucketUnavailableError: it is in a bucket that does not answer.
        """
        return self._predict([self._open(path)])[0]

    def predict_all(self, paths: Iterable[AnyPath]) -> Iterator[ImagePrediction]:
        """Yields the predictions for images, in order; unreadable ones do not end the iteration.

        Images are read in parallel and predicted in batches.

        Args:
          paths: paths of the images, local or in a bucket.

        Raises:
          BucketUnavailableError: an image is in a bucket that does not answer.
        """
        names = [os.fspath(path) for path in paths]
        with ThreadPoolExecutor(num_usable_cores()) as pool:
            for start in range(0, len(names), self._batch_size):
                chunk = names[start : start + self._batch_size]
                opened = list(pool.map(self._try_open, chunk))
                images = [image for image, error in opened if not error]
                # Always the same batch size, so that the graph is built once.
                padded = images + images[-1:] * (self._batch_size - len(images))
                predicted = iter(self._predict(padded) if images else [])
                for path, (_, error) in zip(chunk, opened, strict=True):
                    yield ImagePrediction(path, [] if error else next(predicted), error)

    def _open(self, path: AnyPath) -> tf.Tensor | tuple[tf.Tensor, ...]:
        encoded = read_encoded(path)
        with reporting_undecodable(path, encoded):
            return self._read(encoded)

    def _try_open(self, path: str) -> tuple[tf.Tensor | tuple[tf.Tensor, ...] | None, str]:
        """Returns the network's input, or None and the reason why the image is unreadable."""
        try:
            return self._open(path), ""
        except BucketUnavailableError:
            # Each further image would take minutes.
            raise
        except (UsageError, StorageError) as error:
            return None, str(error)

    def _predict(
        self, images: Sequence[tf.Tensor | tuple[tf.Tensor, ...]]
    ) -> list[list[Prediction]]:
        probabilities, classes = self._most_probable(list(images))
        return [
            [
                Prediction(self.class_names[number], float(probability))
                for probability, number in zip(*row, strict=True)
            ]
            for row in zip(probabilities.numpy(), classes.numpy(), strict=True)
        ]


def make_predictor(
    workdirs: Sequence[str | os.PathLike],
    crops: Crops = SINGLE_CROP,
    top_k: int = 5,
    best: bool = False,
) -> Predictor:
    """Builds a function that predicts the class of an image.

    Its probabilities are the mean over all networks and crops.

    Args:
      workdirs: folders of the runs whose networks predict; see `load_trained`.
      crops: crops of each image.
      top_k: number of most probable classes to return, or all if there are fewer; 0 for all.
      best: whether to use the network of each run's best evaluation; see `load_trained`.

    Returns:
      A function from the path of an image to its most probable classes, in descending order.

    Raises:
      UsageError: no network in a workdir, networks with different classes or preprocessing, or
        crops that the network's input does not allow.
      StorageError: a checkpoint cannot be read.
    """
    if top_k < 0:
        raise UsageError(f"top_k={top_k} is invalid: expected a positive integer, or 0 for all")
    if isinstance(workdirs, str | os.PathLike):
        workdirs = [workdirs]
    if not workdirs:
        raise UsageError("workdirs is empty: expected the folder of at least one run")
    networks = [load_trained(workdir, best=best) for workdir in workdirs]
    first = networks[0]

    def kind(network: TrainedNetwork) -> tuple[object, ...]:
        preprocessing = network.preprocessing
        # Several crops are cut from whole images, whatever data.crop is.
        crop = preprocessing.crop if crops.count == 1 else None
        return network.class_names, network.input_shape, preprocessing.binary, crop

    for workdir, network in zip(workdirs, networks, strict=True):
        statistics = describe_statistics(network.statistics)
        logging.info("%s: step %d, %s", workdir, network.step, statistics)
        if kind(network) != kind(first):
            raise UsageError(
                f"the network in {workdir} differs from that in {workdirs[0]} in its classes or its"
                " preprocessing: predict with each network alone"
            )
    preprocessing = CropPreprocessing(first.preprocessing, crops)
    score = make_scorer([network.model for network in networks], preprocessing, _MAX_BATCH_SIZE)
    return Predictor(first.class_names, first.input_shape[-1], preprocessing, score, top_k)


def find_images(paths: Iterable[AnyPath], lists: Iterable[AnyPath] = ()) -> list[str]:
    """Returns the paths of images: files, the images below folders, and the lines of lists.

    Args:
      paths: files and folders, local or in a bucket. Of a folder, all visible files with an image's
        extension are returned, in sorted order; each folder is visited once.
      lists: text files with one path per line, relative to the current folder.

    Raises:
      UsageError: a folder without images, or a list that does not exist or is not UTF-8.
      StorageError: a list or a folder cannot be read.
    """
    found: list[str] = []
    for path in [os.fspath(path) for path in paths]:
        if not storage.is_folder(path):
            found.append(path)
            continue
        with reading(path):
            contents = walk_folder(path)
        images = contents.images
        log_ignored(path, [contents])
        if not images:
            raise UsageError(
                f"folder {path} has no images: expected files ending in {', '.join(EXTENSIONS)}"
            )
        found += [image.path for image in images]
    for path in [os.fspath(path) for path in lists]:
        text = read_text(path, "list", "a file with one path per line")
        # Not splitlines, which also splits at characters that a name may contain.
        found += [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]
    return found
