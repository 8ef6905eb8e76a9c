"""Runs the tests of the Keras layer, which ship with Keras, on this package's layer."""

import importlib.util
import inspect
import pathlib
import warnings

import keras
import pytest
from keras.src import testing

from bn_keras.batch_norm import BatchNormalization

_MODULE = (
    pathlib.Path(keras.__file__).parent / "src/layers/normalization/batch_normalization_test.py"
)


@keras.saving.register_keras_serializable("bn_keras_tests")
class _KerasSemantics(BatchNormalization):
    """The layer with the biased moving variance of Keras."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"unbiased": False, **kwargs})


class _Layers:
    """keras.src.layers with one layer replaced."""

    BatchNormalization = _KerasSemantics

    def __getattr__(self, name):
        return getattr(keras.src.layers, name)


def _keras_test_case() -> type:
    if not _MODULE.exists():
        return testing.TestCase
    spec = importlib.util.spec_from_file_location("keras_batch_normalization_test", _MODULE)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        # pytest does not know a mark that Keras defines.
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        spec.loader.exec_module(module)
    module.layers = _Layers()
    case = module.BatchNormalizationTest
    return case


@pytest.mark.skipif(not _MODULE.exists(), reason="this Keras ships without its tests")
@pytest.mark.filterwarnings("ignore::UserWarning")  # Keras warns about generators in its tests.
class TestKerasOwn(_keras_test_case()):
    """All tests of the Keras layer, on this package's layer."""


@pytest.mark.skipif(not _MODULE.exists(), reason="this Keras ships without its tests")
def test_all_keras_tests_are_collected():
    names = [n for n, _ in inspect.getmembers(TestKerasOwn) if n.startswith("test_")]
    assert len(names) >= 33
