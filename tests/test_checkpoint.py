"""Whatever happens to a file, a checkpoint is complete or the one before it is intact."""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from full_disk import files_of_at_most

from bn_keras import storage
from bn_keras.errors import StorageError, UsageError
from bn_keras.runs.checkpoint import Checkpoints

DATA, INDEX = "data-00000-of-00001", "index"


def make_parts(value=0.0, units=300):
    """Two parts with dots in names and with equal names."""
    weights = [keras.Variable(np.full([units, 2], value, np.float32), name="k") for _ in range(3)]
    seed = keras.Variable(np.array([7, 9], np.uint32), trainable=False, name="seed.state")
    steps = keras.Variable(np.int64(value), trainable=False, dtype="int64", name="iteration")
    return {"model": [*weights, seed], "auxiliary": [], "optimizer": [steps]}


def values(parts):
    return {part: [v.numpy() for v in variables] for part, variables in parts.items()}


def assert_are(parts, value):
    for found, expected in zip(
        keras.tree.flatten(values(parts)),
        keras.tree.flatten(values(make_parts(value))),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def save(folder, *steps, keep=9):
    """Saves steps whose weights and iterations equal the step."""
    parts = make_parts()
    checkpoints = Checkpoints(folder, parts, keep)
    for step in steps:
        for variable in [*parts["model"][:3], *parts["optimizer"]]:
            variable.assign(np.full(variable.shape, step, variable.dtype))
        checkpoints.save(step)
    return checkpoints


def steps_in(folder):
    return sorted(int(n[5:-6]) for n in storage.list_folder(folder) if n.endswith(".index"))


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "run" / "checkpoints"


@pytest.fixture
def warnings(caplog):
    return lambda: [record.getMessage() for record in caplog.records]


def test_restored_variables_have_their_values_and_dtypes(folder):
    save(folder, 5)
    parts = make_parts(1.0)
    checkpoints = Checkpoints(folder, parts)
    assert checkpoints.restore() == checkpoints.latest_step == 5
    assert checkpoints.latest == str(folder / "step-5")
    assert_are(parts, 5)
    assert [v.dtype for v in parts["model"]] == ["float32"] * 3 + ["uint32"]


def test_without_a_checkpoint_restore_returns_0_and_writes_nothing(folder):
    checkpoints = Checkpoints(folder, make_parts())
    assert (checkpoints.restore(), checkpoints.latest_step, checkpoints.latest) == (0, 0, None)
    assert not folder.parent.exists()


def test_only_the_latest_checkpoints_are_kept(folder):
    save(folder, 0, 2, 10, 9, keep=2)
    assert {p.name for p in folder.iterdir()} == {
        "checkpoint",
        *(f"step-{step}.{ending}" for step in (2, 9) for ending in (INDEX, DATA)),
    }
    # TensorFlow's own lookup finds the checkpoint, too.
    assert tf.train.latest_checkpoint(folder) == str(folder / "step-9")


# Characters that TensorFlow takes for patterns, quotes, spaces, and bytes that are not UTF-8.
@pytest.mark.parametrize(
    "name",
    ["run[1]", "[!x]*?", "a\\b", "run[", "{a,b}", "new\nline", " é\"' ", "caf\udce9"],
    ids=repr,
)
def test_no_character_of_a_path_loses_a_checkpoint(tmp_path, name):
    folder = epath.Path(tmp_path) / name / "checkpoints"
    # TensorFlow would take its files for those of "run[1]".
    save(epath.Path(tmp_path) / "run1" / "checkpoints", 9)
    save(folder, 3)
    save(folder, 5, keep=1)
    assert steps_in(folder) == [5]
    parts = make_parts()
    assert Checkpoints(folder, parts).restore() == 5
    assert_are(parts, 5)


def test_a_temporary_folder_with_a_pattern_in_its_path_is_reported(tmp_path, monkeypatch):
    folder = tmp_path / "tmp[1]"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(UsageError, match="set TMPDIR"):
        save(epath.Path(tmp_path) / "run[1]", 1)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("damaged", [DATA, INDEX])
def test_an_incomplete_save_does_not_replace_the_one_before_it(folder, monkeypatch, damaged):
    checkpoints = save(folder, 3, keep=1)
    write = tf.train.Checkpoint.write

    def write_incompletely(self, path):
        write(self, path)
        file = pathlib.Path(f"{path}.{damaged}")
        if damaged == DATA:
            os.truncate(file, file.stat().st_size // 2)
        else:
            file.unlink()

    monkeypatch.setattr(tf.train.Checkpoint, "write", write_incompletely)
    with pytest.raises(StorageError, match="step 4.*that of step 3 is intact"):
        checkpoints.save(4)
    parts = make_parts()
    assert steps_in(folder) == [3] and Checkpoints(folder, parts).restore() == 3


def test_a_single_part_can_be_restored(folder):
    save(folder, 3)
    parts = {"model": make_parts()["model"]}
    assert Checkpoints(folder, parts).restore() == 3
    np.testing.assert_array_equal(parts["model"][0].numpy(), 3)


def test_all_replicas_are_restored(folder, two_replicas):
    def make():
        with two_replicas.scope():
            return {
                "a": [keras.Variable([1.0, 2.0], name="a")],
                "b": [
                    keras.Variable(
                        [3.0],
                        trainable=False,
                        synchronization="on_read",
                        aggregation="only_first_replica",
                        name="b",
                    )
                ],
            }

    saved, read = make(), make()
    for part in saved.values():
        components = two_replicas.experimental_local_results(part[0].value)
        components[0].assign(components[0] + 5)
        components[1].assign(components[1] - 5)
    Checkpoints(folder, saved).save(1)
    Checkpoints(folder, read).restore()
    for part, expected in (("a", [6, 7]), ("b", [8])):
        for component in two_replicas.experimental_local_results(read[part][0].value):
            np.testing.assert_array_equal(component, expected)


def flip_bit(place):
    def damage(file):
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= 0x10
        file.write_bytes(content)

    return damage


def truncate(share):
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().length)])


DAMAGES = {
    "emptied": truncate(0),
    "halved": truncate(0.5),
    "a byte short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().length)),
    "missing": lambda file: file.unlink(),
} | {f"flipped at {place}": flip_bit(place) for place in (0, 0.2, 0.5, 0.8)}


@pytest.mark.parametrize("ending", [INDEX, DATA])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_restored(
    damage, ending, folder, warnings
):
    save(folder, 10, 20, 30)
    damage(folder / f"step-30.{ending}")
    parts = make_parts(1.0)
    checkpoints = Checkpoints(folder, parts, keep=2)
    assert checkpoints.restore() == checkpoints.latest_step == 20
    # Nothing of the damaged checkpoint remains in the variables.
    assert_are(parts, 20)
    (warning,) = warnings()
    assert "step-30 is damaged" in warning and "\n" not in warning
    # The resumed run saves the step again.
    checkpoints.save(30)
    assert steps_in(folder) == [20, 30]
    again = make_parts()
    assert Checkpoints(folder, again).restore() == 30
    assert_are(again, 20)


def test_no_flipped_bit_of_the_index_changes_a_value_unnoticed(folder):
    """Some of its last 48 bytes are never read, others are offsets and lengths."""
    save(folder, 1)
    index = folder / "step-1.index"
    whole = index.read_bytes()
    for place in range(-48, 0):
        for bit in (0x01, 0x40, 0x80):
            content = bytearray(whole)
            content[place] ^= bit
            index.write_bytes(content)
            parts = make_parts(-1.0)
            with contextlib.suppress(UsageError):
                Checkpoints(folder, parts).restore()
                assert_are(parts, 1)
                continue
            assert_are(parts, -1)


def test_damaged_checkpoints_do_not_count_among_those_kept(folder):
    save(folder, 10, 20, 30, 40)
    for step in (30, 40):
        truncate(0.5)(folder / f"step-{step}.{DATA}")
    checkpoints = Checkpoints(folder, make_parts(), keep=2)
    assert checkpoints.restore() == 20
    checkpoints.save(25)
    assert steps_in(folder) == [20, 25]


def test_the_state_file_is_not_read(folder):
    save(folder, 1, 2)
    for text in ("", "\0" * 40, 'model_checkpoint_path: "step-9"', None):
        if text is None:
            (folder / "checkpoint").unlink()
        else:
            (folder / "checkpoint").write_text(text)
        assert Checkpoints(folder, make_parts()).restore() == 2


def test_only_damaged_checkpoints_are_an_error_on_one_line(folder):
    save(folder, 1, 2)
    truncate(0.5)(folder / f"step-1.{INDEX}")
    flip_bit(0.5)(folder / f"step-2.{DATA}")
    parts = make_parts(-1.0)
    with pytest.raises(UsageError, match="step-2 is damaged .*step-1 is damaged .*no earlier") as e:
        Checkpoints(folder, parts).restore()
    assert "\n" not in str(e.value)
    assert_are(parts, -1)


@pytest.mark.parametrize(
    "parts",
    [
        make_parts(units=301),
        make_parts() | {"model": make_parts()["model"][:3]},
        make_parts() | {"model": make_parts()["model"] * 2},
        make_parts() | {"model": make_parts()["model"][::-1]},
        make_parts() | {"averages": make_parts()["model"]},
        make_parts() | {"optimizer": [keras.Variable(1.0, name="iteration")]},
    ],
    ids=["shapes", "fewer", "more", "order", "another part", "dtype"],
)
def test_a_checkpoint_of_another_network_is_refused_and_kept(parts, folder, warnings):
    save(folder, 1, 2)
    before = values(parts)
    with pytest.raises(UsageError, match="step-2 does not fit this network"):
        Checkpoints(folder, parts).restore()
    keras.tree.map_structure(np.testing.assert_array_equal, values(parts), before)
    assert not warnings() and steps_in(folder) == [1, 2]


def test_a_checkpoint_without_read_permission_is_not_damaged(folder, monkeypatch):
    save(folder, 1, 2)

    def refused(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "open", refused)
    with pytest.raises(StorageError, match=f"step-2.{DATA} cannot be read: Permission denied"):
        Checkpoints(folder, make_parts()).restore()


def test_a_checkpoint_removed_before_it_is_opened_is_not_damaged(folder, monkeypatch, warnings):
    """The training saves a better network while the best one is loaded."""
    save(folder, 1)
    opened = type(folder).open

    def removed(self, *mode):
        monkeypatch.setattr(type(folder), "open", opened)
        save(folder, 2, keep=1)
        return opened(self, *mode)

    monkeypatch.setattr(type(folder), "open", removed)
    parts = make_parts()
    assert Checkpoints(folder, parts).restore() == 2
    assert_are(parts, 2)
    assert not warnings()


def test_a_checkpoint_removed_before_it_is_read_is_not_damaged(folder, monkeypatch, warnings):
    save(folder, 1)
    load = tf.compat.v1.train.NewCheckpointReader

    def removed(prefix):
        monkeypatch.setattr(tf.compat.v1.train, "NewCheckpointReader", load)
        save(folder, 2, keep=1)
        return load(prefix)

    monkeypatch.setattr(tf.compat.v1.train, "NewCheckpointReader", removed)
    parts = make_parts()
    assert Checkpoints(folder, parts).restore() == 2
    assert_are(parts, 2)
    assert not warnings()


@pytest.mark.parametrize("num_bytes", [0, 500, 5_000])
def test_a_full_disk_leaves_earlier_checkpoints_intact(num_bytes, folder):
    checkpoints = save(folder, 1, 2, keep=2)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    intact = "File too large; that of step 2 is intact"
    with files_of_at_most(num_bytes), pytest.raises(StorageError, match=intact) as caught:
        checkpoints.save(3)
    assert str(caught.value).startswith(f"the checkpoint of step 3 in {folder} cannot be written")
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert checkpoints.latest_step == 2
    checkpoints.save(3)
    assert steps_in(folder) == [2, 3]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        StorageError, match="of step 4 .*cannot be written: Not a directory; there is no earlier"
    ):
        save(epath.Path(tmp_path / "file" / "checkpoints"), 4)


# Files that kill -9 may leave behind, in the order of a save: files before they are moved into
# place, data without an index, and the temporary state file.
@pytest.mark.parametrize(
    "remains",
    [
        ["unfinished/step-30_temp/part-00000-of-00001.data-00000-of-00001.tempstate1"],
        [f"unfinished/step-30.{DATA}"],
        [f"unfinished/step-30.{INDEX}", f"step-30.{DATA}"],
        ["checkpoint.unfinished"],
    ],
)
def test_the_remains_of_a_killed_save_are_removed_by_the_next(remains, folder):
    save(folder, 10, 20)
    for name in remains:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"half of it")
    parts = make_parts()
    checkpoints = Checkpoints(folder, parts, keep=3)
    assert checkpoints.restore() == 20
    checkpoints.save(25)
    assert {p.name for p in folder.iterdir()} == {
        "checkpoint",
        *(f"step-{step}.{ending}" for step in (10, 20, 25) for ending in (INDEX, DATA)),
    }


def test_the_remains_of_a_killed_first_save_are_no_checkpoint(folder, warnings):
    folder.mkdir(parents=True)
    (folder / f"step-0.{DATA}").write_bytes(b"half of it")
    checkpoints = Checkpoints(folder, make_parts())
    assert checkpoints.restore() == 0 and "step-0" in warnings()[0]
    checkpoints.save(0)
    assert Checkpoints(folder, make_parts(1.0)).restore() == 0 and len(warnings()) == 1


# Runs in a process of its own: TensorFlow can be forked only before its first operation.
SAVE_AND_BE_KILLED = """
import os, random, signal, sys, time
import keras
import numpy as np
from etils import epath
from bn_keras.runs.checkpoint import Checkpoints

def save_forever(done):
    shapes = {name: [50_000] for name in "abcdef"}
    parts = {"model": [keras.Variable(np.zeros(s, "f"), name=n) for n, s in shapes.items()]}
    checkpoints = Checkpoints(epath.Path(sys.argv[1]), parts, keep=2)
    step = checkpoints.restore()
    assert all((v.numpy() == step).all() for v in parts["model"]), "torn"
    while True:
        os.write(done, b"%d\\n" % step)
        step += 1
        for variable in parts["model"]:
            variable.assign(np.full(variable.shape, step, "f"))
        checkpoints.save(step)

random.seed(0)
last = 0
for _ in range(8):
    steps, done = os.pipe()
    child = os.fork()
    if not child:
        save_forever(done)
    os.close(done)
    with open(steps) as steps:
        restored = int(steps.readline())
        # The last save is complete; the one in progress may be.
        assert last <= restored <= last + 1, (last, restored)
        began = time.perf_counter()
        steps.readline()
        time.sleep(random.random() * (time.perf_counter() - began))
        os.kill(child, signal.SIGKILL)
        last = int(([restored + 1] + steps.readlines())[-1])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
print(last)
"""


def test_a_save_can_be_killed_at_any_moment(folder):
    done = subprocess.run(
        [sys.executable, "-c", SAVE_AND_BE_KILLED, folder], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    assert last >= 8
    files = [p for p in pathlib.Path(folder).rglob("*") if p.is_file()]
    # The save after the last reported one may be complete; the one before it exists as well.
    newest = max(steps_in(folder))
    assert last <= newest <= last + 1 and newest - 1 in steps_in(folder)
    # Two checkpoints have four files. The killed save adds at most four and the state file.
    assert len(files) <= 1 + 2 * 4
    parts = {"model": [keras.Variable(np.zeros([50_000], "f"), name=n) for n in "abcdef"]}
    checkpoints = Checkpoints(folder, parts, keep=1)
    step = checkpoints.restore()
    checkpoints.save(step + 1)
    assert len(list(folder.iterdir())) == 3


def test_checkpoints_work_in_a_bucket(memory_bucket, warnings):
    folder = memory_bucket / "run" / "checkpoints"
    assert os.fspath(folder).startswith("ram://")
    assert Checkpoints(folder, make_parts()).restore() == 0
    save(folder, 10, 20, 30, keep=2)
    assert steps_in(folder) == [20, 30]
    (folder / f"step-30.{DATA}").unlink()
    parts = make_parts()
    assert Checkpoints(folder, parts).restore() == 20
    assert_are(parts, 20)
    assert len(warnings()) == 1
    assert not os.path.exists("ram:")
