"""The package contains nothing that a TPU process cannot run."""

import pathlib

import bn_keras


def test_the_package_does_not_use_jit_compile():
    """In a TPU process jit_compile compiles for the host; strategy.run compiles for the TPU itself.

    Source: keras#19448.
    """
    files = list(pathlib.Path(bn_keras.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    assert [str(f) for f in files if "jit_compile" in f.read_text()] == []
