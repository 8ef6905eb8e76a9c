"""Evaluation counts every image once, for any batch, replicas, crops and ensemble."""

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from commands import launch
from small import small_mlp

from bn_keras.data import pipeline
from bn_keras.data.multi_crop import SINGLE_CROP, CropPreprocessing, Crops
from bn_keras.data.splits import Arrays, Source
from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import UsageError
from bn_keras.inference.evaluation import choose_config, evaluate_networks, format_error_rates
from bn_keras.inference.exported import load_exported
from bn_keras.inference.exporter import export_workdir
from bn_keras.inference.loading import TrainedNetwork, load_trained
from bn_keras.runs.settings import replaced
from bn_keras.runs.workdir import Interface, Workdir
from bn_keras.training.config_files import load_config
from bn_keras.training.evaluator import Evaluator, make_scorer
from bn_keras.training.loop import train_and_evaluate

ONE_DEVICE = tf.distribute.get_strategy()
SIZE, CLASSES, IMAGES = 14, 7, 23


def small_data():
    """Returns images that are larger than the network's input, and wider than high."""
    random = np.random.default_rng(0)
    arrays = Arrays(
        random.integers(0, 256, (IMAGES, 18, 25, 3), np.uint8),
        random.integers(0, CLASSES, IMAGES).astype(np.int32),
    )
    source = Source(tuple(map(str, range(CLASSES))), arrays, arrays)
    preprocessing = Preprocessing((SIZE, SIZE), "inception", mirror=True, distortion=1.0)
    return pipeline.Data(source, preprocessing, seed=0, shuffle="shards"), arrays


def small_network(seed, softmax=False):
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Conv2D(4, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        # With large weights, the mean of probabilities differs from that of logits.
        keras.layers.Dense(CLASSES, kernel_initializer=keras.initializers.RandomNormal(stddev=2.0)),
    ]
    if softmax:
        layers.append(keras.layers.Activation("softmax"))
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), *layers])


def mean_probabilities(model, crops, images):
    """Returns the mean probabilities over the crops of each image, computed in float64."""
    means = []
    for image in images:
        if crops.count == 1:
            preprocessing = Preprocessing((SIZE, SIZE), "inception", mirror=True, distortion=1.0)
            cut = preprocessing.process_batch(image[None], tf.constant([0]), None, 255)
        else:
            cut = crops.cut(crops.extract_squares(image[None], SIZE), SIZE) / 127.5 - 1
        exps = np.exp(model(cut, training=False).numpy().astype(np.float64))
        means.append(np.mean(exps / exps.sum(axis=1, keepdims=True), axis=0))
    return np.stack(means)


def metrics_of(probabilities, labels):
    order = np.argsort(-probabilities, axis=1)
    hits = order == labels[:, None]
    return {
        "examples": len(labels),
        "loss": -np.mean(np.log(probabilities[np.arange(len(labels)), labels])),
        "accuracy": hits[:, 0].mean(),
        "top5_accuracy": hits[:, :5].any(axis=1).mean(),
        "balanced_accuracy": np.mean([hits[labels == c, 0].mean() for c in np.unique(labels)]),
    }


@pytest.mark.parametrize("crops", ["1", "10", "2x3x6x2"])
def test_probabilities_are_averaged_over_crops_and_members(crops):
    crops = Crops.parse(crops)
    data, arrays = small_data()
    models = [small_network(seed) for seed in (0, 1, 2)]
    found = Evaluator(models, data, ONE_DEVICE, 32, crops)()
    members = [mean_probabilities(model, crops, arrays.images) for model in models]
    expected = [metrics_of(p, arrays.labels) for p in [*members, np.mean(members, axis=0)]]
    assert len(found) == 4
    for row, metrics in zip(found, expected, strict=True):
        assert row == pytest.approx(metrics, rel=1e-4)
    # The ensemble differs from each of its members.
    assert len({row["loss"] for row in found}) == 4


@pytest.mark.parametrize("crops", ["1", "10", "144"])
@pytest.mark.parametrize("global_batch_size", [2, 30, 64])
def test_results_do_not_depend_on_batch_and_replicas(crops, global_batch_size, two_replicas):
    crops = Crops.parse(crops)
    data, _ = small_data()
    reference = Evaluator([small_network(0)], data, ONE_DEVICE, 7, crops)()
    with two_replicas.scope():
        model = small_network(0)
    found = Evaluator([model], data, two_replicas, global_batch_size, crops)()
    assert found[0]["examples"] == IMAGES
    assert found[0] == pytest.approx(reference[0], rel=1e-5)


def test_a_model_call_has_at_most_the_batch_size():
    data, _ = small_data()
    sizes = []

    class BatchSizes(keras.layers.Layer):
        def call(self, x):
            sizes.append(x.shape[0])
            return x

    network = small_network(0)
    model = keras.Sequential([keras.Input((SIZE, SIZE, 3)), BatchSizes(), network])
    for crops, limit, size in [("144", 50, 48), ("144", 7, 6), ("10", 50, 50), ("10", 64, 60)]:
        sizes.clear()
        Evaluator([model], data, ONE_DEVICE, limit, Crops.parse(crops))()
        assert set(sizes) == {size}


def test_a_lost_image_raises(monkeypatch):
    data, _ = small_data()
    evaluate = Evaluator([small_network(0)], data, ONE_DEVICE, 8)
    evaluate()
    monkeypatch.setattr(data, "num_validation_examples", IMAGES + 1)
    with pytest.raises(AssertionError, match="23 of 24 validation examples were counted"):
        evaluate()


def test_a_batch_that_the_replicas_do_not_divide_is_rejected(two_replicas):
    data, _ = small_data()
    with pytest.raises(UsageError, match="15 cannot be split evenly over 2 replicas"):
        Evaluator([small_network(0)], data, two_replicas, 15, Crops.parse("10"))


def softmax_of(network):
    """Returns the operation keras.ops.softmax on a network's output."""
    return keras.Model(network.inputs[0], keras.ops.softmax(network.outputs[0]))


def nested(network):
    images = keras.Input((SIZE, SIZE, 3))
    return keras.Model(images, keras.Sequential([network])(images))


def averaged(network):
    images = keras.Input((SIZE, SIZE, 3))
    return keras.Model(images, keras.layers.Average()([network(images), network(images)]))


def with_one_image(network):
    images = keras.Input(batch_shape=(1, SIZE, SIZE, 3))
    return keras.Model(images, network(images))


FOREIGN = {
    "logits": lambda: small_network(0),
    "activation": lambda: small_network(0, softmax=True),
    "operation": lambda: softmax_of(small_network(0)),
    "nested": lambda: nested(small_network(0, softmax=True)),
    "nested operation": lambda: nested(softmax_of(small_network(0))),
    "average": lambda: averaged(small_network(0, softmax=True)),
    "one image": lambda: with_one_image(small_network(0, softmax=True)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_network_may_return_logits_or_probabilities(kind, tmp_path, two_replicas):
    images = tf.random.stateless_normal([4, SIZE, SIZE, 3], [0, 0])
    single = CropPreprocessing(small_data()[0].preprocessing, SINGLE_CROP)
    expected = tf.nn.log_softmax(small_network(0)(images))
    FOREIGN[kind]().save(tmp_path / "net.keras")
    for strategy in (None, two_replicas) if kind == "nested" else (None,):
        network = load_exported(tmp_path / "net.keras", strategy)
        assert network.num_classes == CLASSES and network.input_shape == (SIZE, SIZE, 3)
        batch_size = 1 if kind == "one image" else 4
        [found] = make_scorer([network.model], single, batch_size)(images)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("structure", [lambda x: [x], lambda x: {"out": x}], ids=["list", "dict"])
def test_a_foreign_network_may_return_its_output_in_a_structure(structure, tmp_path):
    network = small_network(0, softmax=True)
    keras.Model([network.inputs[0]], structure(network.outputs[0])).save(tmp_path / "net.keras")
    images = tf.random.stateless_uniform([3, SIZE, SIZE, 3], [0, 0], -1, 1)
    logits = load_exported(tmp_path / "net.keras").model(images)
    np.testing.assert_allclose(tf.nn.softmax(logits), network(images), rtol=1e-5)


def test_a_foreign_network_of_integer_images_is_refused(tmp_path):
    """Preprocessed images, from -1 to 1, would become black."""
    inputs = keras.Input((8, 8, 1), dtype="uint8")
    outputs = keras.layers.Dense(10)(
        keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    )
    keras.Model(inputs, outputs).save(tmp_path / "net.keras")
    with pytest.raises(UsageError, match="a network of uint8 images.*dtype float32"):
        load_exported(tmp_path / "net.keras")


def test_improbable_classes_of_a_foreign_network_are_possible(tmp_path):
    """Their probabilities are 0 in float32, and the mean loss of all images would be infinite."""
    images = keras.Input((1, 3, 1))
    model = keras.Model(images, keras.ops.softmax(keras.layers.Flatten()(images)))
    model.save(tmp_path / "net.keras")
    logits = load_exported(tmp_path / "net.keras").model(tf.constant([[[[0.0], [-9], [-400]]]]))
    assert logits[0, 2] < -80 and np.isfinite(logits).all()


def test_improbable_classes_keep_their_order():
    # Probabilities of e^-300 and e^-400 are both 0 in float32.
    logits = tf.constant([[[0.0, -300.0, -400.0]]])
    images = keras.Input((1, 3))
    model = keras.Model(images, keras.layers.Reshape((3,))(images))
    single = CropPreprocessing(Preprocessing((1, 3), "none"), SINGLE_CROP)
    scores = make_scorer([model, model], single, 1)(logits)
    np.testing.assert_allclose(scores[-1], [[0.0, -300.0, -400.0]], atol=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs on digits with different seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1, 2):
        train_and_evaluate(small_mlp(seed=seed), folder / str(seed))
    return [folder / str(seed) for seed in (0, 1, 2)]


def test_evaluating_a_run_reproduces_its_last_line(runs):
    last = Workdir(runs[0]).read_metrics()[-1]
    (found,) = evaluate_networks([runs[0]])
    assert (found["step"], found["statistics"]) == (60, "moving")
    assert (found["model"], found["models"], found["crops"]) == (str(runs[0]), 1, 1)
    for name in ("examples", "accuracy", "top5_accuracy", "loss"):
        assert found[name] == pytest.approx(last[f"validation/{name}"], rel=1e-6)
    assert found["top1_error"] == 1 - found["accuracy"]
    assert found["top5_error"] == 1 - found["top5_accuracy"]


def test_several_runs_are_evaluated_with_several_crops_and_as_an_ensemble(runs):
    rows = evaluate_networks(runs, crops=[SINGLE_CROP, Crops.parse("10")])
    assert [(row["model"], row["crops"], row["models"]) for row in rows] == [
        (name, crops, models)
        for crops in (1, 10)
        for name, models in [*((str(run), 1) for run in runs), ("ensemble", 3)]
    ]
    assert {row["examples"] for row in rows} == {355}
    # The cross-entropy of the mean is at most the mean of the cross-entropies.
    for members, ensemble in ((rows[:3], rows[3]), (rows[4:7], rows[7])):
        assert ensemble["loss"] < np.mean([row["loss"] for row in members])
    title, *lines, total = format_error_rates(rows).splitlines()
    assert title.split("  ")[-2:] == ["top-1 error", "top-5 error"]
    assert total == "355 images, each counted exactly once"
    for row, line in zip(rows, lines, strict=True):
        errors = f"{100 * row['top1_error']:.2f}%", f"{100 * row['top5_error']:.2f}%"
        assert line.split() == [row["model"], str(row["crops"]), str(row["models"]), *errors]
    assert len(set(map(len, [title, *lines]))) == 1


def test_frozen_batch_norm_is_found_inside_nested_models():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    model = keras.Sequential([keras.Input((4,)), inner, keras.layers.Dense(CLASSES)])
    network = TrainedNetwork(model, None, 0, "moving", (2, 2, 1), (), None)
    assert network.lacks_population_statistics
    inner.trainable = False
    assert not network.lacks_population_statistics


def test_folders_without_a_run_and_other_networks_are_rejected(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        evaluate_networks([tmp_path])
    config = small_mlp(**{"train.steps": 2})
    Workdir(tmp_path).create(config, Interface((8, 8, 1), "0123456789"))
    with pytest.raises(
        UsageError, match="no checkpoint of a trained network.* continue its training"
    ):
        evaluate_networks([tmp_path])
    with pytest.raises(UsageError, match="describes a different network from that of the run"):
        evaluate_networks([tmp_path], small_mlp(**{"model.variant": "baseline"}))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("evaluation.global_batch_size", "x", "invalid evaluation.global_batch_size='x': expected"),
        ("data.max_bad_examples", None, "invalid data.max_bad_examples=None: expected int"),
        ("distribution", "foo", "invalid distribution='foo'"),
        ("evaluation", ..., "config.json has no evaluation: an older version"),
        ("seed", ..., "config.json has no seed: an older version"),
    ],
)
def test_a_damaged_config_of_a_run_is_reported_on_one_line(runs, tmp_path, key, value, message):
    """An Ellipsis removes the key."""
    shutil.copytree(runs[0], tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    section, _, name = key.rpartition(".")
    holder = config[section] if section else config
    if value is ...:
        del holder[name]
    else:
        holder[name] = value
    file.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message) as caught:
        evaluate_networks([tmp_path / "run"])
    assert "\n" not in str(caught.value)


def test_a_run_of_a_version_with_fewer_settings_is_evaluated_and_resumed(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    older = json.loads(file.read_text())
    for section, name in (
        ("batch_norm", "virtual_batch_size"),
        ("data", "balance"),
        ("model", "freeze"),
        ("model", "modules"),
    ):
        del older[section][name]
    file.write_text(json.dumps(older))
    loaded = load_config(str(tmp_path / "run"))
    assert loaded == load_config(str(runs[0]))
    Workdir(tmp_path / "run").check(loaded)
    [row], [expected] = (evaluate_networks([run], loaded) for run in (tmp_path / "run", runs[0]))
    assert row | {"model": ""} == expected | {"model": ""}


def test_the_config_of_an_evaluation_may_differ_in_what_only_training_uses(tmp_path):
    trained = small_mlp(**{"model.init_from": "runs/other", "model.freeze": "all_but_head"})
    Workdir(tmp_path).create(trained, Interface((8, 8, 1), "0123456789"))
    for changes in ({}, {"model.initializer_stddev": 0.5}):
        config = small_mlp(**changes)
        assert choose_config(config, [tmp_path]) == config


def test_each_run_has_the_statistics_of_its_own_config(runs, tmp_path):
    """Whichever run is named first; a config that overrides them applies to all."""
    config = small_mlp(seed=5, **{"population.when": "end", "population.num_batches": 3})
    train_and_evaluate(config, tmp_path)
    shutil.rmtree(tmp_path / "finished")  # As in a run that is not finished.
    [alone] = evaluate_networks(tmp_path)
    assert alone["statistics"] == "population"
    together, reverse = (evaluate_networks(o) for o in ([tmp_path, runs[0]], [runs[0], tmp_path]))
    assert together[0] == reverse[1] == alone
    assert together[1] == reverse[0] == evaluate_networks(runs[0])[0]
    assert reverse[0]["statistics"] == "moving"
    never = replaced(load_config(str(tmp_path)), {"population.when": "never"})
    rows = evaluate_networks([tmp_path, runs[0]], never)
    assert [row["statistics"] for row in rows[:2]] == ["moving", "moving"]


def test_evaluators_do_not_cause_warnings_about_retracing(caplog):
    data, _ = small_data()
    for _ in range(7):
        Evaluator([small_network(0)], data, ONE_DEVICE, IMAGES)()
    assert "retracing" not in caplog.text


def test_members_with_other_classes_are_rejected(runs, tmp_path):
    config = small_mlp(**{"train.steps": 2})
    train_and_evaluate(config, tmp_path)
    assert load_trained(tmp_path).class_names == tuple("0123456789")
    interface = tmp_path / "interface.json"
    interface.write_text(interface.read_text().replace('"9"', '"nine"'))
    with pytest.raises(UsageError, match="were trained on different classes") as caught:
        evaluate_networks([runs[0], tmp_path])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.fixture
def folder_run(tmp_path):
    """A run on a folder with the classes a, b and c, and the folder."""
    colours = {"a": 10, "b": 120, "c": 240}
    for split in ("train", "validation"):
        for name, colour in colours.items():
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(4):
                image = np.full((9, 9, 3), colour + i, np.uint8)
                path = tmp_path / "pictures" / split / name / f"{i}.png"
                path.write_bytes(tf.io.encode_png(image).numpy())
    config = small_mlp(
        **{"data.name": "folder", "data.data_dir": str(tmp_path / "pictures")},
        **{"data.image_size": 8, "train.steps": 20, "data.binary": False},
    )
    train_and_evaluate(config, tmp_path / "run")
    return tmp_path / "run", tmp_path / "pictures"


def test_any_split_is_evaluated_with_classes_matched_by_name(folder_run, caplog):
    workdir, pictures = folder_run
    [expected] = evaluate_networks([workdir], per_class=True)
    # Training images are not needed.
    shutil.rmtree(pictures / "train")
    assert evaluate_networks([workdir], per_class=True) == [expected]
    # Without the first class, the numbers of the others must not move up.
    shutil.rmtree(pictures / "validation" / "a")
    (pictures / "validation").rename(pictures / "other")
    config = load_config(str(workdir / "config.json"))
    config.data.validation_split = "other"
    [found] = evaluate_networks([workdir], config, per_class=True)
    assert "classes without images in the data: 'a'" in caplog.text
    assert found["examples"] == 8
    assert found["per_class"][1:] == expected["per_class"][1:]
    assert found["per_class"][0] == {"label": "a", "images": 0, "accuracy": None}
    # All errors are 0 among the best five of three classes.
    assert found["classes"] == 3 and "top-5" not in format_error_rates([found])
    assert "top-1 error" in format_error_rates([found])
    (pictures / "other" / "b").rename(pictures / "other" / "B")
    with pytest.raises(UsageError, match="does not know: 'B'; the data lacks 'a', 'b'"):
        evaluate_networks([workdir], config)


def test_the_command_evaluates_a_run_of_several_workers_in_one_process(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    config = replaced(Workdir(run).read_config(), {"distribution.strategy": "multi_worker"})
    (run / "config.json").write_text(config.to_json())
    [row] = evaluate_networks([run])
    assert row["accuracy"] == evaluate_networks([runs[0]])[0]["accuracy"]
    done = launch("evaluate", f"--workdir={run}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == row and "mirrored: 1 CPU replica" in done.stderr


def test_the_command_overrides_the_config_of_the_run(folder_run):
    workdir, pictures = folder_run
    (pictures / "validation").rename(pictures / "other")
    shutil.rmtree(pictures / "train")
    done = launch(
        "evaluate", f"--workdir={workdir}", "--per_class", "--config.data.validation_split=other"
    )
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout and "most often predicted as" in done.stdout


def test_members_with_other_preprocessing_are_rejected(runs, tmp_path):
    train_and_evaluate(small_mlp(**{"train.steps": 2, "data.binary": False}), tmp_path)
    with pytest.raises(UsageError, match="data.binary is True, but the network in .*False") as e:
        evaluate_networks([runs[0], tmp_path])
    assert "\n" not in str(e.value)


def test_members_that_were_trained_on_other_crops_are_rejected(runs, tmp_path):
    cropped = shutil.copytree(runs[0], tmp_path / "cropped")
    config = Workdir(cropped).read_config()
    (cropped / "config.json").write_text(replaced(config, {"data.crop": "inception"}).to_json())
    message = "data.crop is none, but the network in .*cropped was trained with data.crop=inception"
    with pytest.raises(UsageError, match=message) as caught:
        evaluate_networks([runs[0], cropped])
    assert str(caught.value).endswith("evaluated one at a time") and "\n" not in str(caught.value)
    # A single network with another config, too.
    with pytest.raises(UsageError, match="--config=WORKDIR, or --config.data.crop=inception;"):
        evaluate_networks([cropped], config)
    # Several crops are cut from the whole image, whatever the training's crop is.
    ten = [Crops.parse("10")]
    *_, ensemble = evaluate_networks([runs[0], cropped], crops=ten)
    *_, twice = evaluate_networks([runs[0], runs[0]], crops=ten)
    assert ensemble["loss"] == pytest.approx(twice["loss"], rel=1e-6)


def test_whole_images_are_evaluated_alike_whether_training_shifts_them(runs):
    [expected] = evaluate_networks([runs[0]])
    config = replaced(Workdir(runs[0]).read_config(), {"data.crop": "shift"})
    [found] = evaluate_networks([runs[0]], config)
    assert found["loss"] == expected["loss"]
    # Resized images are not whole: "shift" keeps their aspect ratio.
    with pytest.raises(UsageError, match="data.crop=none"):
        evaluate_networks([runs[0]], replaced(config, {"data.image_size": 8}))


@pytest.mark.parametrize("when, statistics", [("end", "moving"), ("evaluations", "population")])
def test_the_best_network_is_evaluated_as_it_was_in_training(
    when, statistics, tmp_path, monkeypatch
):
    accuracies = iter([0.5, 0.9, 0.7])
    evaluate = Evaluator.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            Evaluator,
            "__call__",
            lambda self: [evaluate(self)[0] | {"accuracy": next(accuracies)}],
        )
        train_and_evaluate(
            small_mlp(**{"population.when": when, "population.num_batches": 2}), tmp_path
        )
    [recorded] = Workdir(tmp_path).read_metrics().evaluations(40)
    [found] = evaluate_networks([tmp_path], best=True)
    assert (found["step"], found["statistics"]) == (40, statistics)
    assert recorded["validation/statistics"] == statistics
    assert found["loss"] == pytest.approx(recorded["validation/loss"], rel=1e-6)


def test_exported_networks_are_evaluated_like_runs(runs, tmp_path):
    keras_file, folded, saved_model = (
        export_workdir(run, tmp_path / name, kind, fold=fold).output
        for run, name, kind, fold in (
            (runs[0], "a.keras", "keras", False),
            (runs[1], "b.keras", "keras", True),
            (runs[2], "c", "saved_model", False),
        )
    )
    config = Workdir(runs[0]).read_config()
    expected = evaluate_networks(runs)
    found = evaluate_networks([], config, exported=[keras_file, folded, saved_model])
    for row, other in zip(expected, found, strict=True):
        for name in ("examples", "loss", "top1_error", "top5_error"):
            assert other[name] == pytest.approx(row[name], rel=1e-4)
    assert [row["model"] for row in found][:3] == [*map(str, (keras_file, folded, saved_model))]
    *_, mixed = evaluate_networks(runs[:2], exported=[saved_model])
    assert mixed["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4)

    with pytest.raises(UsageError, match="does not record its data set: pass a config"):
        evaluate_networks(exported=[keras_file])
    other = small_mlp(**{"data.name": "synthetic", "data.image_size": 8})
    other.unlock()
    with pytest.raises(UsageError, match="but the network in .*a.keras was trained on images of"):
        evaluate_networks([], other, exported=[keras_file])
    other = replaced(config, {"data.image_size": 9})
    with pytest.raises(UsageError, match="=WORKDIR, or --config.data.image_size=8$"):
        evaluate_networks([], other, exported=[keras_file])
    other = replaced(config, {"data.binary": False})
    with pytest.raises(UsageError, match="=WORKDIR, or --config.data.binary=True; networks that"):
        evaluate_networks([], other, exported=[keras_file])


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda path: None,
            "is not an exported network: expected a .keras, .tflite, .onnx file or the folder of a",
        ),
        (lambda path: path.mkdir(), "is not an exported network"),
        (lambda path: path.write_bytes(b"PK\3\4 and no more"), "cannot be read as a network: "),
        (
            lambda path: keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(path),
            r"expected images \[N, height, width, channels\]",
        ),
    ],
)
def test_files_that_are_no_exported_network_are_rejected(make, message, tmp_path):
    make(tmp_path / "x.keras")
    with pytest.raises(UsageError, match=message) as caught:
        load_exported(tmp_path / "x.keras")
    assert "\n" not in str(caught.value) and "x.keras" in str(caught.value)
