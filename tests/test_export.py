"""An export computes what the network computes, and is complete or absent."""

import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import small_mlp
from test_launch import assert_fails_on_one_line, launch

from bn_keras.errors import StorageError, UsageError
from bn_keras.inference import exporter
from bn_keras.inference.exporter import export_workdir
from bn_keras.inference.loading import load_trained
from bn_keras.training.loop import train_and_evaluate

FORMATS = {"keras": "net.keras", "saved_model": "net", "tflite": "net.tflite"}
CLASSES = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_and_evaluate(small_mlp(), folder)
    return folder


def images(count=5):
    return np.random.default_rng(1).integers(0, 2, (count, 8, 8, 1)).astype(np.float32)


def logits_of(workdir):
    return load_trained(workdir).model(images(), training=False)


def read(path, file_format):
    """Runs an export with the software that loads it."""
    if file_format == "keras":
        return keras.saving.load_model(path)(images())
    if file_format == "saved_model":
        return tf.saved_model.load(path).signatures["images"](images=images())["logits"]
    interpreter = tf.lite.Interpreter(str(path))
    return interpreter.get_signature_runner("serving_default")(images=images())["logits"]


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("fold", [False, True], ids=["", "folded"])
@pytest.mark.parametrize("file_format", FORMATS)
def test_an_export_computes_the_logits_of_the_network(file_format, fold, workdir, tmp_path):
    output = tmp_path / "new" / FORMATS[file_format]
    report = export_workdir(workdir, output, file_format, fold=fold)
    np.testing.assert_allclose(read(output, file_format), logits_of(workdir), rtol=1e-4, atol=1e-5)
    assert os.listdir(output.parent) == [output.name]
    assert report.step == 60 and report.statistics == "moving"
    assert report.largest_difference < 1e-4 < report.largest_output
    size = sum(f.stat().st_size for f in [output, *output.rglob("*")] if f.is_file())
    assert report.num_bytes == size > 1000
    assert (report.fold is not None) == fold
    assert f"{output}: step 60, moving statistics" in str(report)
    assert ("3 of 3 BatchNormalization layers folded" in str(report)) == fold


def test_a_keras_file_loads_with_the_reported_software(workdir, tmp_path):
    readers = {}
    for name, fold in {"plain": False, "folded": True}.items():
        report = export_workdir(workdir, tmp_path / f"{name}.keras", fold=fold)
        readers[name] = report.reader
    assert readers["plain"] == "Keras after import bn_keras (for BatchNormalization)"
    assert readers["folded"] == "Keras alone"
    np.save(tmp_path / "x.npy", images())
    code = (
        "import sys, keras, numpy as np; load = keras.saving.load_model; x = np.load('x.npy');"
        "folded = load('folded.keras')(x); assert 'bn_keras' not in sys.modules;"
        "import bn_keras; np.save('y.npy', [folded, load('plain.keras')(x)])"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    )
    for y in np.load(tmp_path / "y.npy"):
        np.testing.assert_allclose(y, logits_of(workdir), rtol=1e-4, atol=1e-5)


def test_a_saved_model_accepts_image_files(workdir, tmp_path):
    export_workdir(workdir, tmp_path / "1", "saved_model")
    served = tf.saved_model.load(tmp_path / "1").signatures
    assert [n.decode() for n in served["class_names"]()["class_names"].numpy()] == CLASSES
    # PNG is lossless, and images of the network's size are only scaled to its range.
    files = [tf.io.encode_png(255 * x.astype(np.uint8)) for x in images()]
    outputs = served["serving_default"](encoded=tf.stack(files))
    expected = tf.nn.softmax(logits_of(workdir)).numpy()
    np.testing.assert_allclose(outputs["probabilities"], expected, rtol=1e-4, atol=1e-6)
    best = [CLASSES[i].encode() for i in expected.argmax(axis=1)]
    assert outputs["class_name"].numpy().tolist() == best

    # Files of any size and format, and batches of any size, also empty ones.
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    mixed = tf.stack([files[0], tf.io.encode_jpeg(noise), tf.io.encode_png(noise[:9])])
    together = served["serving_default"](encoded=mixed)["probabilities"].numpy()
    alone = [served["serving_default"](encoded=mixed[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(
        together, [a["probabilities"][0] for a in alone], rtol=1e-5, atol=1e-7
    )
    none = served["serving_default"](encoded=tf.constant([], tf.string))
    assert none["probabilities"].shape == (0, 10)


def test_tflite_of_mixed_precision_is_float32(workdir, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(workdir, mixed)
    config = json.loads((mixed / "config.json").read_text())
    config["train"]["precision"] = "mixed_bfloat16"
    (mixed / "config.json").write_text(json.dumps(config))
    for file_format in ("tflite", "saved_model"):
        report = export_workdir(mixed, tmp_path / FORMATS[file_format], file_format)
        relative = report.largest_difference / report.largest_output
        assert relative < (1e-5 if file_format == "tflite" else 0.02)


@pytest.mark.parametrize(
    "output, file_format, parts",
    [
        ("net.onnx", "onnx", ["unknown format 'onnx'", "keras, saved_model, tflite"]),
        ("net.h5", "keras", ["net.h5", "ends in .keras"]),
        ("net", "tflite", ["ends in .tflite"]),
        ("gs://bucket/net.h5", "keras", ["net.h5 is invalid", "ends in .keras"]),
        ("a_file/net.keras", "keras", ["net.keras is invalid", "a_file is not a folder"]),
        ("net.keras", "keras", ["net.keras exists", "--overwrite"]),
        ("a_folder", "saved_model", ["a_folder exists"]),
    ],
)
def test_invalid_outputs_are_rejected(output, file_format, parts, tmp_path):
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "net.keras").write_text("mine")
    (tmp_path / "a_folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    path = output if "://" in output else tmp_path / output
    # The output is checked before the run is read.
    with pytest.raises(UsageError) as caught:
        export_workdir(tmp_path / "no run", path, file_format)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value) and sorted(os.listdir(tmp_path)) == before


def test_folders_without_a_trained_network_are_rejected(workdir, tmp_path):
    output = tmp_path / "net.keras"
    with pytest.raises(UsageError, match="holds no run"):
        export_workdir(tmp_path / "no run", output)
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UsageError, match="has no checkpoint"):
        export_workdir(tmp_path / "run", output)
    assert os.listdir(tmp_path) == ["run"]


def test_an_existing_export_is_replaced_on_request(workdir, tmp_path):
    for file_format, name in FORMATS.items():
        output = tmp_path / name
        if file_format == "saved_model":
            output.mkdir()
            (output / "saved_model.pb").write_text("old")
            (output / "notes.txt").write_text("old")
        else:
            output.write_text("old")
        export_workdir(workdir, output, file_format, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted(FORMATS.values())
    assert "notes.txt" not in os.listdir(tmp_path / "net")


def test_an_existing_output_of_another_kind_is_never_replaced(tmp_path):
    (tmp_path / "net.keras").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    for name, file_format in {"net.keras": "keras", "home": "saved_model"}.items():
        with pytest.raises(UsageError, match="is not overwritten"):
            export_workdir(tmp_path / "no run", tmp_path / name, file_format, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_export_that_computes_something_else_is_removed(
    file_format, workdir, tmp_path, monkeypatch
):
    correct = exporter._FORMATS[file_format]

    def read_wrongly(path):
        network = correct.read(path)
        return lambda x: network(x) + 1

    monkeypatch.setitem(exporter._FORMATS, file_format, correct._replace(read=read_wrongly))
    with pytest.raises(ArithmeticError, match=f"the exported {FORMATS[file_format]} .* by up to 1"):
        export_workdir(workdir, tmp_path / FORMATS[file_format], file_format)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), tf.errors.UnknownError(None, None, "No space left")]
)
def test_a_failed_export_keeps_the_previous_output(error, workdir, tmp_path, monkeypatch):
    def fail(model, trained, path):
        path.write_text("half")
        raise error

    (tmp_path / "net.keras").write_text("old")
    failing = exporter._FORMATS["keras"]._replace(write=fail)
    monkeypatch.setitem(exporter._FORMATS, "keras", failing)
    with pytest.raises(StorageError, match="net.keras cannot be written: No space left"):
        export_workdir(workdir, tmp_path / "net.keras", overwrite=True)
    assert os.listdir(tmp_path) == ["net.keras"]
    assert (tmp_path / "net.keras").read_text() == "old"


def test_the_command_exports_and_rejects_invalid_flags(workdir, tmp_path):
    output = tmp_path / "net.tflite"
    arguments = [f"--workdir={workdir}", f"--output={output}", "--format=tflite", "--fold"]
    done = launch("export", *arguments)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("I ") for line in done.stderr.splitlines()), done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{output}: step 60")
    assert_fails_on_one_line(launch("export", *arguments), 2, "exists", "--overwrite")
    done = launch("export", f"--workdir={workdir}", f"--output={output}", "--format=onnx")
    assert_fails_on_one_line(done, 2, "--format=onnx", "keras, saved_model, tflite")
    assert_fails_on_one_line(launch("export", f"--workdir={workdir}"), 2, "--output is missing")
