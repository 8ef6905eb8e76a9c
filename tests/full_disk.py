"""A disk without room, for tests of what may be written when it is met."""

import contextlib
import resource


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """Has every longer write fail: with EFBIG, since ENOSPC takes a file system of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
