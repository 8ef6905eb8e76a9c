"""Predictions for image files, and one-line errors for unreadable ones."""

import csv
import io
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from commands import ROOT, launch
from PIL import Image
from small import small_mlp

from bn_keras.data.multi_crop import SINGLE_CROP, CropPreprocessing, Crops
from bn_keras.data.single_image import read_image
from bn_keras.errors import UsageError
from bn_keras.inference.loading import load_trained
from bn_keras.inference.prediction import find_images, make_predictor
from bn_keras.training.loop import train_and_evaluate


def photograph(height=60, width=80):
    coarse = np.random.default_rng(0).uniform(0, 255, (1, 7, 7, 3))
    pixels = tf.image.resize(coarse, (height, width), "bicubic")[0]
    return tf.saturate_cast(pixels, tf.uint8)


def as_file(image, kind, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(image.numpy()).convert(mode).save(file, kind, quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of networks for grey 8x8 images."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        config = small_mlp(seed=seed, **{"data.binary": False})
        train_and_evaluate(config, folder / str(seed))
    return [folder / "0", folder / "1"]


@pytest.mark.parametrize("crops", ["1", "10", "144"])
def test_probabilities_are_averaged_over_crops_and_networks(crops, runs, tmp_path):
    crops = Crops.parse(crops)
    path = tmp_path / "image.png"
    path.write_bytes(as_file(photograph(), "PNG"))
    networks = [load_trained(run) for run in runs]
    preprocessing = CropPreprocessing(networks[0].preprocessing, crops)
    shown = preprocessing.process_encoded(tf.constant(path.read_bytes()), None, 1)
    cut = preprocessing.cut(tf.nest.map_structure(lambda tensor: tensor[None], shown))
    probabilities = np.mean([tf.nn.softmax(n.model(cut)) for n in networks], axis=(0, 1))
    found = make_predictor(runs, crops)(path)
    order = np.argsort(-probabilities)[:5]
    assert [p.class_name for p in found] == [str(number) for number in order]
    np.testing.assert_allclose([p.probability for p in found], probabilities[order], rtol=1e-4)


KINDS = [("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
KINDS += [("PNG", mode) for mode in ("RGB", "L", "RGBA", "P", "I;16")]
KINDS += [("GIF", "P"), ("BMP", "RGB")]


@pytest.mark.parametrize("kind, mode", KINDS)
def test_every_format_decodes_as_pillow_does(kind, mode, tmp_path):
    image = photograph()
    path = tmp_path / "image"
    if mode == "I;16":
        # Pillow clips 16-bit values at 255.
        grey = tf.image.rgb_to_grayscale(image)
        path.write_bytes(tf.io.encode_png(tf.cast(grey, tf.uint16) * 257).numpy())
        expected = tf.repeat(grey, 3, axis=-1).numpy()
    else:
        path.write_bytes(as_file(image, kind, mode))
        expected = np.array(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
    pixels = read_image(path)
    assert pixels.shape == (60, 80, 3) and pixels.dtype == tf.uint8
    difference = np.abs(pixels.numpy().astype(int) - expected)
    # JPEG decoders may round differently, and CMYK to RGB has no single definition.
    tolerance = {"RGB": 2, "L": 2, "CMYK": 4}[mode] if kind == "JPEG" else 0
    assert difference.max() <= tolerance


def test_an_image_of_one_pixel_is_classified(runs, tmp_path):
    path = tmp_path / "tiny.png"
    path.write_bytes(as_file(photograph(1, 1), "PNG"))
    for crops in (SINGLE_CROP, Crops.parse("144")):
        assert len(make_predictor([runs[0]], crops)(path)) == 5


def half(encoded):
    return encoded[: len(encoded) // 2]


BAD = {
    "missing": (None, "cannot be read: No such file or directory"),
    "empty": (b"", "an empty file"),
    "text.jpg": (b"not an image", "cannot be decoded: not an image: expected a JPEG"),
    "cut.jpg": (half(as_file(photograph(), "JPEG")), "a damaged or incomplete JPEG file"),
    "cut_at_the_end.jpg": (as_file(photograph(), "JPEG")[:-40], "cannot be decoded"),
    "cut.png": (half(as_file(photograph(), "PNG")), "a damaged or incomplete PNG file"),
    "cut.gif": (half(as_file(photograph(), "GIF")), "a damaged or incomplete GIF file"),
    "cut.bmp": (half(as_file(photograph(), "BMP")), "a damaged or incomplete BMP file"),
    "x.tiff": (as_file(photograph(), "TIFF"), "a TIFF or raw file: convert it"),
    "long.png": (as_file(photograph(2, 300), "PNG"), "2 pixels high and 300 wide"),
}


@pytest.mark.parametrize("name", BAD)
def test_unreadable_images_are_named(name, tmp_path):
    contents, message = BAD[name]
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(UsageError, match=message) as caught:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_networks_with_other_preprocessing_are_rejected(runs, tmp_path):
    train_and_evaluate(small_mlp(**{"train.steps": 2}), tmp_path)
    with pytest.raises(
        UsageError, match="differs from that in .* in its classes or its preprocessing"
    ):
        make_predictor([runs[0], tmp_path])
    with pytest.raises(UsageError, match="workdirs is empty"):
        make_predictor([])


def test_networks_that_were_trained_on_other_crops_predict_together_with_several(runs, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(as_file(photograph(), "PNG"))
    cropped = shutil.copytree(runs[0], tmp_path / "cropped")
    config = json.loads((cropped / "config.json").read_text())
    config["data"]["crop"] = "inception"
    (cropped / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="cropped differs from that in .* or its preprocessing"):
        make_predictor([runs[0], cropped])
    ten = Crops.parse("10")
    found, alone = (
        make_predictor(members, ten)(image) for members in ([runs[0], cropped], runs[:1])
    )
    assert [p.class_name for p in found] == [p.class_name for p in alone]
    assert [p.probability for p in found] == pytest.approx([p.probability for p in alone])


def test_an_extreme_aspect_ratio_is_classified(runs, tmp_path):
    path = tmp_path / "line.png"
    path.write_bytes(as_file(photograph(1, 3000), "PNG"))
    for crops in (SINGLE_CROP, Crops.parse("144")):
        assert len(make_predictor([runs[0]], crops)(path)) == 5


def test_a_file_name_may_have_any_bytes(runs, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9.png")
    pathlib.Path(path).write_bytes(as_file(photograph(), "PNG"))
    assert find_images([path]) == [path]
    assert len(make_predictor([runs[0]])(path)) == 5


def test_a_list_is_split_at_newlines_only(tmp_path):
    names = ["a\u2028b.png", "a\x85b.png", "a\x0cb.png", "c.png", "d.png"]
    (tmp_path / "list.txt").write_bytes("\n".join([*names[:3], "c.png\r\nd.png\r"]).encode())
    assert find_images([], [tmp_path / "list.txt"]) == names


def test_a_list_without_images_is_an_error(runs, tmp_path):
    (tmp_path / "list.txt").write_text("\n\n")
    done = launch("predict", f"--workdir={runs[0]}", f"--list={tmp_path}/list.txt")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.endswith("list.txt names no images: expected one path per line\n")


@pytest.mark.job
def test_the_command_processes_the_images_after_an_unreadable_one(runs, tmp_path):
    (tmp_path / "good.png").write_bytes(as_file(photograph(), "PNG"))
    (tmp_path / "text.jpg").write_bytes(BAD["text.jpg"][0])
    names = ["text.jpg", "good.png", "missing.jpg"]
    images = [tmp_path / name for name in names]
    done = launch("predict", f"--workdir={runs[0]}", *images)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ["text.jpg" in errors[0], "missing.jpg" in errors[1], len(errors)] == [True, True, 2]
    title, *lines = done.stdout.splitlines()
    assert title == str(images[1]) and len(lines) == 5
    best = make_predictor([runs[0]])(images[1])
    assert lines[0].split() == [f"{best[0].probability:.2%}", best[0].class_name]

    done = launch("predict", images[1], "--json", f"--workdir={runs[0]}", "--crops=10")
    assert done.returncode == 0, done.stderr
    ten = make_predictor([runs[0]], Crops.parse("10"))(images[1])
    read = json.loads(done.stdout)
    assert read["image"] == str(images[1])
    assert [p["class"] for p in read["predictions"]] == [p.class_name for p in ten]


def test_the_command_requires_an_image():
    done = launch("predict", "--workdir=w")
    assert (done.returncode, done.stderr) == (2, "error: IMAGE is missing: see --help\n")


@pytest.fixture
def folder(tmp_path):
    """A folder with three images, one of them damaged, a link to itself, and other files."""
    folder = tmp_path / "pictures"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("a/b/1.png", "2.PNG", ".hidden/3.png"):
        (folder / name).write_bytes(as_file(photograph(), "PNG"))
    (folder / "a" / 'bad,"name.jpg').write_bytes(BAD["text.jpg"][0])
    (folder / "notes.txt").write_text("no image")
    (folder / "a" / "loop").symlink_to(folder)
    return folder


def test_images_are_found_below_folders_and_in_lists(folder, tmp_path):
    names = ["2.PNG", "a/b/1.png", 'a/bad,"name.jpg']
    assert find_images([folder]) == [str(folder / name) for name in names]
    (tmp_path / "list.txt").write_text("x.png\r\n\n  b c.jpg \n", encoding="utf-8-sig")
    assert find_images(["y.gif"], [tmp_path / "list.txt"]) == ["y.gif", "x.png", "b c.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty has no images: expected files ending in .jpg"):
        find_images([tmp_path / "empty"])


def test_other_files_of_a_folder_are_named_in_a_warning(folder, caplog):
    (folder / "a" / "photo.jfif").write_bytes(as_file(photograph(), "JPEG"))
    (folder / "a" / "photo.heic").write_bytes(b"?")
    assert str(folder / "a" / "photo.jfif") in find_images([folder])
    assert "ignoring 2 files in" in caplog.text and "photo.heic" in caplog.text


def test_images_are_found_in_a_bucket_and_below_its_folders(memory_bucket):
    names = ["2.PNG", "a/b/1.png"]
    for name in (*names, ".hidden/3.png", "notes.txt"):
        file = memory_bucket / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    top = os.fspath(memory_bucket)
    for path in (top, f"{top}/"):
        assert find_images([path]) == [f"{top}/{name}" for name in names]
    assert find_images([f"{top}/a"]) == [f"{top}/a/b/1.png"]
    with pytest.raises(UsageError, match="/.hidden/none has no images"):
        (memory_bucket / ".hidden" / "none").mkdir()
        find_images([f"{top}/.hidden/none"])


def test_a_link_to_a_folder_around_it_is_searched(folder):
    (folder / "a" / "b" / "up").symlink_to(folder / "a")
    up = str(folder / "a" / "b" / "up")
    assert find_images([up]) == [f"{up}/b/1.png", f'{up}/bad,"name.jpg']


@pytest.mark.parametrize(
    "name, content, message",
    [("none.txt", None, "does not exist"), ("latin.txt", b"caf\xe9.png", "is not UTF-8")],
)
def test_an_unusable_list_is_refused(name, content, message, tmp_path):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        find_images([], [tmp_path / name])


@pytest.mark.parametrize("crops", ["1", "144"])
def test_many_images_are_predicted_in_batches_as_alone(crops, runs, folder):
    predict = make_predictor(runs, Crops.parse(crops), top_k=0)
    found = list(predict.predict_all(find_images([folder]) * 15))
    assert len(found) == 45
    alone = predict(folder / "2.PNG")
    assert len(alone) == 10 and sum(p.probability for p in alone) == pytest.approx(1, abs=1e-5)
    for image in found:
        if image.path.endswith("name.jpg"):
            assert "cannot be decoded" in image.error and not image.classes
        else:
            assert [p.class_name for p in image.classes] == [p.class_name for p in alone]
            np.testing.assert_allclose(
                [p.probability for p in image.classes], [p.probability for p in alone], rtol=1e-4
            )


def test_the_command_writes_a_table(runs, folder, tmp_path):
    for arguments, columns in (["--top_k=2"], 6), (["--top_k=0"], 12):
        output = tmp_path / "found.csv"
        done = launch("predict", f"--workdir={runs[0]}", folder, f"--output={output}", *arguments)
        assert done.returncode == 2 and "error: 1 of 3 images are unreadable" in done.stderr
        header, *rows = csv.reader(io.StringIO(output.read_text(), newline=""))
        assert len(header) == columns and [row[0] for row in rows] == find_images([folder])
        assert "cannot be decoded" in rows[2][1] and not rows[0][1]
    numbers = [float(value) for value in rows[0][2:]]
    assert sum(numbers) == pytest.approx(1, abs=1e-5) and header[2:] == list("0123456789")


def test_no_two_columns_have_the_same_name():
    program = (
        "from launch.predict import _TOP_K, _csv_columns, flags\n"
        "flags.FLAGS(['predict', '--workdir=w', '--top_k=0'])\n"
        "print(_csv_columns(['image', 'error', 'cat']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['class image', 'class error', 'cat']\n", done.stderr


@pytest.mark.parametrize(("name", "num_bytes"), [("found.csv", 20), ("found.jsonl", 20)])
def test_a_full_disk_is_reported_on_one_line(name, num_bytes, runs, folder, tmp_path):
    """The process may write no longer files: EFBIG, since ENOSPC would need a file system."""
    output = tmp_path / name
    image = find_images([folder])[0]
    done = subprocess.run(
        [sys.executable, "-m", "launch.predict"]
        + [f"--workdir={runs[0]}", image, f"--output={output}"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    message = f"error: output {output} cannot be written: File too large"
    assert done.returncode != 0 and done.stderr.strip().splitlines()[-1].startswith(message)
    assert os.listdir(tmp_path) == ["pictures"]


def test_an_unknown_kind_of_table_is_refused():
    done = launch("predict", "--workdir=w", "x.png", "--output=x.xlsx")
    assert done.returncode == 2 and "expected FILE.csv or FILE.jsonl" in done.stderr
