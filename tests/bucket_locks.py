"""Scenarios of several lock holders in one process; see test_bucket.

Usage: bucket_locks.py SCENARIO. A scenario raises AssertionError if it fails. The holders look like
processes of other machines, and all times are a hundredth of the real ones.
"""

import sys
import threading
import time

import pytest
from etils import epath

from bn_keras import storage
from bn_keras.errors import BucketUnavailableError, StorageError, WorkdirInUseError
from bn_keras.runs import bucket_lock
from bn_keras.runs.bucket_lock import BucketLock

FOLDER = epath.Path("gs://locks") / sys.argv[1] / "lock"


def stop_heartbeat(lock):
    """Makes a holder look dead, or delayed for minutes."""
    lock._is_released.set()
    lock._heartbeat_thread.join()


def names():
    return sorted(name[name.index(".") :] for name in storage.list_folder(FOLDER))


def dead_holder():
    """A dead holder is replaced after a while, and not before; `verify` then fails for it."""
    holder, other = BucketLock(FOLDER), BucketLock(FOLDER)
    holder.acquire()
    stop_heartbeat(holder)
    waits = []
    other.acquire(lambda: waits.append(holder.verify()))
    assert waits
    other.verify()
    with pytest.raises(WorkdirInUseError, match="has taken over workdir gs://locks/dead_holder"):
        holder.verify()
    holder.release()
    other.verify()
    other.release()
    assert names() == []


def living_holder():
    """A holder that sends heartbeats is not replaced, and nothing remains of the other."""
    holder, other = BucketLock(FOLDER), BucketLock(FOLDER)
    holder.acquire()
    waits = []
    with pytest.raises(WorkdirInUseError, match="is in use: process .* on .* since"):
        other.acquire(lambda: waits.append(1))
    assert waits
    holder.verify()
    other.release()
    assert set(names()) == {".claim", ".alive"}
    holder.release()
    assert names() == []
    # A released lock can be acquired, by the same object, too.
    other.acquire()
    other.release()


def ended_wait():
    """An error that a wait raises ends it."""
    holder, other = BucketLock(FOLDER), BucketLock(FOLDER)
    holder.acquire()
    stop_heartbeat(holder)
    with pytest.raises(KeyboardInterrupt):
        other.acquire(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    holder.verify()
    assert names().count(".claim") == 1


def failed_claim():
    """A claim that fails leaves nothing behind, unless the bucket does not answer."""
    for error, remaining in ((StorageError("full"), 0), (BucketUnavailableError("down"), 1)):
        lock = BucketLock(FOLDER)
        claims = lock._claims
        # The first list shows no claims, the second fails.
        answers = iter([list])
        lock._claims = lambda answers=answers, error=error: next(answers, lambda: _raise(error))()
        with pytest.raises(type(error)):
            lock.acquire()
        assert len(claims()) == remaining


def _raise(error):
    raise error


def abandoned_claim():
    """After an outage, the same process may train again at once, but not beside itself."""
    bucket_lock._machine = lambda: "here"
    for end in (BucketLock.abandon, lambda lock: None):
        lock, again = BucketLock(FOLDER), BucketLock(FOLDER)
        lock.acquire()
        end(lock)
        if end is BucketLock.abandon:
            again.acquire(lambda: _raise(AssertionError("waits")))
            again.verify()
            again.release()
        else:
            with pytest.raises(WorkdirInUseError):
                again.acquire()
            lock.verify()
            lock.release()
        assert names() == []


def damaged_claim():
    """A claim that cannot be read is that of an unknown process."""
    FOLDER.mkdir(parents=True)
    for number, text in enumerate(("", "[1]", "{", "\0")):
        (FOLDER / f"{number}.claim").write_text(text)
    lock = BucketLock(FOLDER)
    lock.acquire()
    lock.verify()
    lock.release()


def rush():
    """Processes start at the same moment; at most one of them trains at any time."""
    held, most, acquired = [], [], []

    def take():
        for _ in range(3):
            lock = BucketLock(FOLDER)
            try:
                lock.acquire()
            except WorkdirInUseError:
                continue
            held.append(lock)
            most.append(len(held))
            lock.verify()
            acquired.append(lock)
            time.sleep(0.05)
            held.remove(lock)
            lock.release()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert acquired and set(most) == {1}


if __name__ == "__main__":
    bucket_lock._machine = lambda: ""
    bucket_lock.HEARTBEAT_SECONDS /= 100
    bucket_lock.DEAD_SECONDS /= 100
    bucket_lock._POLL_SECONDS /= 100
    globals()[sys.argv[1]]()
