"""`import bn_keras` is light, and everything that it exports is documented."""

import inspect
import json
import subprocess
import sys

import pytest

import bn_keras

TRAINER_COMPONENTS = (
    "data",
    "distribute",
    "experiments",
    "inference",
    "pictures",
    "report",
    "runs",
    "training",
)
TRAINER_DEPENDENCIES = (
    "absl",
    "etils",
    "keras_cv",
    "matplotlib",
    "ml_collections",
    "scipy",
    "sklearn",
    "tensorflow_datasets",
    "tqdm",
)


def test_public_api_is_complete():
    assert sorted(bn_keras.__all__) == bn_keras.__all__
    assert set(bn_keras.__all__) == {
        "BNInception",
        "BatchNormalization",
        "Cost",
        "Finding",
        "FoldReport",
        "HealthReport",
        "LayerCost",
        "LayerReport",
        "MergeMovingStatistics",
        "PopulationReport",
        "SigmoidMLP",
        "UsageError",
        "check_batch_norm",
        "convert_weights",
        "count_cost",
        "estimate_population_statistics",
        "fold_batch_norm",
        "from_pytorch",
        "from_slim",
        "merge_moving_statistics",
        "replace_batch_norm",
    }


@pytest.mark.parametrize("name", bn_keras.__all__)
def test_every_public_name_is_documented_and_typed(name):
    member = getattr(bn_keras, name)
    assert inspect.getdoc(member)
    # A dataclass without a docstring of its own has its signature as a docstring.
    assert not member.__doc__.startswith(f"{name}(")
    if inspect.isfunction(member):
        signature = inspect.signature(member)
        assert signature.return_annotation is not signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not parameter.empty, parameter.name


def test_health_remains_importable_as_a_module():
    from bn_keras import health

    assert health.check_batch_norm is bn_keras.check_batch_norm


@pytest.fixture(scope="module")
def new_modules():
    """The modules that `import bn_keras` loads on top of Keras and TensorFlow."""
    program = (
        "import json, sys; import keras, tensorflow; before = set(sys.modules);"
        " import bn_keras; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_loads_few_modules_and_no_dependency_of_the_trainer(new_modules):
    assert "bn_keras.batch_norm" in new_modules
    assert len(new_modules) <= 80
    packages = {name.partition(".")[0] for name in new_modules}
    assert not packages.intersection(TRAINER_DEPENDENCIES)


def test_import_does_not_load_the_trainer(new_modules):
    components = {name.split(".")[1] for name in new_modules if name.startswith("bn_keras.")}
    assert "models" in components
    assert not components.intersection(TRAINER_COMPONENTS)


def test_import_changes_no_state_of_keras():
    """A layer built at import would fix the dtype policy and take a name."""
    program = (
        "import keras, bn_keras; keras.config.set_floatx('float64');"
        " layer = keras.layers.Identity(); print(layer.name, layer.dtype)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["identity", "float64"], done.stderr


@pytest.mark.parametrize(
    "preparation, parts",
    [
        (
            "sys.modules['tensorflow'] = None",
            ["needs TensorFlow", "bn_keras[cpu]", "bn_keras[tpu]"],
        ),
        (
            "os.environ['KERAS_BACKEND'] = 'jax'",
            ["KERAS_BACKEND is 'jax'", "KERAS_BACKEND=tensorflow"],
        ),
    ],
)
def test_import_without_tensorflow_says_what_to_do(preparation, parts):
    program = f"import os, sys; {preparation}; import bn_keras"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    for part in parts:
        assert part in last
