"""What no TPU process could run isn't in the package."""

import pathlib

import bn_keras


def test_nothing_asks_for_jit_compile():
    """In a process with a TPU it compiles for the host; strategy.run compiles for the TPU itself.

    Source: keras#19448.
    """
    files = list(pathlib.Path(bn_keras.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    assert [str(f) for f in files if "jit_compile" in f.read_text()] == []
