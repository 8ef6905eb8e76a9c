"""A full disk, for tests of interrupted writes."""

import contextlib
import resource


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """Makes longer writes fail with EFBIG; ENOSPC would need a file system of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
