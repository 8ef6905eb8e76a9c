"""A converted or folded model preserves everything that the given model contains."""

import functools
import gc
import threading
import types
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization, fold_batch_norm, replace_batch_norm
from bn_keras.errors import UsageError
from bn_keras.keras_internals import all_layers
from bn_keras.model_copy import REMOVED

KERAS_BN = keras.layers.BatchNormalization
L = keras.layers


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def chain(shape, *layers, **options):
    x = inputs = keras.Input(shape, **options)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def adapted(layer, data):
    layer.adapt(data)
    return layer


# --- Models, each with an input. Most cannot be described by configs.


def _lambdas():
    factor = 3.0
    return chain(
        (4,),
        L.Lambda(lambda t: tf.square(t) * factor, output_shape=(4,)),
        L.Dense(3, activation=lambda t: tf.nn.relu(t)),
        KERAS_BN(beta_regularizer=lambda beta: 0.1 * keras.ops.sum(beta)),
    ), random(8, 4)


def _strings():
    lookup = adapted(L.StringLookup(output_mode="one_hot"), ["a", "b", "c"])
    layers = lookup, L.Dense(3), KERAS_BN()
    return chain((1,), *layers, dtype="string"), tf.constant([["a"], ["c"], ["?"]])


def _text():
    lower = functools.partial(tf.strings.lower, encoding="utf-8")
    text = L.TextVectorization(output_mode="tf_idf", standardize=lower)
    layers = adapted(text, ["a b", "b c", "C"]), L.Dense(3), KERAS_BN()
    return chain((), *layers, dtype="string"), tf.constant(["A b", "c", "?"])


def _integers():
    lookup = adapted(L.IntegerLookup(output_mode="multi_hot"), [1, 5, 9])
    return chain((2,), lookup, L.Dense(3), KERAS_BN(), dtype="int64"), np.array([[1, 5], [9, 2]])


def _numbers():
    buckets = adapted(L.Discretization(num_bins=4), random(50, 1))
    normalization = adapted(L.Normalization(), random(50, 1) * 3 + 2)
    inputs = keras.Input((1,))
    x = L.Concatenate()([L.Flatten()(L.Embedding(5, 3)(buckets(inputs))), normalization(inputs)])
    return keras.Model(inputs, KERAS_BN()(L.Dense(3)(x))), random(6, 1)


def _lora():
    model = chain((4,), L.Dense(3), KERAS_BN(), L.Dense(5))
    _, first, _, second = model.layers
    first.enable_lora(2)
    second.enable_lora(1)
    first.lora_kernel_b.assign(random(2, 3))
    return model, random(6, 4)


def _quantized():
    model = chain((4,), L.Dense(3), KERAS_BN(), L.Dense(5))
    for layer in model.layers[1::2]:
        layer.quantize("int8")
    return model, random(6, 4)


def _shared_at_several_levels():
    inner = chain((4,), L.Dense(4), KERAS_BN(), L.Dense(4))
    middle = chain((4,), inner, KERAS_BN(), inner)
    inputs = keras.Input((4,))
    sequence = L.TimeDistributed(inner)(L.RepeatVector(3)(inputs))
    return keras.Model(inputs, [middle(inputs), inner(inputs), sequence]), random(6, 4)


def _pieces_of_a_model():
    x = inputs = keras.Input((4,))
    for _ in range(3):
        x = KERAS_BN()(L.Dense(4)(x))
    whole = keras.Model(inputs, x)
    start = keras.Model(inputs, whole.layers[3].output)
    end = keras.Model(whole.layers[2].output, whole.layers[5].output)
    inputs = keras.Input((4,))
    return keras.Model(inputs, [whole(inputs), start(inputs), end(inputs)]), random(6, 4)


class Unconfigurable(L.Layer):
    """A layer without get_config, whose weights have the same name."""

    def __init__(self, units, function):
        super().__init__()
        self.units, self.function, self.settings = units, function, {"a": [np.ones(3)]}

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="w")
        self.more = [self.add_weight(shape=(), name="w", initializer="ones")]

    def call(self, x):
        return self.function(x @ self.kernel) * self.more[0]


def _custom_layers():
    return chain((4,), Unconfigurable(3, lambda t: tf.tanh(t)), L.Dense(3), KERAS_BN()), random(
        6, 4
    )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks, self.norms = [L.Dense(4), L.Dense(3)], {"last": KERAS_BN()}

    def call(self, x, training=None):
        for block in self.blocks:
            x = block(x)
        return self.norms["last"](x, training=training)


def _subclassed():
    model, x = Subclassed(), random(6, 4)
    model(x)
    return model, x


def _nested_subclassed():
    return chain((4,), Subclassed(), L.Dense(2)), random(6, 4)


class Cell(L.Layer):
    def __init__(self):
        super().__init__()
        self.state_size, self.dense, self.norm = 3, L.Dense(3), KERAS_BN()

    def build(self, shape):
        self.dense.build((shape[0], shape[-1] + 3))
        self.norm.build((shape[0], 3))

    def call(self, x, states, training=None):
        y = self.norm(self.dense(tf.concat([x, states[0]], -1)), training=False)
        return y, [y]


def _recurrent():
    return chain(
        (5, 4),
        L.Masking(),
        L.TimeDistributed(KERAS_BN()),
        L.Bidirectional(L.LSTM(3, return_sequences=True, dropout=0.2)),
        L.RNN(Cell(), return_sequences=True),
        KERAS_BN(axis=1),
    ), random(6, 5, 4)


def _operations():
    inputs = keras.Input((4, 6))
    x = keras.ops.einsum("bij->bji", inputs)[:, 1:3]
    x = keras.ops.concatenate(keras.ops.split(x, 2, axis=1), -1) + np.ones(8, np.float32)
    symbolic = keras.KerasTensor((None, 1, 8))
    function = keras.Function(symbolic, keras.ops.tanh(symbolic) * 2)
    return keras.Model(inputs, KERAS_BN()(function(x)) * 2), random(6, 4, 6)


def _structures():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    x, norm = L.Concatenate()([a, b]), KERAS_BN()
    model = keras.Model({"a": a, "b": b}, {"p": norm(x), "q": [L.Dense(2)(norm(x)), (a,)]})
    return model, {"a": random(6, 4), "b": random(6, 3)}


def _sequential_without_input():
    model = keras.Sequential([L.Dense(4), KERAS_BN(), keras.Sequential([L.Dense(3), KERAS_BN()])])
    model.build((None, 4))
    return model, random(6, 4)


def _random_numbers():
    return chain((4,), L.Dropout(0.5), L.GaussianNoise(1.0, seed=3), KERAS_BN()), random(6, 4)


class Functional(keras.Model):
    """A functional model with a constructor, attributes and a train_step of its own."""

    def __init__(self, units, function):
        inputs = keras.Input((4,))
        features = KERAS_BN(name="norm")(L.Dense(units)(inputs))
        super().__init__(inputs, L.Dense(2)(features))
        self.features, self.function, self.unused = {"x": features}, function, L.Dense(3)

    def train_step(self, data):
        return super().train_step(data) | {"function": self.function()}


def _functional_subclass():
    return Functional(5, lambda: 2.0), random(6, 4)


def _policies():
    return chain(
        (4,),
        L.Dense(4, dtype="mixed_bfloat16"),
        KERAS_BN(dtype="mixed_bfloat16"),
        L.Dense(3, dtype="float64"),
        KERAS_BN(dtype="float64"),
    ), random(6, 4)


class Doubling(keras.constraints.Constraint):
    def __call__(self, w):
        return 2 * w


def _regularizers_and_constraints():
    dense = L.Dense(4, kernel_constraint="max_norm", activity_regularizer="l1")
    norm = KERAS_BN(gamma_constraint=Doubling(), gamma_regularizer="l2", momentum=0.5)
    norm.activity_regularizer = keras.regularizers.L1(0.1)
    return chain((4,), dense, norm, KERAS_BN(trainable=False)), random(6, 4)


class OfTensorFlow(L.Layer):
    def __init__(self):
        super().__init__()
        self.variable, self.module = tf.Variable(2.0), tf.Module()
        self.module.variable = tf.Variable(3.0)
        self.function = tf.function(self.multiply, reduce_retracing=True)

    def multiply(self, x):
        return x * self.variable * self.module.variable

    def call(self, x):
        return self.function(x)


def _captured():
    """Functions that capture layers and variables in each way that Python has."""
    dense, variable = L.Dense(4), tf.Variable(2.0)
    dense.build((None, 4))
    layers = [dense]
    return chain(
        (4,),
        OfTensorFlow(),
        L.Lambda(lambda t: layers[0](t) * variable, output_shape=(4,)),
        L.Lambda(lambda t, layer=dense: layer(t), output_shape=(4,)),
        L.Lambda(dense.call, output_shape=(4,)),
        KERAS_BN(),
    ), random(6, 4)


class Transposed(L.Layer):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def call(self, x):
        return x @ keras.ops.transpose(self.kernel)


def _tied():
    """An autoencoder whose decoder has the kernel of its encoder."""
    dense = L.Dense(3)
    dense.build((None, 4))
    return chain((4,), dense, KERAS_BN(), L.ReLU(), Transposed(dense.kernel)), random(6, 4)


def _images():
    return chain(
        (6, 6, 3),
        L.SpectralNormalization(L.Conv2D(4, 3)),
        L.SeparableConv2D(4, 3, name="a.b-c"),
        KERAS_BN(name="norm>1"),
        L.Conv2DTranspose(3, 2),
        KERAS_BN(renorm=True, renorm_clipping={"rmax": 2.0}),
    ), random(4, 6, 6, 3)


def _stateful():
    inputs = keras.Input(batch_shape=(4, 5, 3))
    return keras.Model(inputs, KERAS_BN()(L.GRU(3, stateful=True)(inputs))), random(4, 5, 3)


MODELS = {
    f.__name__.strip("_"): f
    for f in (
        *(_lambdas, _strings, _text, _integers, _numbers, _lora, _quantized),
        *(_shared_at_several_levels, _pieces_of_a_model, _custom_layers, _subclassed),
        *(_nested_subclassed, _recurrent, _operations, _structures, _sequential_without_input),
        *(_random_numbers, _functional_subclass, _policies, _regularizers_and_constraints),
        *(_captured, _tied, _images, _stateful),
    )
}


def trained(model):
    """Sets the parameters and statistics of BN to values that a trained model could have."""
    rng = np.random.default_rng(3)
    for layer in all_layers(model):
        if isinstance(layer, KERAS_BN):
            for weight in layer.weights:
                weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def run(model, x, **options):
    return [np.asarray(tf.cast(y, tf.float64)) for y in keras.tree.flatten(model(x, **options))]


def assert_close(actual, expected, rtol=1e-4):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def signature(model):
    return [(v.path, v.trainable, v.dtype, tuple(v.shape)) for v in model.variables]


def reachable(root):
    """Returns all objects that can be reached from a model through attributes and closures."""
    found, queue = {}, [root]
    while queue:
        value = queue.pop()
        if id(value) in found or isinstance(value, str | int | float | type | types.ModuleType):
            continue
        found[id(value)] = value
        if isinstance(value, dict):
            queue += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            queue += list(value)
        elif isinstance(value, types.MethodType):
            queue.append(value.__self__)
        elif isinstance(value, types.FunctionType):
            queue += [cell.cell_contents for cell in value.__closure__ or ()]
            queue += [value.__defaults__, value.__kwdefaults__]
        queue += getattr(value, "__dict__", {}).values()
    return found


STATEFUL = (keras.Operation, keras.Variable, keras.KerasTensor, tf.Variable)
STATEFUL += (keras.Metric, keras.Loss, keras.optimizers.Optimizer)


def assert_shares_nothing(copied, model):
    given = reachable(model)
    common = [x for i, x in reachable(copied).items() if i in given and isinstance(x, STATEFUL)]
    assert not common
    assert not [x for x in reachable(copied).values() if x is REMOVED]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_converted_model_differs_only_in_batch_norm(make):
    model, x = make()
    trained(model)
    calls = [len(layer._inbound_nodes) for layer in all_layers(model)]
    values = [v.numpy() for v in model.variables]
    copied = replace_batch_norm(model)
    assert [len(layer._inbound_nodes) for layer in all_layers(model)] == calls
    assert type(copied) is type(model) and copied.name == model.name
    before, after = all_layers(model), all_layers(copied)
    replaced = [(a, b) for a, b in zip(after, before, strict=True) if type(a) is not type(b)]
    assert replaced
    assert {(type(a), type(b)) for a, b in replaced} == {(BatchNormalization, KERAS_BN)}
    for a, b in zip(after, before, strict=True):
        assert (a.name, a.path, a.trainable) == (b.name, b.path, b.trainable)
        assert a.dtype_policy.name == b.dtype_policy.name
    assert signature(copied) == signature(model)
    for a, b, value in zip(copied.variables, model.variables, values, strict=True):
        np.testing.assert_array_equal(a, value)
        np.testing.assert_array_equal(b, value)
    assert_shares_nothing(copied, model)
    rtol = 2e-2 if make is _policies else 1e-4
    # The last call depends on the updates of the others: moving statistics, seeds, states.
    for training in (False, True, True, False):
        assert_close(run(copied, x, training=training), run(model, x, training=training), rtol)
        assert_close([sum(copied.losses, 0.0)], [sum(model.losses, 0.0)], rtol)


NOTEBOOK = """
import keras

def transpose(x):
    return keras.ops.transpose(dense.kernel)

dense = keras.layers.Dense(3, name="encoder")
norm = keras.layers.BatchNormalization(name="norm")
outside = keras.Variable(2.0)
inputs = keras.Input((4,))
x = norm(keras.layers.ReLU()(dense(inputs)))
decode = keras.layers.Lambda(
    lambda t: [t @ transpose(t) * outside for _ in range(1)][0], name="decode", output_shape=(4,)
)
again = keras.layers.Lambda(lambda t: norm(keras.ops.matmul(t, dense.kernel)), name="again")
model = keras.Model(inputs, again(decode(x)))
"""


@pytest.mark.parametrize("convert", [replace_batch_norm, fold_batch_norm])
def test_functions_that_use_global_layers_use_those_of_the_copy(convert):
    namespace = {"__name__": "notebook"}
    exec(NOTEBOOK, namespace)
    model, x = trained(namespace["model"]), random(6, 4)
    expected = run(model, x)
    copied = convert(model)
    if convert is fold_batch_norm:
        copied, report = copied
        assert report.kept["norm"] == "is also used by Lambda 'again'"
    assert_close(run(copied, x), expected)
    model.get_layer("encoder").kernel.assign(random(4, 3, seed=7))
    model.get_layer("norm").beta.assign([5.0, 6.0, 7.0])
    assert_close(run(copied, x), expected)
    # The kernel is still tied in the copy, and what is not part of the model is shared.
    copied.get_layer("encoder").kernel.assign(model.get_layer("encoder").kernel)
    copied.get_layer("norm").beta.assign([5.0, 6.0, 7.0])
    assert_close(run(copied, x), run(model, x))
    namespace["outside"].assign(3.0)
    assert_close(run(copied, x), run(model, x))
    if convert is replace_batch_norm:
        assert "norm" not in copied.get_layer("again").function.__code__.co_freevars
        used = copied.get_layer("again").function.__globals__["norm"]
        assert used is copied.get_layer("norm") and type(used) is BatchNormalization
    assert namespace["norm"] is model.get_layer("norm")


FOLDABLE = {name: make for name, make in MODELS.items() if make is not _subclassed}


@pytest.mark.parametrize("make", FOLDABLE.values(), ids=FOLDABLE)
def test_a_folded_model_differs_only_in_batch_norm(make):
    """Folding itself checks that the outputs are the same."""
    model, x = make()
    trained(model)
    values = [v.numpy() for v in model.variables]
    folded, report = fold_batch_norm(model, x)
    for variable, value in zip(model.variables, values, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert type(folded) is type(model) and folded.name == model.name
    assert_shares_nothing(folded, model)
    kept = {name.rpartition("/")[2] for name in report.kept}

    def others(network):
        return {
            (type(layer), layer.name, layer.trainable, layer.dtype_policy.name)
            for layer in all_layers(network)
            if layer.name not in kept and not isinstance(layer, KERAS_BN)
        }

    assert others(folded) == others(model)
    seeds = [
        {v.path: v.numpy().tolist() for v in m.variables if "seed" in v.name}
        for m in (folded, model)
    ]
    assert seeds[0] == seeds[1]


def test_attributes_refer_to_the_copy():
    model, x = _functional_subclass()
    model.compile("sgd", "mse", run_eagerly=True)
    copied = replace_batch_norm(model)
    features = [keras.Model(m.input, m.features["x"]) for m in (copied, model)]
    assert_close(run(features[0], x), run(features[1], x))
    assert features[0].get_layer("norm") is copied.get_layer("norm")
    assert copied.fit(x, random(6, 2), verbose=0).history["function"] == [2.0]


def test_attributes_that_contain_the_model_contain_its_copy():
    model = chain((4,), L.Dense(3), KERAS_BN())
    for layer in model.layers[1:]:
        vars(layer)["parents"] = [model]
    for copied in (replace_batch_norm(model), fold_batch_norm(model)[0]):
        assert all(layer.parents == [copied] for layer in copied.layers[1:])


def test_a_weak_reference_to_a_layer_refers_to_its_copy():
    model, other = chain((4,), L.Dense(3), KERAS_BN()), L.Dense(1)
    dense = model.layers[1]
    vars(model)["first"], vars(dense)["model"] = weakref.ref(dense), weakref.ref(model)
    vars(dense)["other"] = weakref.ref(other)
    copied = replace_batch_norm(model)
    assert copied.first() is copied.layers[1] and copied.layers[1].model() is copied
    assert copied.layers[1].other() is other


def test_lists_of_layers_stay_tracked():
    model = Functional(3, None)
    model.more = [L.Dense(2)]
    copied = replace_batch_norm(model)
    copied.more.append(L.Dense(2, name="new"))
    assert "new" in [layer.name for layer in all_layers(copied)]
    assert "new" not in [layer.name for layer in all_layers(model)]


def test_a_function_that_refers_to_the_model_refers_to_its_copy():
    model = chain((4,), L.Dense(3), KERAS_BN())
    model.compile("sgd", lambda y, p: tf.reduce_sum(model.layers[1].kernel), run_eagerly=True)
    x, copied = random(6, 4), replace_batch_norm(model)
    model.layers[1].kernel.assign(tf.zeros([4, 3]))
    assert model.evaluate(x, x[:, :3], verbose=0) == 0 != copied.evaluate(x, x[:, :3], verbose=0)


def test_adapting_the_given_model_again_leaves_its_copy_alone():
    model, x = _strings()
    copied = replace_batch_norm(model)
    expected = run(copied, x)
    model.layers[1].adapt(["z", "y", "x"])
    assert_close(run(copied, x), expected)
    assert list(copied.layers[1].get_vocabulary()) == ["[UNK]", "c", "b", "a"]


def test_changeable_objects_of_tensorflow_are_copied():
    layer = L.Identity()
    layer.generator = tf.random.Generator.from_seed(1)
    layer.table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    layer.table.insert(["a"], [3])
    model = chain((4,), layer, KERAS_BN())
    copied = replace_batch_norm(model).layers[1]
    layer.table.insert(["a"], [5])
    assert copied.table.lookup(tf.constant(["a", "b"])).numpy().tolist() == [3, -1]
    np.testing.assert_array_equal(copied.generator.normal([2]), layer.generator.normal([2]))


@pytest.mark.parametrize(
    "value, message",
    [
        (threading.Lock(), "cannot pickle '_thread.lock'"),
        ({"a": [(i for i in "ab")]}, "cannot pickle 'generator'"),
        (
            tf.lookup.experimental.DenseHashTable(tf.int64, tf.int64, -1, -1, -2),
            "TensorFlow cannot copy a DenseHashTable",
        ),
        (
            tf.function(lambda: tf.zeros([])).get_concrete_function(),
            "TensorFlow cannot copy a ConcreteFunction",
        ),
        (tf.__internal__.tracking.AutoTrackable(), "TensorFlow cannot copy a AutoTrackable"),
    ],
    ids=["lock", "generator", "table", "function", "loaded"],
)
@pytest.mark.parametrize("convert", [replace_batch_norm, fold_batch_norm])
def test_what_cannot_be_copied_is_named(convert, value, message):
    layer = L.Dense(3, name="odd")
    model = chain((4,), layer, L.Dense(2), KERAS_BN())
    layer.resource = value
    with pytest.raises(UsageError, match=rf"'resource' of Dense 'odd' cannot .*{message}") as error:
        convert(model)
    assert "\n" not in str(error.value)


# --- Compiled models.


class Focal(keras.losses.Loss):
    """A loss without get_config."""

    def __init__(self, power):
        super().__init__(name="focal")
        self.power = power

    def call(self, y, p):
        return tf.abs(y - p) ** self.power


class AboveThreshold(keras.metrics.Metric):
    """A metric without get_config."""

    def __init__(self, threshold=0.5, **options):
        super().__init__(**options)
        self.threshold, self.count = threshold, self.add_weight(name="n", initializer="zeros")

    def update_state(self, y, p, sample_weight=None):
        self.count.assign_add(tf.reduce_sum(tf.cast(p > self.threshold, tf.float32)))

    def result(self):
        return self.count


class Decay(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / (1.0 + tf.cast(step, tf.float32))


class Boosted(keras.optimizers.SGD):
    """An optimizer without get_config."""

    def __init__(self, factor):
        super().__init__(0.01, momentum=0.9)
        self.factor = factor

    def update_step(self, gradient, variable, rate):
        super().update_step(gradient * self.factor, variable, rate)


COMPILED = {
    "custom objects": lambda: {
        "optimizer": keras.optimizers.Adam(Decay(0.1)),
        "loss": {"p": lambda y, p: tf.reduce_mean((y - p) ** 2), "q": Focal(1.5)},
        "loss_weights": {"p": 0.5, "q": 2.0},
        "metrics": {"p": [lambda y, p: tf.reduce_max(p), AboveThreshold(0.1, name="above")]},
        "weighted_metrics": {"q": ["mae"]},
        "run_eagerly": True,
    },
    "custom optimizer": lambda: {
        "optimizer": Boosted(2.0),
        "loss": "mse",
        "metrics": {"p": "mae"},
        "run_eagerly": True,
    },
    "rate function": lambda: {
        "optimizer": keras.optimizers.SGD(lambda: 0.05, clipnorm=1.0),
        "loss": "mse",
        "run_eagerly": True,
    },
    "loss scale": lambda: {
        "optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
        "loss": "mse",
        "run_eagerly": True,
    },
    "steps_per_execution": lambda: {
        "optimizer": keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(0.01, 9),
            use_ema=True,
            gradient_accumulation_steps=2,
        ),
        "loss": "mse",
        "steps_per_execution": 3,
    },
}


def _two_heads():
    x = inputs = keras.Input((4,))
    x = L.Dropout(0.3)(KERAS_BN()(L.Dense(4)(x)))
    return keras.Model(inputs, {"p": L.Dense(1, name="p")(x), "q": L.Dense(3, name="q")(x)})


@pytest.mark.parametrize("arguments", COMPILED.values(), ids=COMPILED)
def test_a_compiled_model_trains_as_the_given_model_would(arguments):
    model = _two_heads()
    model.compile(**arguments())
    x, y = random(16, 4), {"p": random(16, 1), "q": random(16, 3)}

    def fit(network):
        return network.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history

    fit(model)
    copied = replace_batch_norm(model)
    folded, _ = fold_batch_norm(model, x)
    assert_shares_nothing(copied, model)
    assert_shares_nothing(folded, model)
    for network in (copied, folded):
        assert type(network.optimizer) is type(model.optimizer)
        assert int(network.optimizer.iterations) == int(model.optimizer.iterations)
        assert network.run_eagerly == model.run_eagerly
        assert network.steps_per_execution == model.steps_per_execution
    expected = model.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
    actual = folded.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)
    expected, actual = fit(model), fit(copied)
    assert list(actual) == list(expected)
    for name, losses in actual.items():
        np.testing.assert_allclose(losses, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    for a, b in zip(copied.optimizer.variables, model.optimizer.variables, strict=True):
        assert a.path == b.path
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3)
    assert len(fit(folded)["loss"]) == 2


def test_a_model_that_was_not_trained_is_compiled_with_its_arguments():
    model = chain((4,), L.Dense(3), KERAS_BN())
    model.compile("adam", "mse", jit_compile=True)
    for network in (replace_batch_norm(model), fold_batch_norm(model)[0]):
        assert network.jit_compile and network.loss == "mse" and not network.optimizer.built
        assert type(network.optimizer) is keras.optimizers.Adam


@pytest.mark.parametrize("auto_scale_loss", [False, True])
def test_loss_scaling_of_mixed_float16_is_preserved(auto_scale_loss):
    keras.config.set_dtype_policy("mixed_float16")
    model = chain((4,), L.Dense(3), KERAS_BN())
    model.compile("adam", "mse", auto_scale_loss=auto_scale_loss)
    for network in (replace_batch_norm(model), fold_batch_norm(model)[0]):
        assert type(network.optimizer) is type(model.optimizer)


def test_a_compiled_subclassed_model_trains_as_the_given_model_would():
    model, x = _subclassed()
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"], run_eagerly=True)
    copied = replace_batch_norm(model)
    first, second = (m.fit(x, random(6, 3), verbose=0, epochs=3).history for m in (copied, model))
    assert first == {name: pytest.approx(values, rel=1e-4) for name, values in second.items()}


def test_models_of_several_replicas_are_copied_in_their_strategy(two_replicas):
    x, y = random(8, 4), random(8, 3)
    with two_replicas.scope():
        model = chain((4,), BatchNormalization(), L.Dense(3), KERAS_BN(synchronized=True))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(x, y, verbose=0)
    with two_replicas.scope():
        copies = [replace_batch_norm(model)]
    copies.append(replace_batch_norm(model))
    for copied in copies:
        count, expected = (m.layers[1].values_since_merge for m in (copied, model))
        assert float(tf.convert_to_tensor(count)) == float(tf.convert_to_tensor(expected)) == 8
    expected = model.fit(x, y, shuffle=False, verbose=0).history["loss"]
    for copied in copies:
        losses = copied.fit(x, y, shuffle=False, verbose=0).history["loss"]
        np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_a_function_that_uses_a_folded_layer_is_named():
    model = chain((4,), L.Dense(3), KERAS_BN())
    norm = model.layers[-1]
    vars(model)["odd"] = lambda: norm.gamma
    with pytest.raises(UsageError, match=r"'odd' of Functional .* uses a removed layer"):
        fold_batch_norm(model)
    del model.odd
    model.compile("sgd", lambda y, p: tf.reduce_sum(norm.gamma))
    with pytest.raises(UsageError, match=r"'loss' of Functional .* uses a removed layer"):
        fold_batch_norm(model)


def test_a_copy_can_be_saved(tmp_path):
    for make in (_lora, _strings, _images, _sequential_without_input, _numbers):
        model, x = make()
        for copied in (replace_batch_norm(model), fold_batch_norm(model, x)[0]):
            copied.save(tmp_path / "copied.keras")
            loaded = keras.saving.load_model(tmp_path / "copied.keras")
            assert_close(run(loaded, x), run(copied, x))


def test_a_copy_does_not_keep_the_given_model_alive():
    model, _ = _lambdas()
    copied = replace_batch_norm(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None and copied.built
