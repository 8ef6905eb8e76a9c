"""Data sets by name: built-in sets, a folder of images, or TFDS.

To add a data set that TFDS does not have, add it to `built_in.BUILT_IN`.
"""

from bn_keras.data.built_in import BUILT_IN, NOT_IN_TFDS, make_pool
from bn_keras.data.folder import open_folder
from bn_keras.data.splits import Arrays, Description, Source, unknown_split
from bn_keras.data.tfds_sets import describe_tfds, locate_tfds, open_tfds, prepare_tfds


def open_source(
    name: str, data_dir: str, train_split: str, validation_split: str, image_size: int
) -> Source:
    """Opens a data set by name.

    Args:
      name: "digits", "synthetic", "folder", or a name in TFDS.
      data_dir: folder of prepared TFDS sets, "" for TFDS's default; for "folder", see
        `open_folder`.
      train_split: name of the split. TFDS sets accept slices, such as "train[:90%]", and "folder"
        accepts percentages.
      validation_split: likewise.
      image_size: side of the images of "synthetic"; other sets ignore it.

    Raises:
      UsageError: there is no such data set or split, or it has no images with labels.
    """
    if name == "folder":
        return open_folder(data_dir, train_split, validation_split)
    if name not in BUILT_IN:
        return open_tfds(name, data_dir, train_split, validation_split)
    splits = BUILT_IN[name].load(image_size)
    for split in (train_split, validation_split):
        if split not in splits:
            raise unknown_split(name, split, splits)
    class_names = _number_classes(BUILT_IN[name].num_classes)
    return Source(class_names, splits[train_split], splits[validation_split])


def describe(
    name: str, data_dir: str, train_split: str, validation_split: str, image_size: int
) -> Description:
    """Describes the data set that `open_source` opens, without downloading it.

    A folder is listed. The arguments are those of `open_source`.

    Raises:
      UsageError: see `open_source`, for errors that do not depend on the data itself.
    """
    if name not in NOT_IN_TFDS:
        return describe_tfds(name, data_dir, train_split, validation_split)
    return open_source(name, data_dir, train_split, validation_split, image_size).description


def synthesize(description: Description, image_size: int) -> Source:
    """Generates a source like the described data set, to try a config without its data.

    Args:
      description: description of the data set. A split of unknown size gets SYNTHETIC_POOL
        examples.
      image_size: side of the images if those of the data set differ in size; 0 is one pixel.
    """
    height, width, channels = description.image_shape
    shape = (height or image_size or 1, width or image_size or 1, channels)
    pool = make_pool(shape, description.num_classes)
    return Source(
        _number_classes(description.num_classes),
        Arrays(*pool, num_examples=description.num_train_examples or 0),
        Arrays(*pool, num_examples=description.num_validation_examples or 0),
    )


def prepare(name: str, data_dir: str) -> None:
    """Downloads and prepares a data set if necessary, without reading it.

    Raises:
      UsageError: there is no such data set, or it cannot be prepared.
      StorageError: data_dir is in a bucket that cannot be read.
    """
    if name not in NOT_IN_TFDS:
        prepare_tfds(name, data_dir)


def locate(name: str, data_dir: str) -> str:
    """Returns a phrase that says where a data set is, or how it is obtained.

    Raises:
      UsageError: there is no such data set, or data_dir is not a folder.
    """
    if name in BUILT_IN:
        return BUILT_IN[name].origin
    if name == "folder":
        return f"in {data_dir}"
    return locate_tfds(name, data_dir)


def _number_classes(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
