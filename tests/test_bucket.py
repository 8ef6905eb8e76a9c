"""Every command works with a bucket, whatever happens to the process and to the service.

The client is TensorFlow's own; the service is on this machine, see bucket.py.
"""

import json
import os
import random
import signal
import threading

import numpy as np
import pytest
import tensorflow as tf
from bucket import REFUSED, TESTS, Bucket
from commands import Commands
from small import small_mlp
from usable_runs import check_usable, without_times

from bn_keras.data.unreadable_examples import UnreadableExamples
from bn_keras.errors import BucketUnavailableError
from bn_keras.runs.workdir import Workdir
from bn_keras.training.build import build_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bucket")


@pytest.fixture(scope="module")
def service(folder):
    bucket = Bucket(folder)
    yield bucket
    bucket.close()


@pytest.fixture
def bucket(service):
    """The bucket, without the faults that an earlier test has injected."""
    yield service
    service.reset_faults()


@pytest.fixture(scope="module")
def commands(service, folder):
    commands = Commands(folder, service.environment)
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def train(folder):
    """The arguments of a short training, without its workdir."""
    config = folder / "config.py"
    config.write_text(
        "from small import small_mlp\n\n\ndef get_config():\n    return small_mlp()\n"
    )
    return ["train", f"--config={config}"]


@pytest.fixture(scope="module")
def local(commands, train, folder):
    """The workdir of a run on this machine."""
    result = commands.run(*train, f"--workdir={folder}/local")
    assert result.status == 0, result.errors
    return Workdir(folder / "local")


@pytest.fixture(scope="module")
def trained(commands, train, service):
    """The workdir of a run in the bucket."""
    result = commands.run(*train, "--workdir=gs://trained/run")
    assert result.status == 0, result.errors
    return "gs://trained/run"


def lines_in(bucket, workdir):
    text = bucket.read(f"{workdir.removeprefix('gs://')}/metrics.jsonl").decode()
    assert text.endswith("\n")
    return without_times(map(json.loads, text.splitlines()))


def at_change(bucket, number, action):
    """Calls an action after the given change of an object, counted from now."""
    count = 0

    def count_changes(name):
        nonlocal count
        count += 1
        if count == number:
            action()

    bucket.after_change = count_changes


def kill_at_change(bucket, commands, arguments, number, signum):
    """Runs a command that receives a signal after some changes of objects; returns its result."""
    started = []
    at_change(bucket, number, lambda: os.kill(started[0], signum))
    started.append(commands.start(*arguments))
    return commands.wait(started[0])


@pytest.mark.job
def test_a_run_killed_at_random_changes_equals_a_local_one(bucket, commands, train, local):
    """The service limits writes to one per second and object, is slow, and returns errors."""
    bucket.latency, bucket.limits_writes = 0.002, True
    workdir = "gs://killed/run"
    numbers = random.Random(0).sample(range(1, 18), 3)
    for number in numbers:
        bucket.num_errors = 2
        result = kill_at_change(
            bucket, commands, [*train, f"--workdir={workdir}"], number, signal.SIGKILL
        )
        assert result.status == -signal.SIGKILL, (number, result.errors)
    result = kill_at_change(bucket, commands, [*train, f"--workdir={workdir}"], 9, signal.SIGTERM)
    assert result.status == 143, result.errors
    assert "stopped by SIGTERM at step" in result.last_line
    result = commands.run(*train, f"--workdir={workdir}")
    assert result.status == 0, result.errors
    assert lines_in(bucket, workdir) == without_times(local.read_metrics())
    # Each start has its own events; those of a killed process are kept up to its last save.
    assert not [name for name in bucket.names("killed/run/lock") if name.endswith(".claim")]


@pytest.mark.job
def test_every_state_of_a_bucket_is_usable(bucket, commands, train, local, tmp_path):
    """A process may end after any change; each state is checked in a local copy."""
    states = []
    bucket.after_change = lambda name: states.append(dict(bucket.objects))
    result = commands.run(*train, "--workdir=gs://states/run")
    assert result.status == 0, result.errors
    expected = without_times(local.read_metrics())
    steps = []
    for number, objects in enumerate(states):
        folder = tmp_path / str(number)
        for name, found in objects.items():
            if name.startswith("states/run/"):
                path = folder / name.removeprefix("states/run/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(found.content)
        steps.append(check_usable(folder, expected))
    assert len(states) > 30
    # Once saved, a step is never lost.
    assert steps == sorted(steps) and set(steps) == {
        (0, 0),
        (0, 20),
        (25, 20),
        (25, 40),
        (50, 40),
        (60, 40),
        (60, 60),
    }


def png(seed=0):
    """Returns a file with an image of noise, 8x8."""
    pixels = np.random.default_rng(seed).integers(256, size=(8, 8, 1), dtype=np.uint8)
    return tf.io.encode_png(pixels).numpy()


@pytest.mark.job
def test_every_command_reads_and_writes_a_bucket(bucket, commands, train, trained, local, folder):
    def run(*arguments):
        result = commands.run(*arguments)
        assert result.status == 0, result.errors
        return result.output

    config, workdir, out = train[1], f"--workdir={trained}", "--output=gs://outputs"
    accuracy = local.read_metrics()[-1]["validation/accuracy"]
    bucket.put("images/one.png", png())
    assert json.loads(run("evaluate", workdir, "--json"))["accuracy"] == accuracy
    for path in ("gs://images/one.png", "gs://images", "gs://images/"):
        assert run("predict", workdir, path).startswith("gs://images/one.png\n")
    run("check", workdir, "--batches=2")
    run("export", workdir, f"{out}/net.keras")
    run("export", workdir, f"{out}/net/1", "--format=saved_model")
    run("export", workdir, f"{out}/net.tflite", "--format=tflite")
    for model in ("net.keras", "net/1", "net.tflite"):
        found = json.loads(run("evaluate", config, f"--model=gs://outputs/{model}", "--json"))
        assert found["accuracy"] == pytest.approx(accuracy)
    run("preview", config, f"{out}/preview.png", "--examples=2")
    run("crops", f"{out}/crops.png", "--crops=10", "--size=8", "gs://images/one.png")
    for name in ("preview.png", "crops.png"):
        assert bucket.read(f"outputs/{name}").startswith(b"\x89PNG")
    run("reproduce", "figure1", "--steps=20", "--parallel=1", "--workdir=gs://report/digits")
    assert b"Figure 1" in bucket.read("report/digits/report.html")
    choices = ["--initializers=he_normal", "--base_rates=0.1", "--seeds=0", "--parallel=1"]
    run("search", config, *choices, "--config.train.steps=10", "--workdir=gs://search/runs")
    assert bucket.read("search/runs/he_normal_0.1_seed_0/metrics.jsonl")
    # Nothing of a bucket's path becomes a folder of this machine.
    assert not (folder / "gs:").exists()


@pytest.mark.job
def test_an_existing_output_in_a_bucket_is_kept_or_replaced(bucket, commands, trained):
    bucket.put("old/net.keras", b"old")
    export = ["export", f"--workdir={trained}", "--output=gs://old/net.keras"]
    result = commands.run(*export)
    assert result.status == 2 and "output gs://old/net.keras exists" in result.last_line
    assert bucket.read("old/net.keras") == b"old"
    assert commands.run(*export, "--overwrite").status == 0
    assert bucket.read("old/net.keras").startswith(b"PK")


def test_training_data_in_a_bucket(bucket, commands, train):
    for seed in range(8):
        bucket.put(f"set/{('train', 'test')[seed % 2]}/{'ab'[seed // 2 % 2]}/{seed}.png", png(seed))
    settings = ["name=folder", "data_dir=gs://set", "image_size=8", "validation_split=test"]
    result = commands.run(
        *train,
        *(f"--config.data.{setting}" for setting in settings),
        *("--config.train.steps=4", "--config.train.global_batch_size=2"),
        *("--config.evaluation.global_batch_size=2", "--workdir=gs://on_set/run"),
    )
    assert result.status == 0, result.errors
    assert lines_in(bucket, "gs://on_set/run")[-1]["step"] == 4


LIST_FOLDERS = """
import json
import sys

from bn_keras.data.folder import open_folder

for arguments in json.loads(sys.argv[1]):
    source = open_folder(*arguments)
    print(*source.class_names, source.train.num_examples, source.validation.num_examples)
"""


@pytest.fixture(scope="module")
def list_folders(commands, folder):
    """A function that lists folders of images; its arguments are (data_dir, split, split)."""
    script = folder / "list_folders.py"
    script.write_text(LIST_FOLDERS)
    return lambda *calls: commands.run(script, json.dumps(calls))


def test_class_folders_without_splits_in_a_bucket(bucket, list_folders):
    for number in range(20):
        bucket.put(f"flat/{('cat', 'dog')[number % 2]}/{number}.png", b"")
    result = list_folders(
        *(
            (data_dir, f"{name}[:90%]", f"{name}[90%:]")
            for data_dir in ("gs://flat", "gs://flat/")
            for name in (".", "./", "./.")
        )
    )
    assert result.status == 0, result.errors
    assert result.output.splitlines() == ["cat dog 18 2"] * 6


def test_dots_in_paths_of_a_bucket_are_no_names(bucket, list_folders):
    """`find .` writes such paths."""
    bucket.put("dots/labels.csv", b"./all/cat/1.png,cat\nall/./cat/2.png,cat\nall/dog/3.png,dog")
    for name in ("cat/1.png", "cat/2.png", "dog/3.png"):
        bucket.put(f"dots/all/{name}", b"")
    splits = ("./all", "all/.", "labels.csv", "./labels.csv")
    result = list_folders(*(("gs://dots", split, split) for split in splits))
    assert result.status == 0, result.errors
    assert result.output.splitlines() == ["cat dog 3 3"] * 4


@pytest.mark.parametrize("split", ["all", "labels.csv"])
def test_requests_of_a_listing_grow_with_folders_and_pages_not_with_images(
    split, bucket, list_folders
):
    def put(size):
        names = [f"all/{label}/sub/{i}.png" for label in ("cat", "dog") for i in range(size)]
        for name in names:
            bucket.put(f"large/{name}", b"")
        bucket.put("large/labels.csv", "\n".join(f"{n},{n[4:7]}" for n in names).encode())

    def count_requests(size):
        begin = len(bucket.requests)
        result = list_folders(("gs://large", f"{split}[:90%]", f"{split}[90%:]"))
        assert result.status == 0, result.errors
        assert result.output == f"cat dog {size * 2 * 9 // 10} {size * 2 // 10}\n"
        return len(bucket.requests) - begin

    put(10)
    few = count_requests(10)
    put(100)
    assert count_requests(100) == few <= 14
    # Two folders of 100 images, each listed once and not for each split.
    bucket.page_size = 10
    assert count_requests(100) == few + 2 * 9


def test_a_labels_file_names_images_that_are_not_in_the_bucket(bucket, list_folders):
    bucket.put("lacking/a/1.png", b"")
    bucket.put("lacking/labels.csv", b"a/1.png,cat\na/2.png,cat\nb/3.png,cat\na,dog")
    result = list_folders(("gs://lacking", "labels.csv", "labels.csv"))
    assert "3 of the images in gs://lacking/labels.csv do not exist" in result.last_line
    assert "'a/2.png', 'b/3.png', 'a'" in result.last_line


def test_names_in_a_bucket_that_no_file_system_has(bucket, list_folders):
    """A name may end in "/", or be that of a file and of a folder."""
    for name in ("cat/", "cat/1.png", "cat//2.png", "dog/", "dog/3.png", "dog/a", "dog/a/4.png"):
        bucket.put(f"odd/{name}", b"")
    result = list_folders(("gs://odd", ".", "."))
    assert result.status == 0, result.errors
    assert result.output == "cat dog 4 4\n"
    assert "ignoring 1 file in gs://odd" in result.errors


def test_a_listing_that_fails_halfway_lacks_no_image(bucket, list_folders, monkeypatch):
    for name in ("cat/1.png", "cat/sub/2.png", "dog/3.png"):
        bucket.put(f"partial/{name}", b"")
    # The class folders are listed, and nothing below them.
    bucket.before_list = lambda prefix: (
        prefix == "partial/" and monkeypatch.setitem(REFUSED, "partial", 403)
    )
    result = list_folders(("gs://partial", ".", "."))
    assert "StorageError: gs://partial/cat/ cannot be read: " in result.last_line, result.errors
    assert "403" in result.last_line


@pytest.mark.parametrize(
    "name, data_dir, status, message",
    [
        ("folder", "gs://out", 75, "gs://out cannot be read: the bucket does not answer"),
        ("folder", "gs://forbidden/set", 2, "gs://forbidden/set cannot be read: "),
        ("mnist", "gs://forbidden/set", 2, "gs://forbidden/set cannot be read: "),
        ("folder", "gs://missing/set", 2, "data.data_dir='gs://missing/set' is not a folder"),
        ("mnist", "gs://missing/set", 2, "data.data_dir='gs://missing/set' is not a folder"),
    ],
)
def test_data_in_a_bucket_that_cannot_be_used(
    name, data_dir, status, message, bucket, commands, train, folder
):
    if status == 75:
        bucket.begin_outage(600)
    settings = [f"--config.data.name={name}", f"--config.data.data_dir={data_dir}"]
    result = commands.run(*train, *settings, f"--workdir={folder}/unused")
    assert result.status == status, result.errors
    assert message in result.last_line and result.errors.count("error: ") == 1


@pytest.mark.parametrize("name", ["net.keras", "net/saved_model.pb"])
def test_a_network_that_an_outage_hides_is_not_damaged(name, bucket, commands, train):
    bucket.put(f"damaged/{name}", b"?")
    path = f"gs://damaged/{name.removesuffix('/saved_model.pb')}"
    evaluate = ["evaluate", train[1], f"--model={path}"]
    result = commands.run(*evaluate)
    assert result.status == 2 and f"{path} cannot be read as a network" in result.last_line
    bucket.before_list = lambda prefix: prefix == f"{path[5:]}/" and bucket.begin_outage(600)
    result = commands.run(*evaluate)
    assert result.status == 75, result.errors
    assert path in result.last_line and "cannot be read: the bucket does not" in result.last_line


def test_an_image_that_an_outage_hides_is_not_replaced_by_another_one():
    """Nor does it count as unreadable: the run would go on, but not exactly."""
    outage = tf.errors.AbortedError(None, None, "All 10 retry attempts failed. The last failure: x")
    unreadable = UnreadableExamples(limit=9)
    for _ in range(2):
        with pytest.raises(BucketUnavailableError, match="gs://set/a.png cannot be read: the buck"):
            unreadable.add("gs://set/a.png", outage)
    assert unreadable.count == 0


def test_an_outage_of_the_records_is_reported():
    data = build_data(small_mlp())
    message = "All 10 retry attempts failed. The last failure: x when reading gs://set/records"
    with pytest.raises(BucketUnavailableError, match="the data cannot be read: the bucket"):
        with data.reporting_errors():
            raise tf.errors.AbortedError(None, None, message)
    with pytest.raises(tf.errors.AbortedError), data.reporting_errors():
        raise tf.errors.AbortedError(None, None, "Collective ops is aborted")


@pytest.mark.job
def test_an_outage_ends_with_a_status_that_is_retried(bucket, commands, train, local):
    """The bucket stops answering during the training, and answers again later."""
    arguments = [*train, "--workdir=gs://outage/run"]
    at_change(bucket, 15, lambda: bucket.begin_outage(600))
    result = commands.run(*arguments)
    assert result.status == 75, result.errors
    assert "the bucket does not answer" in result.last_line
    assert result.errors.count("error: ") == 1
    result = commands.run(*arguments)
    assert result.status == 75 and "gs://outage/run" in result.last_line
    bucket.end_outage()
    # A checkpoint that cannot be read for an outage is not damaged.
    bucket.before_read = lambda name, _: bucket.begin_outage(600) if "step-" in name else None
    result = commands.run(*arguments)
    assert result.status == 75 and "damaged" not in result.errors
    bucket.reset_faults()
    result = commands.run(*arguments)
    assert result.status == 0, result.errors
    assert lines_in(bucket, "gs://outage/run") == without_times(local.read_metrics())


@pytest.mark.parametrize("name, reason", [("missing", "404"), ("forbidden", "403")])
def test_a_bucket_that_cannot_be_used_ends_with_status_2(name, reason, bucket, commands, train):
    result = commands.run(*train, f"--workdir=gs://{name}/run")
    assert result.status == 2, result.errors
    assert reason in result.last_line and result.errors.count("error: ") == 1


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (
            ["evaluate", "--workdir=gs://forbidden/run"],
            2,
            "gs://forbidden/run/config.json cannot be",
        ),
        (["train", "--config=gs://none/run"], 2, "no run in 'gs://none/run'"),
        (
            ["convert", "--weights=gs://none/w.npz", "--output=unused.keras"],
            2,
            "file gs://none/w.npz does not exist",
        ),
        (["crops", "--output=gs://missing/x.png"], 2, "gs://missing/x.png cannot be written: "),
        (["crops", "--output=gs://forbidden/x.png"], 2, "gs://forbidden/x.png cannot be written: "),
        (
            ["crops", "--output=gs://outputs/x.png"],
            75,
            "gs://images/one.png cannot be read: the buc",
        ),
    ],
    ids=["run", "config", "weights", "missing output", "forbidden output", "image in an outage"],
)
def test_what_cannot_be_read_or_written_is_named(arguments, status, message, bucket, commands):
    bucket.put("images/one.png", png())
    if status == 75:
        bucket.begin_outage(600)
    if arguments[0] == "crops":
        arguments = [*arguments, "--crops=10", "--size=8", "gs://images/one.png"]
    if arguments[0] == "train":
        arguments = [*arguments, "--workdir=gs://none/other"]
    result = commands.run(*arguments)
    assert result.status == status, result.errors
    assert message in result.last_line and result.errors.count("error: ") == 1


def test_two_trainers_never_share_a_run(bucket, commands, train, local):
    arguments = [*train, "--workdir=gs://shared/run"]
    stopped = threading.Event()

    def stop():
        os.kill(first, signal.SIGSTOP)
        stopped.set()

    at_change(bucket, 12, stop)
    first = commands.start(*arguments)
    assert stopped.wait(60)
    other = commands.run(*arguments)
    os.kill(first, signal.SIGCONT)
    result = commands.wait(first)
    assert other.status == 2, other.errors
    assert f"gs://shared/run is in use: process {first} on" in other.last_line
    assert result.status == 0, result.errors
    assert lines_in(bucket, "gs://shared/run") == without_times(local.read_metrics())


def test_a_trainer_that_was_replaced_writes_nothing_more(bucket, commands, train):
    """Another process replaces a trainer without a heartbeat by deleting its claim."""
    begin = len(bucket.requests)

    def replace():
        (claim,) = (name for name in bucket.names("replaced/run/lock/") if "claim" in name)
        bucket.delete(claim)
        bucket.put("replaced/run/lock/other.claim", b"{}")

    at_change(bucket, 14, replace)
    result = commands.run(*train, "--workdir=gs://replaced/run")
    assert result.status == 2, result.errors
    assert "another process has taken over workdir gs://replaced/run" in result.last_line
    changes = bucket.changes(begin)
    assert [kind for kind, name in changes if name.endswith(".claim")] == ["write"]
    # Data without an index is no checkpoint.
    assert all(name.startswith("step-") and ".data-" in name for _, name in changes[14:])
    assert "other.claim" in {name.rpartition("/")[2] for name in bucket.names("replaced/run/lock/")}


@pytest.mark.parametrize(
    "scenario",
    [
        *("dead_holder", "living_holder", "ended_wait", "failed_claim", "damaged_claim", "rush"),
        "abandoned_claim",
    ],
)
def test_a_lock_in_a_bucket_has_one_holder(scenario, bucket, commands):
    result = commands.run(TESTS / "bucket_locks.py", scenario)
    assert result.status == 0, result.errors


def test_a_save_takes_few_requests(bucket, trained):
    """The requests include those of the metrics and of the removal of an old checkpoint."""
    requests = [request for request in bucket.requests if request.name.startswith("trained/run")]
    # Later tests read the run.
    requests = requests[: [r.name for r in requests].index("trained/run/finished/")]
    names = [(request.kind, request.name.rpartition("/")[2]) for request in requests]
    checkpoint = [
        number for number, request in enumerate(requests) if "/checkpoints/step-60." in request.name
    ]
    first = max(n for n in range(checkpoint[0]) if requests[n].name.endswith("/lock/"))
    removed = names.index(("delete", "step-0.data-00000-of-00001"))
    assert removed > checkpoint[-1]
    assert removed - first < 16
    # Each save replaces the metrics once; they are created empty, and end with the run.
    assert names.count(("write", "metrics.jsonl")) == 1 + len(["step-25", "step-50", "step-60"]) + 1


def test_another_process_has_written_a_file_since(bucket, commands, folder):
    """TensorFlow caches the size of a file for seconds."""
    bucket.put("fresh/file", b"short")
    bucket.before_read = lambda name, _: bucket.put(name, b"as it is now, and longer")
    script = folder / "read.py"
    script.write_text(
        "import tensorflow as tf\nfrom bn_keras import storage\n\n"
        "assert tf.io.gfile.stat('gs://fresh/file').length == 5\n"
        "print(storage.read('gs://fresh/file').decode())\n"
    )
    result = commands.run(script)
    assert result.status == 0, result.errors
    assert result.output == "as it is now, and longer\n"


def test_a_checkpoint_that_is_replaced_while_it_is_read(bucket, commands, trained):
    """The training saves a better network while the best one is loaded."""
    bucket.copy_folder("trained/run/", "moving/run/")

    def replace(name, _):
        if "moving/run/best/step-60" in name:
            bucket.before_read = lambda name, _: None
            for old in bucket.names("moving/run/best/step-60"):
                bucket.put(old.replace("step-60", "step-61"), bucket.read(old))
                bucket.delete(old)

    bucket.before_read = replace
    result = commands.run("evaluate", "--workdir=gs://moving/run", "--best", "--json")
    assert result.status == 0, result.errors
    assert json.loads(result.output)["step"] == 61
    assert "damaged" not in result.errors


def test_writes_beyond_one_per_second_and_object_are_repeated(bucket, commands, folder):
    bucket.limits_writes = True
    script = folder / "write.py"
    script.write_text(
        "from bn_keras import storage\n\n"
        "for number in range(3):\n"
        "    storage.write_atomically('gs://fast/file', str(number))\n"
    )
    begin = len(bucket.requests)
    result = commands.run(script)
    assert result.status == 0, result.errors
    assert bucket.read("fast/file") == b"2"
    assert 429 in {request.status for request in bucket.requests[begin:]}
