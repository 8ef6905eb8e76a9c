"""Loading, evaluation, prediction and export can use the network of the best evaluation."""

import shutil

import numpy as np
import pytest
import tensorflow as tf
from small import small_mlp

from bn_keras.errors import UsageError
from bn_keras.inference.evaluation import evaluate_networks
from bn_keras.inference.exporter import export_workdir
from bn_keras.inference.loading import load_trained
from bn_keras.inference.prediction import make_predictor
from bn_keras.training.loop import train_and_evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 60 steps with step 25 as its best."""
    folder = tmp_path_factory.mktemp("run")
    train_and_evaluate(small_mlp(**{"data.binary": False}), folder)
    shutil.rmtree(folder / "best")
    (folder / "best").mkdir()
    for file in (folder / "checkpoints").glob("step-25.*"):
        shutil.copy(file, folder / "best")
    return folder


def test_the_best_network_is_loaded_and_exported(run, tmp_path):
    best, last = load_trained(run, best=True), load_trained(run)
    assert (best.step, last.step) == (25, 60)
    report = export_workdir(run, tmp_path / "best.keras", best=True)
    assert (report.step, export_workdir(run, tmp_path / "last.keras").step) == (25, 60)


def test_the_best_network_predicts(run, tmp_path):
    image = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 1), dtype=np.uint8)
    image.write_bytes(tf.io.encode_png(pixels).numpy())
    expected = tf.nn.softmax(load_trained(run, best=True).model(pixels[None] / 127.5 - 1))[0]
    found = make_predictor([run], top_k=10, best=True)(image)
    found = {int(p.class_name): p.probability for p in found}
    np.testing.assert_allclose([found[i] for i in range(10)], expected, rtol=1e-4)
    assert make_predictor([run])(image)[0].probability != pytest.approx(max(found.values()))


def test_a_missing_best_network_is_reported(run, tmp_path):
    with pytest.raises(
        UsageError, match="best=True .* is invalid without a workdir, because an exported network"
    ):
        evaluate_networks(exported=["network.keras"], best=True)
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "best")
    with pytest.raises(UsageError, match="has no best checkpoint.* restore it from a copy") as e:
        load_trained(other, best=True)
    assert "\n" not in str(e.value)


def test_an_interrupted_save_of_the_finished_network_falls_back_to_the_latest(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (other / "finished").mkdir(exist_ok=True)
    # The data of a checkpoint is moved into its folder before the index.
    (other / "finished" / "step-60.data-00000-of-00001").write_bytes(b"")
    assert load_trained(other).step == 60
