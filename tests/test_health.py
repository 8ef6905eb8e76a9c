"""The check finds each fault that is planted in a healthy network, and nothing else."""

import dataclasses
import json
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import small_mlp

from bn_keras import BatchNormalization, estimate_population_statistics, health
from bn_keras.errors import UsageError
from bn_keras.health import check_batch_norm
from bn_keras.inference.run_check import check_workdir
from bn_keras.keras_internals import all_layers, layer_names
from bn_keras.training.loop import train_and_evaluate

KERAS_BN = keras.layers.BatchNormalization


def batches_of(num_batches):
    """Returns batches of images whose pixels resemble each other within an image."""
    rng = np.random.default_rng(0)
    return [
        (rng.normal(0.5, 2, [64, 1, 1, 3]) + rng.normal(size=[64, 6, 6, 3])).astype(np.float32)
        for _ in range(num_batches)
    ]


BATCHES = batches_of(4)


def network(cls=BatchNormalization):
    """Two convolutions with BatchNormalization, the second in a nested model, with dropout."""
    layers = keras.layers
    nested = keras.Sequential(
        [keras.Input([6, 6, 4]), layers.Conv2D(5, 3, name="conv_2"), cls(name="second")],
        name="nested",
    )
    images = keras.Input([6, 6, 3])
    x = layers.Conv2D(4, 3, padding="same", name="conv_1")(images)
    x = layers.ReLU()(cls(name="first")(x))
    x = nested(layers.Dropout(0.5)(x))
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    return keras.Model(images, layers.Dense(3, name="logits")(x), name="network")


def layer_of(model, name):
    return next(layer for layer in all_layers(model) if layer.name == name)


def healthy(cls=BatchNormalization):
    model = network(cls)
    estimate_population_statistics(model, BATCHES, len(BATCHES))
    return model


def set_values(variable, channels, change):
    values = np.array(variable)
    values[..., channels] = change(values[..., channels])
    variable.assign(values)


def found_in(report):
    return [(f.kind, f.layer.split("/")[-1], f.is_fault, f.channels) for f in report.findings]


@pytest.mark.parametrize("cls", [BatchNormalization, KERAS_BN])
def test_a_healthy_network_is_reported_with_its_measurements_and_unchanged(cls):
    model = healthy(cls)
    before = [v.numpy() for v in model.variables]
    report = check_batch_norm(model, BATCHES, len(BATCHES))
    assert not report.findings and not report.skipped and not report.has_faults
    assert (report.num_layers, report.num_channels) == (2, 9)
    assert report.population.num_batches == 4 and 0 < report.gap < 0.6
    summary, means, variances, outputs = str(report).splitlines()
    assert summary == "healthy: 2 BN layers, 9 channels"
    distance = r"0\.\d+ standard deviations"
    assert re.fullmatch(rf"  moving means: .* {distance} from .* data \(accepted: 1\)", means)
    assert re.fullmatch(r"  moving variances: .* times .* data \(accepted: 0.25 to 4\)", variances)
    assert re.fullmatch(rf"  outputs in .* mode: {distance} apart \(accepted: 1\)", outputs)
    for value, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(value, variable.numpy())
    # The layers follow the mode of the model again.
    model(BATCHES[0], training=False)
    moving_mean = layer_of(model, "second").moving_mean
    value = moving_mean.numpy()
    model(BATCHES[0], training=True)
    assert not np.array_equal(value, moving_mean.numpy())


class InferenceOnly(keras.layers.Layer):
    """Calls a model with training=False in both modes."""

    def __init__(self, model, **kwargs):
        super().__init__(**kwargs)
        self.model = model

    def call(self, x):
        return self.model(x, training=False)


def two_backbones():
    """Two nested models of one architecture, whose layers have equal paths."""

    def backbone(name):
        images = keras.Input([6, 6, 3])
        x = keras.layers.Conv2D(4, 3, name="conv")(images)
        return keras.Model(images, BatchNormalization(name="norm")(x), name=name)

    images = keras.Input([6, 6, 3])
    left, right = backbone("left"), backbone("right")
    x = keras.layers.Concatenate()([left(images), InferenceOnly(right, name="fixed")(images)])
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(x), name="twins"), left, right


def test_layers_of_equal_paths_are_judged_and_named_on_their_own():
    model, left, right = two_backbones()
    assert left.get_layer("norm").path == right.get_layer("norm").path
    report = check_batch_norm(model, BATCHES, 2)
    never_updated = {f.layer: f.is_fault for f in report.findings if f.kind == "never_updated"}
    assert never_updated == {"left/norm": True, "fixed/right/norm": False}
    assert [row.layer for row in report.population.rows] == ["left/norm"]
    set_values(left.get_layer("conv").kernel, 0, lambda v: v * np.nan)
    set_values(right.get_layer("norm").moving_variance, 1, lambda v: -v)
    found = {(f.layer, f.kind) for f in check_batch_norm(model).findings}
    assert {("left/conv", "not_finite"), ("fixed/right/norm", "negative_variance")} <= found
    assert ("left/norm", "never_updated") in found


def test_layers_that_refer_to_each_other_have_names():
    pairs = [keras.layers.Layer(name=name) for name in ("left", "right")]
    for pair in pairs:
        pair.inner = keras.layers.Dense(2, name="inner")
        pair.inner.owner = pair
    model = keras.Sequential(pairs)
    names = layer_names(model)
    assert len(set(names.values())) == len(names) == len(all_layers(model))
    assert {"left/inner", "right/inner"} <= set(names.values())


PLANTED = {
    "NaN in a kernel": (
        lambda m: set_values(layer_of(m, "conv_2").kernel, 1, lambda v: v * np.nan),
        [("not_finite", "conv_2", True, ())],
    ),
    "infinity in the layer's own weight": (
        lambda m: set_values(layer_of(m, "first").gamma, 2, lambda v: np.inf),
        [("not_finite", "first", True, ())],
    ),
    "negative variance": (
        lambda m: set_values(layer_of(m, "second").moving_variance, 3, lambda v: -v),
        [("negative_variance", "second", True, (3,))],
    ),
    "never updated": (
        lambda m: (
            set_values(layer_of(m, "first").moving_mean, slice(None), np.zeros_like),
            set_values(layer_of(m, "first").moving_variance, slice(None), np.ones_like),
        ),
        [("never_updated", "first", True, ())],
    ),
    "gamma almost 0 in one channel": (
        lambda m: set_values(layer_of(m, "second").gamma, 1, lambda v: -1e-4),
        [("dead", "second", False, (1,))],
    ),
    "gamma 0 in all channels": (
        lambda m: set_values(layer_of(m, "second").gamma, slice(None), np.zeros_like),
        [("dead", "second", True, (0, 1, 2, 3, 4))],
    ),
    "mean off in one channel": (
        lambda m: set_values(
            layer_of(m, "first").moving_mean,
            2,
            lambda v: v + 1.1 * np.sqrt(layer_of(m, "first").moving_variance[2] + 1e-3),
        ),
        [("stale", "first", True, ())],
    ),
    "variance too large in one channel": (
        lambda m: set_values(layer_of(m, "second").moving_variance, 0, lambda v: 4.5 * v),
        [("stale", "second", True, ())],
    ),
    "variance too small in one channel": (
        lambda m: set_values(layer_of(m, "second").moving_variance, 0, lambda v: v / 4.5),
        [("stale", "second", True, ())],
    ),
}


@pytest.mark.parametrize("cls", [BatchNormalization, KERAS_BN])
@pytest.mark.parametrize("plant, expected", PLANTED.values(), ids=PLANTED)
def test_only_the_planted_fault_is_found(plant, expected, cls):
    model = healthy(cls)
    plant(model)
    report = check_batch_norm(model, BATCHES, len(BATCHES))
    assert found_in(report) == expected
    assert report.has_faults == expected[0][2]
    row, summary, *measured = str(report).splitlines()
    [finding] = report.findings
    assert row.startswith("fault  " if report.has_faults else "note   ")
    assert row.endswith(f"{finding.layer}: {finding.text}. {finding.advice}")
    assert summary.startswith("1 fault, 0 notes: " if report.has_faults else "0 faults, 1 note: ")
    assert len(measured) == (2 if report.population else 0) + (report.gap is not None)


@pytest.mark.parametrize(
    "plant, expected",
    [
        (lambda m: None, []),
        (
            lambda m: set_values(layer_of(m, "second").gamma, 1, lambda v: 0),
            [("dead", "second", False, (1,))],
        ),
        (
            lambda m: set_values(layer_of(m, "conv_1").kernel, 1, np.zeros_like),
            [("dead", "first", False, (1,))],
        ),
        (
            lambda m: set_values(layer_of(m, "conv_1").kernel, 1, lambda v: v / 200),
            [("below_epsilon", "first", False, (1,))],
        ),
    ],
    ids=["nothing", "gamma", "constant", "small"],
)
def test_weights_are_checked_without_data(plant, expected):
    model = network()
    plant(model)
    estimate_population_statistics(model, BATCHES, len(BATCHES))
    report = check_batch_norm(model)
    assert found_in(report) == expected
    assert report.skipped == ("checks on data: no dataset was passed",)
    assert report.population is None and report.gap is None
    # Data adds no finding.
    assert found_in(check_batch_norm(model, BATCHES, len(BATCHES))) == expected


def test_sorted_data_causes_a_gap():
    """Each batch differs from the moving statistics, which are right on average."""
    model = network()
    batches = [x + 20 * i for i, x in enumerate(BATCHES)]
    estimate_population_statistics(model, batches, len(batches))
    report = check_batch_norm(model, batches, len(batches))
    assert found_in(report) == [("gap", "network", False, ())]
    assert report.gap > 1
    row, *_ = str(report).splitlines()
    assert f"training and inference mode are {report.gap:.2f} standard deviations apart" in row
    assert "If the validation accuracy is good, no action is needed; otherwise shuffle" in row


@pytest.mark.parametrize("cls", [BatchNormalization, KERAS_BN])
def test_the_gap_agrees_with_its_definition(cls):
    """Dropout does not contribute to the gap."""
    model = keras.Sequential(
        [keras.Input([3]), keras.layers.Dropout(0.5), cls(), keras.layers.Dropout(0.5)]
    )
    set_values(model.layers[1].moving_mean, slice(None), lambda v: v + 0.1)
    set_values(model.layers[1].moving_variance, slice(None), lambda v: v * 3)
    batches = [x.mean(axis=(1, 2)) for x in BATCHES]
    x = batches[0].astype(np.float64)
    training = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)
    inference = (x - 0.1) / np.sqrt(3 + 1e-3)
    gap = np.sqrt(np.mean((training - inference) ** 2) / np.mean(training**2))
    assert check_batch_norm(model, batches, 4).gap == pytest.approx(gap, rel=1e-5)


def test_the_gap_of_several_outputs_is_the_largest(two_replicas):
    with two_replicas.scope():
        model = network()
        model = keras.Model(model.inputs, [model.inputs[0], *model.outputs, model.outputs[0] * 0])
    data = tf.data.Dataset.from_tensor_slices(np.concatenate(BATCHES)).batch(64)
    estimate_population_statistics(model, data, 4)
    gaps = []
    for outputs in (model.outputs, model.outputs[:2], model.outputs[1]):
        part = keras.Model(model.inputs, outputs)
        gaps.append(check_batch_norm(part, data, 4, two_replicas).gap)
    # The last output is the same for all examples; the first has no gap.
    assert gaps[0] is None and gaps[1] == gaps[2] > 0


def test_a_scalar_output_has_no_gap():
    model = network()
    model = keras.Model(model.inputs, keras.ops.mean(model.outputs[0]))
    assert check_batch_norm(model, BATCHES, 4).gap is None


def test_the_gap_of_a_model_that_is_a_tf_function_is_measured():
    """An earlier trace would compute the same in both modes."""

    class Compiled(keras.Model):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def build(self, shape):
            pass

        @tf.function
        def call(self, inputs, training=None):
            return self.network(inputs, training=training)

    plain = network()
    model = Compiled(plain)
    model.build(None)
    model(BATCHES[0], training=True)
    model(BATCHES[0], training=False)
    report = check_batch_norm(model, BATCHES, 4)
    assert report.gap == pytest.approx(check_batch_norm(plain, BATCHES, 4).gap, rel=1e-5)
    assert len(report.population.rows) == 2


def test_a_subclass_whose_call_takes_no_mask_is_checked():
    class Norm(BatchNormalization):
        def call(self, inputs, training=None):
            return 2 * super().call(inputs, training=training)

    model = keras.Sequential([keras.Input([3]), Norm()])
    batches = [x.mean(axis=(1, 2)) for x in BATCHES]
    assert check_batch_norm(model, batches, 4).gap > 0


class Modes(keras.Model):
    """Calls two layers in fixed modes; None follows the mode of the model."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = (
            BatchNormalization(name="first"),
            BatchNormalization(name="second"),
        )
        self.modes = first, second

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x, training=None):
        for layer, mode in zip((self.first, self.second), self.modes, strict=True):
            x = layer(2 * x + 1, training=training if mode is None else mode)
        return x


def test_a_layer_in_inference_mode_only_counts_as_frozen():
    x = BATCHES[0].mean(axis=(1, 2))
    model = Modes(None, False)
    model.build(x.shape)
    estimate_population_statistics(model, [x], 1)
    set_values(model.first.moving_mean, slice(None), lambda v: v + 0.1)
    report = check_batch_norm(model, [x], 1)
    # The gap is that of the first layer, since the second one scales and shifts in both modes.
    gap = check_batch_norm(keras.Sequential([keras.Input([3]), model.first]), [2 * x + 1], 1).gap
    assert report.gap == pytest.approx(gap, rel=1e-4) and gap < 0.2
    assert [row.layer for row in report.population.rows] == [model.first.path]
    assert ("never_updated", "second", False, ()) in found_in(report)
    assert "second: never in training mode, and the moving mean" in str(report)


def test_a_model_that_never_trains_its_layers_is_not_run():
    x = BATCHES[0].mean(axis=(1, 2))
    model = Modes(False, False)
    model.build(x.shape)
    report = check_batch_norm(model, [x], 1)
    assert report.gap is None and not report.has_faults
    assert "skipped checks on data: the model calls no BatchNormalization in" in str(report)


def test_a_layer_in_training_mode_only_is_unchanged():
    x = BATCHES[0].mean(axis=(1, 2))
    model = Modes(True, None)
    model.build(x.shape)
    before = [v.numpy() for v in model.variables]
    check_batch_norm(model, [x], 1)
    for value, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(value, variable)


def test_an_unfoldable_layer_is_a_note():
    images = keras.Input([6, 6, 3])
    norm = BatchNormalization(name="norm")
    model = keras.Model(images, norm(keras.layers.ReLU(name="relu")(images)))
    estimate_population_statistics(model, BATCHES, 4)
    report = check_batch_norm(model, BATCHES, 4)
    assert found_in(report) == [("unfoldable", "norm", False, ())]
    assert "follows ReLU 'relu'" in str(report) and not report.has_faults


def test_an_unfoldable_layer_of_a_nested_model_has_the_name_that_other_findings_use():
    images = keras.Input([6, 6, 3])
    norm = BatchNormalization(name="norm")
    inner = keras.Model(images, norm(keras.layers.ReLU()(images)), name="inner")
    report = check_batch_norm(keras.Model(images, inner(images)))
    kinds = {finding.kind for finding in report.findings}
    assert kinds == {"never_updated", "unfoldable"}
    assert {finding.layer for finding in report.findings} == {norm.path}


def test_outputs_that_are_not_finite_in_training_mode_are_a_fault():
    class Logarithm(keras.layers.Layer):
        def call(self, x):
            return keras.ops.log(keras.ops.abs(x))

    images = keras.Input([6, 6, 3])
    model = keras.Model(images, Logarithm()(BatchNormalization()(images)))
    # Batch statistics normalize a constant to 0.
    report = check_batch_norm(model, [np.full_like(BATCHES[0], 2.0)], 1)
    (fault,) = [finding for finding in report.findings if finding.kind == "not_finite"]
    assert fault.text.startswith("NaN or infinity in the outputs in training mode")
    json.dumps(dataclasses.asdict(report), allow_nan=False)


def test_layers_frozen_on_purpose_are_notes_and_equal_findings_share_a_line():
    model = network()
    for name in ("first", "second"):
        layer_of(model, name).trainable = False
    report = check_batch_norm(model, BATCHES, 4)
    assert [finding[:3] for finding in found_in(report)] == [
        ("never_updated", "first", False),
        ("never_updated", "second", False),
    ]
    row, summary = str(report).splitlines()
    assert row.startswith("note   2 layers (first, nested/second): frozen, and the moving mean")
    assert summary.startswith("0 faults, 2 notes: 2 BN layers") and not report.has_faults

    # The same values are a fault in a layer that is trained; its line is another.
    layer_of(model, "second").trainable = True
    note, fault, *_ = str(check_batch_norm(model, BATCHES, 4)).splitlines()
    assert note.startswith("note   first: frozen") and fault.startswith("fault  nested/second: the")
    assert "call estimate_population_statistics" in fault


def test_findings_of_many_layers_are_counted_and_the_first_are_described():
    layers = [BatchNormalization(name=f"norm_{i}") for i in range(5)]
    model = keras.Sequential([keras.Input([3]), *layers], name="net")
    for i, layer in enumerate(layers):
        layer.moving_mean.assign(np.ones(3))
        set_values(layer.gamma, slice(1 + i % 2), np.zeros_like)
    row, *others, _ = str(check_batch_norm(model)).splitlines()
    assert row.startswith(
        "note   5 layers: net/norm_0: nearly constant output (dead) in 1 of 3 channels (0);"
        " net/norm_1: nearly constant output (dead) in 2 of 3 channels (0, 1); net/norm_2: nearly"
        " constant output (dead) in 1 of 3 channels (0); 2 more. These channels carry no"
    )
    # The findings that no layer can be folded are on one more line.
    assert [line.partition(":")[0] for line in others] == ["note   5 layers"]


@pytest.mark.parametrize("name", ["_ADVICE_ON_FAULTS", "_ADVICE_ON_NOTES"])
def test_the_page_explains_every_kind_of_finding(name):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "convert.md").read_text()
    section = page.partition("## Check the BN layers")[2].partition("\n## ")[0]
    for kind in getattr(health, name):
        assert f"(`{kind.removesuffix('_outputs')}`) | " in section


def test_skipped_checks_are_reported():
    plain = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    report = check_batch_norm(plain, [])
    assert str(report) == (
        "healthy: 0 BN layers, 0 channels; skipped checks on data: the model has no"
        " BatchNormalization"
    )
    model = healthy()
    model.trainable = False
    assert "all layers are frozen" in str(check_batch_norm(model, BATCHES, 4))

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = BatchNormalization()

        def call(self, inputs, training=None):
            return self.norm(inputs, training=training)

    model = Subclassed()
    with pytest.raises(UsageError, match="is not built"):
        check_batch_norm(model)
    model(BATCHES[0], training=True)
    assert "skipped check of folding: model" in str(check_batch_norm(model))


def test_something_else_than_a_model_raises():
    with pytest.raises(UsageError, match="model=None is invalid: expected a keras.Model"):
        check_batch_norm(None)


def test_non_finite_and_insufficient_data():
    model = healthy()
    report = check_batch_norm(model, [BATCHES[0] * np.inf], 1)
    assert found_in(report) == [("not_finite", "network", True, ())]
    with pytest.raises(UsageError, match="the dataset is empty"):
        check_batch_norm(model, [], 1)
    with pytest.raises(UsageError, match="ended after 4 of num_batches=20"):
        check_batch_norm(model, BATCHES)


@pytest.mark.parametrize(
    "plant, text",
    [
        ("mean off in one channel", r"moving means up to 1\.10 standard deviations off"),
        ("variance too small in one channel", r"moving variances 0\.22\d to 1 times .* data"),
    ],
)
def test_only_the_stale_statistics_are_named(plant, text):
    model = healthy()
    PLANTED[plant][0](model)
    assert re.fullmatch(text, check_batch_norm(model, BATCHES, 4).findings[0].text)


def test_outputs_that_are_none_or_text_are_left_out():
    class WithAuxiliary(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn, self.head = BatchNormalization(momentum=0.0), keras.layers.Dense(2)

        def call(self, x, training=None):
            logits = self.head(self.bn(x, training=training))
            text = tf.as_string(tf.argmax(logits, axis=-1))
            return logits, text, (logits if training else None)

    model = WithAuxiliary()
    model(BATCHES[0], training=True)
    report = check_batch_norm(model, BATCHES, 4)
    assert not report.has_faults and not any(f.kind == "not_finite" for f in report.findings)


def test_lagging_statistics_of_a_run_are_stale(tmp_path):
    train_and_evaluate(small_mlp(), tmp_path / "good")
    report = check_workdir(tmp_path / "good", 20)
    assert str(report).startswith("healthy: ") and report.skipped == ()

    lagging = {"batch_norm.momentum": 0.999}
    train_and_evaluate(small_mlp(**lagging), tmp_path / "lagging")
    report = check_workdir(tmp_path / "lagging", 20)
    assert {f.kind for f in report.findings} == {"stale"} and report.has_faults
    assert not check_workdir(tmp_path / "lagging", 0).findings
    json.dumps(dataclasses.asdict(report), allow_nan=False)

    # With population statistics (Algorithm 2), the same network is healthy.
    by_population = {"population.when": "end", "population.num_batches": 20}
    train_and_evaluate(small_mlp(**lagging, **by_population), tmp_path / "population")
    assert not check_workdir(tmp_path / "population", 20).findings


def test_weights_of_a_run_are_checked_without_its_data(tmp_path):
    train_and_evaluate(small_mlp(**{"train.steps": 2}), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"digits"', '"nowhere_to_be_found"'))
    report = check_workdir(tmp_path, 20)
    assert not report.findings and report.population is None
    assert len(report.skipped) == 1 and "nowhere_to_be_found" in report.skipped[0]
    with pytest.raises(UsageError, match="num_batches=-1 is invalid"):
        check_workdir(tmp_path, -1)


def test_a_constant_channel_is_dead_with_epsilon_0():
    norm = keras.layers.BatchNormalization(epsilon=0)
    model = keras.Sequential([keras.Input((3,)), norm])
    norm.moving_variance.assign([1.0, 0.0, 2.0])
    found = {finding.kind: finding.channels for finding in check_batch_norm(model).findings}
    assert found["dead"] == (1,)
