"""ONNX Runtime computes from an exported file what the network computes."""

import json

import numpy as np
import pytest
import tensorflow as tf
from small import small_mlp

from bn_keras.inference.evaluation import evaluate_networks
from bn_keras.inference.exported import load_exported
from bn_keras.inference.exporter import export_workdir
from bn_keras.inference.loading import load_trained
from bn_keras.training.loop import train_and_evaluate

pytest.importorskip("tf2onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_and_evaluate(small_mlp(), folder)
    return folder


@pytest.mark.parametrize("fold", [False, True], ids=["", "folded"])
def test_onnx_runtime_computes_the_outputs_of_the_network(fold, workdir, tmp_path):
    output = tmp_path / "out [1]" / "m*.onnx"
    report = export_workdir(workdir, output, "onnx", fold=fold)
    assert report.reader == "ONNX Runtime" and report.largest_difference < 1e-5
    session = onnxruntime.InferenceSession(output.read_bytes())
    [images] = session.get_inputs()
    assert (images.name, images.shape) == ("images", ["N", 8, 8, 1])
    for count in (1, 7):
        x = np.random.default_rng(0).integers(0, 2, (count, 8, 8, 1)).astype(np.float32)
        logits, probabilities = session.run(["logits", "probabilities"], {"images": x})
        expected = load_trained(workdir).model(x)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(probabilities, tf.nn.softmax(expected), rtol=1e-4, atol=1e-6)
    description = json.loads(session.get_modelmeta().custom_metadata_map["bn_keras"])
    assert description["class_names"] == [str(i) for i in range(10)]


def test_an_onnx_file_is_evaluated_and_predicts(workdir, tmp_path):
    onnx = pytest.importorskip("onnx")
    output = tmp_path / "net.onnx"
    export_workdir(workdir, output, "onnx")
    assert [i.version for i in onnx.load(output).opset_import if not i.domain] == [17]
    [expected] = evaluate_networks([workdir])
    [found] = evaluate_networks([], load_trained(workdir).config, exported=[output])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["accuracy"] == expected["accuracy"]
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    probabilities = load_exported(output).predict([tf.io.encode_png(image).numpy()])
    expected = tf.nn.softmax(load_trained(workdir).model((image[None] >= 127.5).astype(np.float32)))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)
