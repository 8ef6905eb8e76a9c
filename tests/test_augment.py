"""RandAugment, MixUp and CutMix: against references, and that they depend only on the step."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps
from scipy import ndimage, special, stats
from small import small_mlp
from test_data import ONE, Pipelines, assert_same, settings
from test_train import kill_after

from bn_keras.data import augment, pipeline, transforms
from bn_keras.data.augment import Mixing
from bn_keras.data.random_numbers import RandomNumbers
from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import UsageError
from bn_keras.training.loop import train_and_evaluate

MAGNITUDE = 0.4
NAMES = list(augment.random_augment_operations(MAGNITUDE))
LUMA = [0.2989, 0.587, 0.114]


def photograph(channels=3, height=18, width=25):
    """Returns an image of integers whose smallest and largest values are not 0 and 255."""
    rows, columns = np.mgrid[:height, :width, :channels][:2]
    waves = 120 + 60 * np.sin(rows / 3) + 40 * np.cos(columns / 4)
    noise = np.random.default_rng(0).integers(0, 20, waves.shape)
    return np.round(waves + noise).astype(np.float32)


def row(*operations):
    """Returns the uniform numbers that select these operations, each with its two numbers."""
    choices = [*NAMES, "none"]
    draws = [[(choices.index(name) + 0.5) / len(choices), *values] for name, *values in operations]
    none = [1 - 2**-24, 0.5, 0.5]
    return np.float32(draws + [none] * (augment.NUM_OPERATIONS - len(draws))).ravel()


@tf.function
def augmented(images, uniforms):
    return augment.apply_random_augment(images, uniforms, MAGNITUDE)


def normal_magnitude(uniform):
    """Returns a quantile of the normal distribution around the magnitude, clipped to [0, 1]."""
    return np.clip(stats.norm.ppf(uniform, MAGNITUDE, augment.MAGNITUDE_STDDEV), 0, 1)


def uniform_magnitude(uniform):
    return MAGNITUDE * (2 * uniform - 1)


def moved(image, matrix, offset=(0, 0)):
    """Moves pixels from matrix @ (row, column) + offset to (row, column); reflects at the edges."""
    planes = [
        ndimage.affine_transform(plane, matrix, offset, order=1, mode="reflect")
        for plane in np.moveaxis(image.astype(np.float64), -1, 0)
    ]
    return np.stack(planes, axis=-1)


def auto_contrast(image, first, second):
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    return (image - low) * (255 / (high - low))


def equalize(image, first, second):
    return np.asarray(ImageOps.equalize(Image.fromarray(image.astype(np.uint8))), np.float32)


def solarize(image, first, second):
    more = np.clip(image + 110 * normal_magnitude(first), 0, 255)
    return np.where(more < 255 - 255 * normal_magnitude(second), more, 255 - more)


def color(image, first, second):
    grey = image @ LUMA
    return image + normal_magnitude(first) * (grey[..., None] - image)


def contrast(image, first, second):
    means = image.mean(axis=(0, 1))
    return np.clip(means + (1 + uniform_magnitude(first)) * (image - means), 0, 255)


def brightness(image, first, second):
    return np.clip(image + 255 * uniform_magnitude(first), 0, 255)


def shear_x(image, first, second):
    return moved(image, [[1, 0], [np.where(second < 0.5, -1, 1) * normal_magnitude(first), 1]])


def shear_y(image, first, second):
    return moved(image, [[1, np.where(second < 0.5, -1, 1) * normal_magnitude(first)], [0, 1]])


def translate_x(image, first, second):
    return moved(image, np.eye(2), [0, -uniform_magnitude(first) * image.shape[1]])


def translate_y(image, first, second):
    return moved(image, np.eye(2), [-uniform_magnitude(first) * image.shape[0], 0])


REFERENCES = (
    auto_contrast,
    equalize,
    solarize,
    color,
    contrast,
    brightness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)


def test_the_operations_are_those_of_keras_cv():
    from keras_cv import layers

    assert [reference.__name__ for reference in REFERENCES] == NAMES
    policy = layers.RandAugment.get_standard_policy((0, 255), MAGNITUDE, augment.MAGNITUDE_STDDEV)
    assert len(policy) == len(NAMES)


@pytest.mark.parametrize("reference", REFERENCES, ids=NAMES)
def test_an_operation_equals_its_reference(reference):
    image = photograph()
    for values in ((0.3, 0.8), (0.9, 0.2)):
        got = augmented(image[None], row((reference.__name__, *values))[None])[0]
        expected = reference(image, *np.float32(values))
        assert np.abs(expected - image).max() > 5
        np.testing.assert_allclose(got, expected, atol=0.02)


def test_operations_are_applied_in_sequence_and_may_be_none():
    image = photograph()
    rows = [
        row(),
        row(("none", 0.1, 0.2), ("brightness", 0.9, 0.5), ("none", 0.1, 0.2)),
        row(("shear_x", 0.3, 0.8), ("contrast", 0.8, 0.1), ("equalize", 0.1, 0.1)),
    ]
    got = augmented(np.stack([image] * 3), np.stack(rows)).numpy()
    np.testing.assert_array_equal(got[0], image)
    np.testing.assert_allclose(got[1], brightness(image, 0.9, 0.5), atol=0.02)
    expected = image[None]
    for operation in (("shear_x", 0.3, 0.8), ("contrast", 0.8, 0.1), ("equalize", 0.1, 0.1)):
        expected = augmented(expected, row(operation)[None])
    np.testing.assert_array_equal(got[2], expected[0])


def test_only_the_color_operation_leaves_grey_images_unchanged():
    image = photograph(channels=1)
    rows = np.stack([row((name, 0.3, 0.8)) for name in NAMES])
    got = augmented(np.stack([image] * len(NAMES)), rows).numpy()
    assert got.shape == (len(NAMES), *image.shape) and np.isfinite(got).all()
    assert got.min() >= 0 and got.max() <= 255
    unchanged = [name for name, result in zip(NAMES, got, strict=True) if (result == image).all()]
    assert unchanged == ["color"]


def test_all_operations_are_equally_likely():
    """Two of the eleven choices, none and color, leave grey images unchanged."""
    draws = np.random.default_rng(0).random((1100, augment.RANDOM_AUGMENT_UNIFORMS), np.float32)
    draws[:, 3::3] = row()[3::3]
    images = np.stack([photograph(channels=1)] * 1100)
    same = (augmented(images, draws).numpy() == images).all(axis=(1, 2, 3))
    # The standard deviation is 13.
    assert abs(same.sum() - 200) < 40


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 1.0, 8.0])
def test_quantiles_are_those_of_the_beta_distribution(alpha):
    uniforms = np.append(np.random.default_rng(0).random(500, np.float32), [0, 0.5])
    shares = augment.beta_quantiles(tf.constant(uniforms, tf.float32), alpha).numpy()
    expected = special.betaincinv(alpha, alpha, np.float64(np.float32(uniforms)))
    np.testing.assert_allclose(shares, expected, atol=2e-7)
    assert shares[-2] == 0 and shares.max() <= 1


def mixing_inputs(n=6, height=9, width=14, seed=0):
    random = np.random.default_rng(seed)
    images = random.uniform(-1, 1, (n, height, width, 3)).astype(np.float32)
    labels = np.arange(n, dtype=np.int32) % 4
    return images, labels, random.random((n, augment.MIXING_UNIFORMS), np.float32)


def mixed(mixing, images, labels, uniforms, step=0):
    got = mixing.mix(tf.constant(images), labels, tf.constant(uniforms), tf.constant(step))
    return [part.numpy() for part in got]


def neighbours(values):
    return values.reshape(-1, 2, *values.shape[1:])[:, ::-1].reshape(values.shape)


def test_mixup_averages_a_pair_and_its_labels_with_the_same_weights():
    images, labels, uniforms = mixing_inputs()
    got, shares = mixed(Mixing(0.4, 0.0, 4), images, labels, uniforms)
    weights = 1 - special.betaincinv(0.4, 0.4, np.float64(uniforms[:, 0]))[:, None]
    one_hot = np.eye(4)[labels]
    # The distribution is symmetric; the drawn weight is the neighbour's.
    expected = weights * one_hot + (1 - weights) * neighbours(one_hot)
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    weights = weights[:, :, None, None]
    expected = weights * images + (1 - weights) * neighbours(images)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_cutmix_pastes_a_box_of_the_neighbour_and_weighs_labels_by_its_pixels():
    images, labels, uniforms = mixing_inputs(n=400)
    got, shares = mixed(Mixing(0.0, 1.0, 4), images, labels, uniforms)
    is_other = (got == neighbours(images)).all(axis=-1)
    assert ((got == images).all(axis=-1) | is_other).all()
    other = is_other.mean(axis=(1, 2))
    one_hot = np.eye(4)[labels]
    expected = (1 - other)[:, None] * one_hot + other[:, None] * neighbours(one_hot)
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    for mask, (share, *places) in zip(is_other, uniforms, strict=True):
        slices = []
        for length, place in zip(mask.shape, places, strict=True):
            pixels = round(np.sqrt(share) * length)
            first = int(place * length) - pixels // 2
            slices.append(slice(max(0, first), max(0, first + pixels)))
        expected = np.zeros_like(mask)
        expected[tuple(slices)] = True
        np.testing.assert_array_equal(mask, expected)


def test_mixup_and_cutmix_alternate():
    inputs = mixing_inputs()
    for step in (0, 1, 2, 3):
        alone = Mixing(0.0, 1.0, 4) if step % 2 else Mixing(0.4, 0.0, 4)
        assert_same([mixed(Mixing(0.4, 1.0, 4), *inputs, step)], [mixed(alone, *inputs)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images in four classes."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for label in range(4):
        for split, count in (("train", 5), ("validation", 1)):
            (root / split / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (12, 15, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / str(label) / f"{number}.png")
    return str(root)


EVERYTHING = {"random_augment": 0.5, "mixup": 0.4, "cutmix": 1.0}


@pytest.fixture(params=["synthetic", "folder"])
def open_augmented(request, folder):
    """Opens a set as each kind of source, with all augmentation."""

    def open_data(**changes):
        config = settings(name=request.param, data_dir=folder, **{**EVERYTHING, **changes})
        return pipeline.open_data(config, seed=3)

    return open_data


def train_batches(data, steps, start_step=0, strategy=ONE, mix=True):
    datasets = data.train_batches(strategy, 8, start_step, mix=mix)
    return strategy.global_batches(datasets, steps)


@pytest.mark.job
def test_a_batch_depends_only_on_its_step(open_augmented):
    uninterrupted = train_batches(open_augmented(), 7)
    resumed = train_batches(open_augmented(), 4, start_step=3, strategy=Pipelines(2, 4))
    assert_same(resumed, uninterrupted[3:])


def test_labels_are_the_shares_of_a_pair_and_mixing_is_optional(open_augmented):
    data = open_augmented(random_augment=0.0)
    (dataset,) = data.train_batches(Pipelines(1, 2), 8, mix=True)
    images, labels = dataset.element_spec
    assert images == tf.TensorSpec([4, 8, 8, 3])
    assert labels == tf.TensorSpec([4, data.num_classes])
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY

    unmixed = train_batches(data, 4, mix=False)
    for (images, shares), (plain, labels) in zip(train_batches(data, 4), unmixed, strict=True):
        assert labels.dtype == np.int32 and np.abs(images - plain).max() > 0.1
        np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
        pairs = np.stack([labels, neighbours(labels)], axis=1)
        others = np.copy(shares)
        np.put_along_axis(others, pairs, 0, axis=1)
        assert not others.any()
        assert images.min() >= -1 and images.max() <= 1


def test_evaluation_is_not_augmented(open_augmented):
    seen = []
    for changes in ({}, dict.fromkeys(EVERYTHING, 0.0)):
        datasets, _ = open_augmented(**changes).validation_batches(ONE, 4)
        seen.append(ONE.global_batches(datasets, 1))
    assert_same(*seen)


def test_rand_augment_does_not_change_the_other_random_numbers(open_augmented):
    """Crops, mirroring and colours are the same with RandAugment and without."""
    number, drawn = tf.constant(5, tf.int64), {}
    for magnitude in (0.0, 0.5):
        random = open_augmented(random_augment=magnitude)._train._random
        assert random == RandomNumbers(3, draws_random_augment=magnitude > 0)
        drawn[magnitude] = random.draw_for_images(number, [40]).numpy()
    np.testing.assert_array_equal(drawn[0.5][:, : transforms.NUM_UNIFORMS], drawn[0.0])
    assert drawn[0.5][:, transforms.RANDOM_AUGMENT_COLUMNS].shape == (
        40,
        augment.RANDOM_AUGMENT_UNIFORMS,
    )
    assert len(np.unique(drawn[0.5])) == drawn[0.5].size


def test_rand_augment_is_applied_between_crop_and_distortion():
    images = photograph()[np.newaxis].astype(np.uint8)
    draws = np.full([1, transforms.NUM_UNIFORMS], 0.4, np.float32)
    draws = np.concatenate([draws, row(("solarize", 0.6, 0.7))[None]], axis=1)
    plain, full = (
        Preprocessing(
            images.shape[1:3], "none", mirror=True, distortion=distortion, random_augment=magnitude
        )
        for distortion, magnitude in ((0.0, 0.0), (1.0, MAGNITUDE))
    )
    mirrored = plain.process_batch(tf.constant(images), [0], tf.constant(draws), 255)
    pixels = solarize((mirrored.numpy()[0] + 1) * 127.5, 0.6, 0.7)[None]
    expected = transforms.distort(
        tf.constant(pixels, tf.float32), draws[:, transforms.COLOUR_COLUMNS], 1.0, 255
    )
    got = full.process_batch(tf.constant(images), [0], tf.constant(draws), 255)
    np.testing.assert_allclose((got + 1) * 127.5, expected, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_augment": 1.5}, r"data.random_augment=1.5 is invalid: .* number in \[0, 1\]"),
        ({"random_augment": -0.1}, "data.random_augment=-0.1 is invalid"),
        ({"random_augment": float("nan")}, "data.random_augment=nan is invalid"),
        ({"mixup": -1.0}, "data.mixup=-1.0 is invalid: expected 0 or more"),
        ({"mixup": float("nan")}, "data.mixup=nan is invalid"),
        ({"cutmix": float("inf")}, "data.cutmix=inf is invalid"),
    ],
)
def test_invalid_settings_are_reported_on_one_line(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        pipeline.open_data(settings(name="synthetic", **changes), seed=0)
    assert "\n" not in str(caught.value)


def test_mixing_needs_an_even_batch_on_each_replica():
    data = pipeline.open_data(settings(name="synthetic", mixup=0.2), seed=0)
    with pytest.raises(UsageError, match="each replica has 3 examples of a batch of 6") as caught:
        data.train_batches(Pipelines(1, 2), 6, mix=True)
    assert "\n" not in str(caught.value)
    data.train_batches(Pipelines(1, 2), 6)


@pytest.mark.job
def test_a_run_with_mixed_images_resumes_exactly(tmp_path, monkeypatch):
    mixings, mix = [], Mixing.mix
    monkeypatch.setattr(Mixing, "mix", lambda *args: mixings.append(args[0]) or mix(*args))
    config = small_mlp(**{"data.mixup": 0.4, "data.cutmix": 1.0, "train.steps": 12})
    config.checkpoint.every_steps = 5
    uninterrupted = train_and_evaluate(config, tmp_path / "uninterrupted")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 8)
        train_and_evaluate(config, tmp_path / "resumed")
    resumed = train_and_evaluate(config, tmp_path / "resumed")
    assert resumed["variables_sha256"] == uninterrupted["variables_sha256"]
    assert mixings and set(mixings) == {Mixing(0.4, 1.0, 10)}
