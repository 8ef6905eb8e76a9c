"""An export computes what the network computes, describes it, and is complete or absent."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile

import flatbuffers
import keras
import numpy as np
import pytest
import tensorflow as tf
from commands import launch
from small import small_mlp
from test_launch import assert_fails_on_one_line

from bn_keras.data import pipeline
from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import ReportedError, StorageError, UsageError
from bn_keras.inference import exporter
from bn_keras.inference.evaluation import evaluate_networks
from bn_keras.inference.exported import load_exported
from bn_keras.inference.exporter import export_workdir
from bn_keras.inference.loading import load_trained
from bn_keras.inference.network_description import NetworkDescription
from bn_keras.inference.quantization import check_quantized, read_training_images
from bn_keras.inference.tflite_export import TFLiteNetwork, restore_rounded, write_tflite
from bn_keras.inference.tflite_metadata import add_metadata, read_description
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
    """Returns the probabilities of an export, run with the software that loads it."""
    if file_format == "keras":
        return tf.nn.softmax(keras.saving.load_model(path)(images()))
    if file_format == "saved_model":
        served = tf.saved_model.load(path).signatures["images"]
        return tf.nn.softmax(served(images=images())["logits"])
    interpreter = tf.lite.Interpreter(str(path))
    return interpreter.get_signature_runner("serving_default")(images=images())["probabilities"]


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("fold", [False, True], ids=["", "folded"])
@pytest.mark.parametrize("file_format", FORMATS)
def test_an_export_computes_the_probabilities_of_the_network(file_format, fold, workdir, tmp_path):
    output = tmp_path / "new" / FORMATS[file_format]
    report = export_workdir(workdir, output, file_format, fold=fold)
    expected = tf.nn.softmax(logits_of(workdir))
    np.testing.assert_allclose(read(output, file_format), expected, rtol=1e-4, atol=1e-6)
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


@pytest.mark.parametrize("name", ["1", "net.onnx", "net.tflite", "net.keras"])
def test_a_saved_model_accepts_image_files(name, workdir, tmp_path):
    export_workdir(workdir, tmp_path / name, "saved_model")
    served = tf.saved_model.load(tmp_path / name).signatures
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
        ("net.pb", "graph", ["unknown format 'graph'", "keras, saved_model, tflite, onnx"]),
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
    with pytest.raises(UsageError, match="has no checkpoint.* restore it from a copy"):
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
    def load_wrongly(path):
        network = load_exported(path)
        return network._replace(model=lambda x, training: 2 * network.model(x) + 1)

    monkeypatch.setattr(exporter, "load_exported", load_wrongly)
    with pytest.raises(ArithmeticError, match=f"the exported {FORMATS[file_format]} .* differ by"):
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
    arguments += ["--quantize=int8", "--num_examples=20"]
    done = launch("export", *arguments)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("I ") for line in done.stderr.splitlines()), done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{output}: step 60")
    assert_fails_on_one_line(launch("export", *arguments), 2, "exists", "--overwrite")
    done = launch("export", f"--workdir={workdir}", f"--output={output}", "--format=pb")
    assert_fails_on_one_line(done, 2, "--format=pb", "keras, saved_model, tflite, onnx")
    assert_fails_on_one_line(launch("export", f"--workdir={workdir}"), 2, "--output is missing")


def describe(names=CLASSES, shape=(8, 8, 1), binary=True, crop="none"):
    preprocessing = Preprocessing(shape[:2], crop, binary=binary)
    return NetworkDescription(tuple(names), shape, preprocessing, 60, "moving")


ODD_NAMES = ["\N{DOG FACE} dog", "two\nlines", "", 'commas, "quotes"', "\udc80bytes"]


@pytest.mark.parametrize("file_format", FORMATS)
def test_paths_and_class_names_of_any_characters(file_format, workdir, tmp_path):
    """TensorFlow's reader and writer of SavedModels search for files that match their path."""
    run = tmp_path / "run [1]" / "a*?"
    shutil.copytree(workdir, run)
    interface = json.loads((run / "interface.json").read_text())
    names = interface["class_names"] = [*ODD_NAMES[:-1], *CLASSES[len(ODD_NAMES) - 1 :]]
    (run / "interface.json").write_text(json.dumps(interface))
    # A pattern "out [1]" would find this folder.
    decoy = tmp_path / "out 1" / "m"
    decoy.mkdir(parents=True)
    output = tmp_path / "out [1]" / f"m*{FORMATS[file_format]}"
    export_workdir(run, output, file_format)
    assert os.listdir(output.parent) == [output.name] and not os.listdir(decoy)

    network = load_exported(output)
    assert network.class_names == tuple(names) and network.input_shape == (8, 8, 1)
    assert network.preprocessing.binary and network.preprocessing.crop == "none"
    files = [tf.io.encode_png(255 * x.astype(np.uint8)).numpy() for x in images()]
    expected = tf.nn.softmax(logits_of(workdir)).numpy()
    np.testing.assert_allclose(network.predict(files), expected, rtol=1e-4, atol=1e-6)
    assert network.predict([]).shape == (0, 10)
    with pytest.raises(UsageError, match="image 1 cannot be decoded"):
        network.predict([files[0], files[1][:40]])
    for wrong in (files[0], ["x.png"], [output]):
        with pytest.raises(UsageError, match="expected a list of the contents of image files"):
            network.predict(wrong)


@pytest.mark.parametrize("names", [ODD_NAMES, ["only"], [f"n{i:08}" for i in range(1000)]])
def test_a_description_keeps_any_class_names(names):
    description = describe(names, (224, 200, 3), binary=False, crop="inception")
    assert NetworkDescription.from_json(description.to_json()) == description
    assert description.to_json().isascii()


@pytest.mark.parametrize(
    "shape, window",
    [
        ((64, 64, 3), "take 7/8 of the sides of the largest centred square; resize"),
        ((224, 200, 3), "largest centred window with the aspect ratio 200:224; resize"),
    ],
)
def test_the_preprocessing_is_a_sentence(shape, window):
    description = describe(["a"], shape, binary=False, crop="inception")
    assert window in description.describe_preprocessing()


def read_table(table, slots):
    """Reads fields of a FlatBuffer's table by number; each is read by its function."""
    found = {}
    for slot, read_field in slots.items():
        offset = table.Offset(4 + 2 * slot)
        found[slot] = read_field(table, offset + table.Pos) if offset else None
    return found


def read_string(table, position):
    return table.String(position).decode()


def read_floats(table, position):
    begin = position + table.Get(flatbuffers.number_types.UOffsetTFlags, position)
    count = table.Get(flatbuffers.number_types.UOffsetTFlags, begin)
    return np.frombuffer(table.Bytes, np.float32, count, begin + 4).tolist()


def read_byte(table, position):
    return table.Get(flatbuffers.number_types.Uint8Flags, position)


def table_of(slots):
    return lambda table, position: read_table(
        flatbuffers.table.Table(table.Bytes, table.Indirect(position)), slots
    )


def tables_of(slots):
    def read_tables(table, position):
        begin = position + table.Get(flatbuffers.number_types.UOffsetTFlags, position)
        count = table.Get(flatbuffers.number_types.UOffsetTFlags, begin)
        return [table_of(slots)(table, begin + 4 + 4 * i) for i in range(count)]

    return read_tables


def test_tflite_metadata_has_the_standard_fields():
    """The numbers are those of metadata_schema.fbs; tests/peers reads it with MediaPipe."""
    from tensorflow.lite.tools import flatbuffer_utils

    description = describe(ODD_NAMES, (224, 200, 3), binary=False, crop="inception")
    function = tf.function(lambda x: x + 1, input_signature=[tf.TensorSpec([1])])
    model = tf.lite.TFLiteConverter.from_concrete_functions(
        [function.get_concrete_function()], function
    ).convert()
    content = add_metadata(model, description)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["labels.txt", "bn_keras.json"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        labels = archive.read("labels.txt").decode()
    assert labels == '\N{DOG FACE} dog\ntwo lines\n\ncommas, "quotes"\n\\udc80bytes\n'
    assert read_description(content) == description and read_description(model) is None

    parsed = flatbuffer_utils.convert_bytearray_to_object(content)
    [entry] = [m for m in parsed.metadata if m.name == b"TFLITE_METADATA"]
    buffer = bytes(parsed.buffers[entry.buffer].data)
    assert buffer[4:8] == b"M001"
    files = tables_of({0: read_string, 2: read_byte})
    options = table_of({0: read_floats, 1: read_floats})
    size = table_of({0: read_byte, 1: read_byte})
    tensor = {
        0: read_string,
        1: read_string,
        3: table_of({0: read_byte, 1: table_of({0: read_byte, 1: size})}),
        4: tables_of({0: read_byte, 1: options}),
        5: options,
        6: files,
    }
    subgraph = tables_of({2: tables_of(tensor), 3: tables_of(tensor)})
    root = flatbuffers.table.Table(buffer, int.from_bytes(buffer[:4], "little"))
    found = read_table(root, {0: read_string, 3: subgraph, 6: files, 7: read_string})
    assert found[6] == [{0: "bn_keras.json", 2: None}] and found[7] == "1.0.0"
    [[inputs], [outputs]] = found[3][0].values()
    assert inputs[0] == "images" and "7/8 of the sides" in inputs[1]
    # Image properties: RGB, width and height. Normalization: mean and standard deviation.
    assert inputs[3] == {0: 2, 1: {0: 1, 1: {0: 200, 1: 224}}}
    assert inputs[4] == [{0: 1, 1: {0: [127.5] * 3, 1: [127.5] * 3}}]
    assert inputs[5] == {0: [1.0] * 3, 1: [-1.0] * 3}
    assert outputs[0] == "probabilities" and outputs[5] == {0: [1.0], 1: [0.0]}
    assert outputs[6] == [{0: "labels.txt", 2: 2}]


def test_int8_stays_close_to_the_network(workdir, tmp_path):
    output = tmp_path / "net.tflite"
    report = export_workdir(workdir, output, "tflite", quantize="int8", num_examples=50)
    found = report.quantization
    [row] = evaluate_networks([workdir])
    assert found.num_examples == 50 and found.num_validation_examples == row["examples"]
    assert found.accuracy_before == pytest.approx(row["accuracy"])
    assert found.same_class > 0.95 and abs(found.accuracy_after - row["accuracy"]) < 0.05
    assert "quantized to int8 with 50 training images" in str(report)
    [row] = evaluate_networks([], load_trained(workdir).config, exported=[output])
    assert row["accuracy"] == pytest.approx(found.accuracy_after)

    with pytest.warns(UserWarning, match="deprecated"):
        interpreter = tf.lite.Interpreter(str(output))
    tensors = interpreter.get_tensor_details()
    assert {t["dtype"] for t in tensors} <= {np.uint8, np.int8, np.int32}
    # The input is the value of the pixel, for images that are 0 or 1 here.
    [images_in] = interpreter.get_input_details()
    assert images_in["quantization"] == pytest.approx((1 / 255, 0))
    runner = interpreter.get_signature_runner("serving_default")
    levels = runner(images=(255 * images()).astype(np.uint8))["probabilities"]
    expected = tf.nn.softmax(logits_of(workdir))
    np.testing.assert_allclose(levels / 256, expected, atol=0.1)


@pytest.mark.parametrize("num_classes", [3, 100, 1000])
def test_int8_is_read_back_with_the_probabilities_of_the_file(num_classes, tmp_path):
    """A floor of one step per class, which is how zeros were read, takes .8 of 1,000 classes."""
    generator = np.random.default_rng(0)
    x = generator.uniform(-1, 1, (200, 8, 8, 1)).astype(np.float32)
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(num_classes)]
    )
    model.layers[-1].kernel.assign(generator.normal(scale=0.8, size=(64, num_classes)))
    names = [f"class {i}" for i in range(num_classes)]
    path = tmp_path / "net.tflite"
    write_tflite(model, describe(names, binary=False), path, x)
    in_file = TFLiteNetwork(path.read_bytes())(x)
    found = tf.nn.softmax(load_exported(path).model(x)).numpy()
    # Steps that were rounded up can add to a sum above 1, which is normalized.
    in_file /= np.maximum(1, in_file.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, in_file, atol=1 / 256)
    np.testing.assert_allclose(found, tf.nn.softmax(model(x)), atol=0.15)
    np.testing.assert_array_equal(found.argmax(axis=1), in_file.argmax(axis=1))


def test_probabilities_that_were_rounded_to_0_share_the_missing_mass():
    step = 1 / 256
    rows = np.array(
        [
            [0.5, 0.25 + 250 / 1024, 0, 0, 0],
            [0.5, 0.5, 0, 0, 0],
            [0.5, 0.5 + step, 0, 0, 0],
            [0.5, 0.25, 0, 0, 0],
            [0.5, 0.25, 0.25, step, step],
        ],
        np.float32,
    )
    found = restore_rounded(rows, step)
    for row, zero in zip(found[:4], [6 / 1024 / 3, step / 6, step / 6, step / 2], strict=True):
        np.testing.assert_allclose(row[2:], zero, rtol=1e-6)
    np.testing.assert_array_equal(found[rows > 0], rows[rows > 0])
    assert found[0].sum() == pytest.approx(1) and found.dtype == np.float32


def test_a_quantization_that_does_not_distinguish_images_is_refused():
    generator = np.random.default_rng(0)
    expected = generator.dirichlet(np.ones(5), 100)
    check_quantized(expected, expected + 0.01, "net")
    for outputs in (generator.permutation(expected), expected * np.nan):
        with pytest.raises(ArithmeticError, match="net has a root mean square error of"):
            check_quantized(expected, outputs, "net")


def test_training_images_are_drawn_by_the_seed():
    config = small_mlp()
    first = read_training_images(config, 30)
    assert first.shape == (30, 8, 8, 1)
    np.testing.assert_array_equal(first, read_training_images(config, 30))
    config.seed += 1
    assert np.any(first != read_training_images(config, 30))


OUTAGE = "All 10 retry attempts failed. The last failure: x"


@pytest.mark.parametrize(
    "error, expected",
    [
        (tf.errors.AbortedError(None, None, OUTAGE), "does not answer"),
        (tf.errors.InvalidArgumentError(None, None, "not an image"), "images is readable"),
    ],
)
def test_an_image_that_an_outage_hides_does_not_calibrate_another_network(
    error, expected, monkeypatch
):
    """An unreadable one is left out."""

    def read(self, index):
        raise error

    monkeypatch.setattr(pipeline.Data, "read_validation_example", read)
    with pytest.raises(ReportedError, match=expected) as caught:
        read_training_images(small_mlp(), 30)
    assert caught.value.status == (75 if expected == "does not answer" else 2)


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"file_format": "keras", "quantize": "int8"}, ["keras cannot be quantized", "tflite"]),
        ({"file_format": "tflite", "quantize": "int4"}, ["quantize='int4'", "none, int8"]),
        ({"file_format": "tflite", "num_examples": 0}, ["num_examples=0", "positive"]),
    ],
)
def test_invalid_quantizations_are_rejected(options, parts, tmp_path):
    with pytest.raises(UsageError) as caught:
        export_workdir(tmp_path / "no run", tmp_path / "net.tflite", **options)
    assert all(part in str(caught.value) for part in parts)


def test_int8_needs_data_with_classes_of_the_network_only(workdir, tmp_path, monkeypatch):
    """The quantized network could not be evaluated on the others."""
    open_known = exporter.build_data

    def open_other(config, **options):
        data = open_known(config, **options)
        data.class_names = (*data.class_names, "bird")
        return data

    monkeypatch.setattr(exporter, "build_data", open_other)
    monkeypatch.setattr(exporter, "read_training_images", None)
    with pytest.raises(UsageError, match="classes that the network in .* does not know: 'bird'"):
        export_workdir(workdir, tmp_path / "net.tflite", "tflite", quantize="int8")
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"install bn_keras\[onnx\].*tf2onnx"):
        export_workdir(tmp_path / "no run", tmp_path / "net.onnx", "onnx")
