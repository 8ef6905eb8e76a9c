"""Converted weights compute the same logits as the networks of their projects.

Those networks are implemented here independently, in float64, in the order and with the names of
their source code; tests/peers compares with the originals.
"""

import math
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import BNInception, convert
from bn_keras.errors import StorageError, UsageError
from bn_keras.models.bn_inception import FIGURE_5
from tests.commands import launch
from tests.test_launch import assert_fails_on_one_line

CLASSES = 7


class Network:
    """One project's network; its random tensors are created, under their names, on first use."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.tensors = {}
        self.names = self.layers()

    def logits(self, images, classes=CLASSES):
        x = self.unit(tf.constant(images, tf.float64), 64, 7, 2)
        x = self.pool(x, "max", 2)
        x = self.unit(self.unit(x, 64, 1), 192, 3)
        x = self.pool(x, "max", 2)
        for row in FIGURE_5:
            projection = self.projection if row.name in ("4c", "4d") else row.projection
            branches = [self.unit(x, row.conv1x1, 1)] if row.conv1x1 else []
            single = self.unit(x, row.reduce3x3, 1)
            branches.append(self.unit(single, row.conv3x3, 3, row.stride))
            double = self.unit(self.unit(x, row.reduce_double, 1), row.conv_double, 3)
            branches.append(self.unit(double, row.conv_double, 3, row.stride))
            pool = self.pool(x, row.pool, row.stride)
            branches.append(self.unit(pool, projection, 1) if projection else pool)
            x = tf.concat(branches, -1)
        return self.classify(tf.reduce_mean(x, (1, 2)), classes).numpy()

    def tensor(self, name, shape, scale=0.3):
        self.tensors[name] = self.rng.normal(0, scale, shape).astype(np.float32)
        return self.tensors[name].astype(np.float64)

    def positive(self, name, shape, most):
        self.tensors[name] = self.rng.uniform(0.5, most, shape).astype(np.float32)
        return self.tensors[name].astype(np.float64)


class Torch(Network):
    projection = 128

    def unit(self, x, filters, size, stride=1):
        conv, bn = next(self.names)
        kernel = self.tensor(
            f"{conv}.weight",
            (filters, x.shape[-1], size, size),
            (2 / (x.shape[-1] * size * size)) ** 0.5,
        )
        bias = self.tensor(f"{conv}.bias", filters)
        gamma = self.positive(f"{bn}.weight", filters, 1.3)
        beta = self.tensor(f"{bn}.bias", filters)
        mean = self.tensor(f"{bn}.running_mean", filters)
        variance = self.positive(f"{bn}.running_var", filters, 2)
        self.tensors[f"{bn}.num_batches_tracked"] = np.array(9)
        margin = [size // 2] * 2
        x = tf.pad(x, [[0, 0], margin, margin, [0, 0]])
        x = tf.nn.conv2d(x, kernel.transpose(2, 3, 1, 0), stride, "VALID") + bias
        return tf.nn.relu(gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta)

    def pool(self, x, kind, stride):
        if kind == "avg":
            x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
            return tf.nn.avg_pool2d(x, 3, stride, "VALID")
        # Output sizes round up; with stride 1 the padding is 1 on both sides.
        near = 1 if stride == 1 else 0
        far = [near if stride == 1 else 2 * math.ceil((n - 3) / 2) + 3 - n for n in x.shape[1:3]]
        paddings = [[0, 0], [near, far[0]], [near, far[1]], [0, 0]]
        x = tf.pad(x, paddings, constant_values=-np.inf)
        return tf.nn.max_pool2d(x, 3, stride, "VALID")

    def classify(self, x, classes):
        kernel = self.tensor(f"{self.classifier}.weight", (classes, 1024), 0.03)
        return x @ kernel.T + self.tensor(f"{self.classifier}.bias", classes)


class Cadene(Torch):
    classifier = "last_linear"

    def layers(self):
        names = ["conv1_7x7_s2", "conv2_3x3_reduce", "conv2_3x3"]
        halving = ["3x3_reduce", "3x3", "double_3x3_reduce", "double_3x3_1", "double_3x3_2"]
        for module in ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
            units = halving if module in ("3c", "4e") else ["1x1", *halving, "pool_proj"]
            names += [f"inception_{module}_{unit}" for unit in units]
        return ((name, f"{name}_bn") for name in names)


class Pytorchcv(Torch):
    classifier = "output"

    def layers(self):
        names = ["init_block.conv1", "init_block.conv2.conv1", "init_block.conv2.conv2"]
        for stage, unit in ((1, 1), (1, 2), *((2, n) for n in range(1, 6)), (3, 1), (3, 2), (3, 3)):
            branches = (
                "1.conv1 1.conv2 2.conv1 2.conv2 2.conv3"
                if stage > 1 and unit == 1
                else "1 2.conv1 2.conv2 3.conv1 3.conv2 3.conv3 4.conv"
            )
            names += [f"stage{stage}.unit{unit}.branches.branch{b}" for b in branches.split()]
        return ((f"features.{name}.conv", f"features.{name}.bn") for name in names)


class Slim(Network):
    projection = 96

    def __init__(self, separable=True, separable_bn=False, gamma=False):
        super().__init__()
        self.separable = separable
        self.separable_bn = separable_bn
        self.gamma = gamma

    def layers(self):
        names = ["Conv2d_1a_7x7", "Conv2d_2b_1x1", "Conv2d_2c_3x3"]
        for module in ("3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b", "5c"):
            units = (
                "0/Conv2d_0a_1x1 0/Conv2d_1a_3x3 1/Conv2d_0a_1x1 1/Conv2d_0b_3x3 1/Conv2d_1a_3x3"
                if module in ("4a", "5a")
                else "0/Conv2d_0a_1x1 1/Conv2d_0a_1x1 1/Conv2d_0b_3x3 2/Conv2d_0a_1x1"
                " 2/Conv2d_0b_3x3 2/Conv2d_0c_3x3 3/Conv2d_0b_1x1"
            )
            names += [f"Mixed_{module}/Branch_{unit}" for unit in units.split()]
        return (f"InceptionV2/{name}" for name in names)

    def unit(self, x, filters, size, stride=1):
        name = next(self.names)
        if size == 7 and self.separable:
            depthwise = self.tensor(f"{name}/depthwise_weights", (7, 7, 3, 8))
            x = tf.nn.depthwise_conv2d(x, depthwise, (1, stride, stride, 1), "SAME")
            x = tf.nn.conv2d(x, self.tensor(f"{name}/pointwise_weights", (1, 1, 24, 64)), 1, "SAME")
            if not self.separable_bn:
                return tf.nn.relu(x + self.tensor(f"{name}/biases", filters))
        else:
            shape = (size, size, x.shape[-1], filters)
            kernel = self.tensor(f"{name}/weights", shape, (2 / np.prod(shape[:3])) ** 0.5)
            x = tf.nn.conv2d(x, kernel, stride, "SAME")
        beta = self.tensor(f"{name}/BatchNorm/beta", filters)
        mean = self.tensor(f"{name}/BatchNorm/moving_mean", filters)
        variance = self.positive(f"{name}/BatchNorm/moving_variance", filters, 2)
        gamma = self.positive(f"{name}/BatchNorm/gamma", filters, 1.3) if self.gamma else 1
        return tf.nn.relu(gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta)

    def pool(self, x, kind, stride):
        return {"max": tf.nn.max_pool2d, "avg": tf.nn.avg_pool2d}[kind](x, 3, stride, "SAME")

    def classify(self, x, classes):
        name = "InceptionV2/Logits/Conv2d_1c_1x1"
        kernel = self.tensor(f"{name}/weights", (1, 1, 1024, classes), 0.03)
        return x @ kernel[0, 0] + self.tensor(f"{name}/biases", classes)


IMAGES = np.random.default_rng(1).normal(size=(2, 64, 96, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def cadene():
    """Tensors under Cadene's names, and their logits."""
    network = Cadene()
    logits = network.logits(IMAGES)
    return network.tensors, logits


@pytest.fixture(scope="module")
def slim():
    """Variables of a TF-Slim checkpoint, and their logits."""
    network = Slim()
    logits = network.logits(IMAGES)
    return network.tensors, logits


def _save_checkpoint(path, variables, version=2):
    names, values = list(variables), list(variables.values())
    if version == 1:
        tf.raw_ops.Save(filename=str(path), tensor_names=names, data=values)
    else:
        tf.raw_ops.SaveV2(
            prefix=str(path), tensor_names=names, shape_and_slices=[""] * len(names), tensors=values
        )
        tf.compat.v1.train.update_checkpoint_state(str(path.parent), str(path))


def _assert_computes(model, logits):
    assert logits.std() > 0.3
    np.testing.assert_allclose(model(IMAGES), logits, rtol=0, atol=1e-4)


def test_npz_with_cadenes_names_is_read(cadene, tmp_path):
    tensors, logits = cadene
    np.savez(tmp_path / "weights.npz", **tensors)
    model = convert.from_pytorch(tmp_path / "weights.npz", input_shape=(64, 96, 3))
    _assert_computes(model, logits)
    # The ports' count for 1000 classes, minus the parameters of the absent classes.
    parameters = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert parameters == 11_295_240 - (1000 - CLASSES) * 1025


def test_state_dict_with_pytorchcvs_names_is_read():
    network = Pytorchcv()
    logits = network.logits(IMAGES)
    _assert_computes(convert.from_pytorch(network.tensors, input_shape=(None, None, 3)), logits)


def test_prefixes_of_data_parallel_and_old_bn_shapes_are_read(cadene):
    tensors, logits = cadene
    tensors = {f"module.{k}": v[None] if "_bn." in k else v for k, v in tensors.items()}
    _assert_computes(convert.from_pytorch(tensors, input_shape=(64, 96, 3)), logits)


@pytest.mark.parametrize(
    "version, given", [(1, "model.ckpt-7"), (2, "model.ckpt-7.index"), (2, "")]
)
def test_training_checkpoint_of_slim_is_read(version, given, slim, tmp_path):
    """The path is its prefix, one of its files or its folder."""
    variables, logits = slim
    slots = {f"{k}/{s}": v + 1 for k, v in variables.items() for s in ("RMSProp", "RMSProp_1")}
    averages = {f"{k}/ExponentialMovingAverage": v - 1 for k, v in variables.items()}
    others = {"global_step": np.int64(7), "beta1_power": np.float32(0.9)}
    _save_checkpoint(tmp_path / "model.ckpt-7", variables | slots | averages | others, version)
    _assert_computes(convert.from_slim(tmp_path / given, input_shape=(64, 96, 3)), logits)


@pytest.mark.parametrize(
    "options",
    [
        {"separable": False},
        {"gamma": True},
        {"separable_bn": True},
        {"separable_bn": True, "gamma": True},
    ],
    ids=str,
)
def test_other_forms_of_slim_with_a_background_class_are_read(options, tmp_path):
    network = Slim(**options)
    logits = network.logits(IMAGES, classes=1001)
    _save_checkpoint(tmp_path / "model.ckpt", network.tensors)
    model = convert.from_slim(tmp_path / "model.ckpt.data-00000-of-00001", (64, 96, 3))
    assert model.output_shape == (None, 1001)
    _assert_computes(model, logits)


def _assert_rejected(read, source, *parts):
    with pytest.raises(UsageError) as raised:
        read(source)
    assert len(str(raised.value).splitlines()) == 1
    for part in parts:
        assert part in str(raised.value)


RESNET = {
    "conv1.weight": np.zeros((64, 3, 7, 7)),
    **{f"layer{i}.0.bn1.running_mean": np.zeros(64) for i in range(1, 5)},
}


def _changed(tensors, changes):
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    "changes, parts",
    [
        (
            {"inception_3a_1x1_bn.bias": None},
            ["416 tensors of Cadene's bninception: 1 missing (inception_3a_1x1_bn.bias)"],
        ),
        (
            {"fc.weight": np.zeros((3, 4))},
            ["416 tensors of Cadene's bninception: 1 extra (fc.weight)"],
        ),
        (
            {"inception_5b_3x3.weight": np.zeros((320, 192, 1, 1))},
            [
                "1 of the wrong shape (inception_5b_3x3.weight",
                "(320, 192, 1, 1) instead of (320, 192, 3, 3)",
            ],
        ),
        (
            {f"inception_4{m}_1x1.bias": None for m in "abcd"}
            | {"last_linear.weight": np.zeros((CLASSES, 1000)), "x": np.zeros(1)},
            ["4 missing", "inception_4c_1x1.bias, 1 more)", "1 extra (x)", "(7, 1000) instead of"],
        ),
    ],
)
def test_mismatched_tensors_are_listed(changes, parts, cadene):
    _assert_rejected(
        convert.from_pytorch, _changed(cadene[0], changes), "Cadene's bninception", *parts
    )


def test_mismatched_variables_of_a_checkpoint_are_listed(slim, tmp_path):
    beta = "InceptionV2/Mixed_3b/Branch_0/Conv2d_0a_1x1/BatchNorm/beta"
    changes = {
        beta: None,
        "InceptionV2/more": np.float32(0),
        "InceptionV2/Conv2d_1a_7x7/pointwise_weights": np.zeros((1, 1, 12, 64), np.float32),
    }
    _save_checkpoint(tmp_path / "model.ckpt", _changed(slim[0], changes))
    _assert_rejected(
        convert.from_slim,
        tmp_path / "model.ckpt",
        "model.ckpt does not contain the 277 tensors of TF-Slim's inception_v2",
        f"1 missing ({beta})",
        "1 extra (InceptionV2/more)",
        "1 of the wrong shape (InceptionV2/Conv2d_1a_7x7/pointwise_weights",
        "(1, 1, 12, 64) instead of (1, 1, 24, 64)",
    )


def test_tensors_of_another_network_are_rejected():
    _assert_rejected(convert.from_pytorch, RESNET, "416 missing", "5 extra (conv1.weight")
    _assert_rejected(convert.from_pytorch, {"state_dict": RESNET, "step": 3}, "5 extra")
    _assert_rejected(
        convert.from_pytorch, {"state_dict": None}, "contains a NoneType: expected a state dict"
    )


def test_a_checkpoint_of_another_network_is_rejected(tmp_path):
    _save_checkpoint(tmp_path / "model.ckpt", {"InceptionV1/Logits/biases": np.zeros(3)})
    _assert_rejected(convert.from_slim, tmp_path / "model.ckpt", "277 missing", "InceptionV2/")


@pytest.mark.parametrize("part", [0, 100, -1])
def test_a_truncated_npz_is_rejected(part, tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **RESNET)
    path.write_bytes(path.read_bytes()[:part])
    _assert_rejected(convert.from_pytorch, path, "weights.npz")


def test_a_damaged_tensor_in_an_npz_is_rejected(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **RESNET)
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1
    path.write_bytes(content)
    _assert_rejected(convert.from_pytorch, path, "weights.npz", "CRC")


@pytest.mark.parametrize("part", [0, 10_000, -1])
def test_a_truncated_checkpoint_is_rejected(part, slim, tmp_path):
    _save_checkpoint(tmp_path / "model.ckpt", slim[0])
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:part])
    _assert_rejected(convert.from_slim, tmp_path / "model.ckpt", "model.ckpt")


def test_other_files_are_rejected(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not weights\n" * 100)
    for path in (text, tmp_path, tmp_path / "nothing"):
        _assert_rejected(convert.from_slim, path, str(path), "TensorFlow checkpoint")
    _assert_rejected(convert.from_pytorch, tmp_path / "nothing.npz", "does not exist", "nothing")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    _assert_rejected(convert.from_pytorch, tmp_path / "array.npz", "array.npz", "an .npz file")


def test_a_pth_without_pytorch_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"something")
    _assert_rejected(
        convert.from_pytorch, tmp_path / "weights.pth", "install torch", "numpy.savez(PATH, **{"
    )


def test_converted_weights_load_in_the_builder(cadene, tmp_path):
    np.savez(tmp_path / "weights.npz", **cadene[0])
    written = tmp_path / "new" / "out.weights.h5"
    convert.convert_weights(tmp_path / "weights.npz", written)
    model = BNInception("bn_x5", CLASSES, (64, 96, 3), preset="caffe", weights=written)
    _assert_computes(model, cadene[1])
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.job
def test_weights_are_converted_in_a_bucket(cadene, tmp_path, memory_bucket):
    np.savez(tmp_path / "weights.npz", **cadene[0])
    weights, written = (str(memory_bucket / n) for n in ("weights.npz", "new/out.weights.h5"))
    tf.io.gfile.copy(str(tmp_path / "weights.npz"), weights)
    convert.convert_weights(weights, written)
    model = BNInception("bn_x5", CLASSES, (64, 96, 3), preset="caffe", weights=written)
    _assert_computes(model, cadene[1])


def test_an_unwritable_output_is_rejected_and_unchanged(cadene, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="expected a path ending in .keras or .weights.h5"):
        convert.convert_weights("weights.npz", tmp_path / "out.h5")
    output = tmp_path / "out.keras"
    output.write_text("before")
    with pytest.raises(UsageError, match="exists: pass another path, or overwrite=True"):
        convert.convert_weights("weights.npz", output)

    def fail(model, path):
        path.write_text("half of it")
        raise OSError("no space left")

    np.savez(tmp_path / "weights.npz", **cadene[0])
    monkeypatch.setattr(keras.Model, "save", fail)
    with pytest.raises(StorageError, match="cannot be written: no space left"):
        convert.convert_weights(tmp_path / "weights.npz", output, overwrite=True)
    with pytest.raises(StorageError, match="cannot be written: "):
        convert.convert_weights(tmp_path / "weights.npz", output / "out.keras")
    assert output.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"weights.npz", "out.keras"}


def test_something_else_than_a_path_is_rejected(tmp_path):
    for function in (convert.from_pytorch, convert.from_slim):
        with pytest.raises(UsageError, match="=5 is invalid: expected a path"):
            function(5)
    with pytest.raises(UsageError, match="output=None is invalid: expected a path"):
        convert.convert_weights(tmp_path / "a.npz", None)
    with pytest.raises(UsageError, match="weights=5 is invalid: expected a path"):
        convert.convert_weights(5, tmp_path / "out.keras")


def test_source_is_inferred_from_the_extension_or_passed(tmp_path):
    for name, source, part in [
        ("a.npz", None, "does not exist"),
        ("a.npz", "slim", "TensorFlow checkpoint"),
        ("a.ckpt", None, "TensorFlow checkpoint"),
        ("a.ckpt", "pytorch", "does not exist"),
    ]:
        with pytest.raises(UsageError, match=part):
            convert.convert_weights(tmp_path / name, tmp_path / "out.keras", source)
    with pytest.raises(UsageError, match="unknown source 'caffe': expected 'pytorch', 'slim'"):
        convert.convert_weights(tmp_path / "a.npz", tmp_path / "out.keras", "caffe")


@pytest.mark.job
def test_command_converts_and_describes_the_images(slim, tmp_path):
    _save_checkpoint(tmp_path / "model.ckpt", slim[0])
    done = launch("convert", f"--weights={tmp_path}/model.ckpt", f"--output={tmp_path}/out.keras")
    assert done.returncode == 0, done.stderr
    assert "TF-Slim's inception_v2 with 7 classes" in done.stderr
    assert "x / 127.5 - 1" in done.stderr
    model = keras.models.load_model(tmp_path / "out.keras")
    assert model.input_shape == (None, 224, 224, 3)
    expected = convert.from_slim(tmp_path / "model.ckpt")
    for ours, theirs in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.job
def test_command_rejects_another_network(tmp_path):
    np.savez(tmp_path / "resnet.npz", **RESNET)
    arguments = (f"--weights={tmp_path}/resnet.npz", f"--output={tmp_path}/out.keras")
    assert_fails_on_one_line(launch("convert", *arguments), 2, "resnet.npz", "416 missing")
    assert not (tmp_path / "out.keras").exists()


def test_command_names_a_missing_flag():
    assert_fails_on_one_line(launch("convert", "--weights=x.npz"), 2, "--output is missing")
