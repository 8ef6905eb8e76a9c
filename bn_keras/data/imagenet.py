"""ImageNet (ILSVRC 2012) from its official archives."""

import contextlib
import os
import sys
import tarfile

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from bn_keras import storage
from bn_keras.errors import StorageError, UsageError
from bn_keras.text import first_line

# Training and validation images, available from image-net.org after registration.
ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def prepare_imagenet(manual_dir: str | os.PathLike, data_dir: str | os.PathLike = "") -> str:
    """Converts the archives to TFDS's imagenet2012; does nothing if it is already prepared.

    The full set takes a few hours and 156 GB in addition to the archives, which may be deleted
    afterwards.

    Args:
      manual_dir: folder of the archives.
      data_dir: folder of prepared TFDS sets, as config.data.data_dir; "" is TFDS's default.

    Returns:
      The folder of the prepared set.

    Raises:
      UsageError: an archive is missing or damaged.
      StorageError: the archives cannot be read, or the set cannot be written.
    """
    builder = tfds.builder("imagenet2012", data_dir=data_dir or None, try_gcs=False)
    if storage.exists(os.path.join(builder.data_dir, "dataset_info.json")):
        logging.info("imagenet2012 is already prepared")
        return str(builder.data_dir)
    manual_dir = os.fspath(manual_dir)
    missing = [name for name in ARCHIVES if not storage.exists(os.path.join(manual_dir, name))]
    if missing:
        raise UsageError(
            f"no {' and no '.join(missing)} in {manual_dir!r}: register at"
            " https://image-net.org/download-images, and put both archives of ILSVRC 2012 there"
            " without unpacking them"
        )
    try:
        # TFDS prints its progress; standard output is for results.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
            )
    except tarfile.TarError as error:
        raise UsageError(
            f"imagenet2012 cannot be prepared in {builder.data_dir} ({first_line(error)}): check"
            " that both archives are complete"
        ) from error
    except (OSError, tf.errors.OpError) as error:
        raise StorageError(
            f"imagenet2012 cannot be prepared in {builder.data_dir} ({first_line(error)}): check"
            " that both archives are complete and the disk has enough space"
        ) from error
    return str(builder.data_dir)
