"""ImageNet (ILSVRC 2012) from its official archives."""

import contextlib
import os
import sys
import tarfile

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from bn_keras.data.unreadable import first_line
from bn_keras.errors import UsageError

# Of training and validation. image-net.org gives them to those who register there.
ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def prepare_imagenet(manual_dir: str | os.PathLike, data_dir: str | os.PathLike = "") -> str:
    """Turns the archives into TFDS's imagenet2012; does nothing where that is there already.

    The whole of it takes some hours and 150 GB beside the archives, which may go afterwards.

    Args:
      manual_dir: the folder of the archives.
      data_dir: of prepared TFDS sets, as config.data.data_dir; "" is TFDS's default.

    Returns:
      The folder of the prepared set.

    Raises:
      UsageError: an archive is missing or damaged, or the set can't be written.
    """
    builder = tfds.builder("imagenet2012", data_dir=data_dir or None, try_gcs=False)
    if tf.io.gfile.exists(os.path.join(builder.data_dir, "dataset_info.json")):
        logging.info("imagenet2012 is prepared already")
        return str(builder.data_dir)
    manual_dir = os.fspath(manual_dir)
    missing = [name for name in ARCHIVES if not tf.io.gfile.exists(os.path.join(manual_dir, name))]
    if missing:
        raise UsageError(
            f"no {' and no '.join(missing)} in {manual_dir!r}: register at"
            " https://image-net.org/download-images, and put both archives of ILSVRC 2012 there as"
            " they are"
        )
    try:
        # It prints what it is about to do; standard output is for results.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
            )
    except (OSError, tarfile.TarError, tf.errors.OpError) as error:
        raise UsageError(
            f"imagenet2012 could not be prepared in {builder.data_dir} ({first_line(error)}): see"
            " whether the archives are whole and the disk has room"
        ) from error
    return str(builder.data_dir)
