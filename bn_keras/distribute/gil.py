"""Releases the global interpreter lock (GIL) while TensorFlow connects to other workers."""

import contextlib
import ctypes
import pathlib
from collections.abc import Iterator
from typing import Any

from tensorflow.python import pywrap_tfe
from tensorflow.python.framework import errors_impl


@contextlib.contextmanager
def releasing_gil() -> Iterator[None]:
    """Releases the GIL, so that other threads run, while TensorFlow connects to other workers.

    TensorFlow's Python binding holds the GIL, and then no thread could report the wait or end it on
    a signal. Calling the same function of TensorFlow's C API through ctypes releases it. Where the
    C API is not exported, TensorFlow's binding is used.
    """
    library = ctypes.CDLL(str(pathlib.Path(pywrap_tfe.__file__).with_name("_pywrap_tfe.so")))
    original = pywrap_tfe.TFE_EnableCollectiveOps
    if hasattr(library, "TFE_EnableCollectiveOps"):
        library.TF_NewStatus.restype = ctypes.c_void_p
        library.TF_Message.restype = ctypes.c_char_p

        def connect(context: Any, server: bytes) -> None:
            status = ctypes.c_void_p(library.TF_NewStatus())
            library.TFE_EnableCollectiveOps(
                _pointer(context), server, ctypes.c_size_t(len(server)), status
            )
            code, message = library.TF_GetCode(status), library.TF_Message(status)
            library.TF_DeleteStatus(status)
            if code:
                error_type = errors_impl.exception_type_from_error_code(code)
                raise error_type(None, None, message.decode(errors="replace"))

        pywrap_tfe.TFE_EnableCollectiveOps = connect
    try:
        yield
    finally:
        pywrap_tfe.TFE_EnableCollectiveOps = original


def _pointer(capsule: Any) -> ctypes.c_void_p:
    """Returns the pointer in one of Python's capsules."""
    get_name, get_pointer = (
        ctypes.pythonapi.PyCapsule_GetName,
        ctypes.pythonapi.PyCapsule_GetPointer,
    )
    get_name.argtypes, get_name.restype = (ctypes.py_object,), ctypes.c_char_p
    get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    get_pointer.restype = ctypes.c_void_p
    return ctypes.c_void_p(get_pointer(capsule, get_name(capsule)))
