"""Two workers train as one process does, and react when one of them ends."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import types

import pytest
from PIL import Image
from small import small_mlp

from bn_keras.data.splits import FINGERPRINTS
from bn_keras.errors import UsageError
from bn_keras.runs.workdir import Workdir
from bn_keras.training import workers
from bn_keras.training.loop import train_and_evaluate

CONFIG = {"population.when": "evaluations", "population.num_batches": 2}
pytestmark = pytest.mark.job
TESTS = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("workers")


def write_images(folder, name):
    """Writes images of the class `name` and of another one; returns the folder."""
    for image_class in (name, "other"):
        for split in ("train", "validation"):
            path = folder / split / image_class
            path.mkdir(parents=True)
            Image.new("L", (8, 8)).save(path / "image.png")
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    """Results of pairs of workers by name.

    One run is terminated, killed twice and finished; then it is evaluated. Another run diverges.
    The environment has a proxy that never answers, which workers must not use.
    """
    config = folder / "config.py"
    settings = {"distribution.strategy": "multi_worker", "distribution.replicas": 0} | CONFIG
    config.write_text(
        f"from small import small_mlp\n\n\ndef get_config():\n    return small_mlp(**{settings})\n"
    )

    def train(*workdirs, overrides=(), **disturbance):
        arguments = [
            [f"--config={config}", f"--workdir={folder / w}", *overrides] for w in workdirs
        ]
        return {"command": "train", "arguments": arguments} | disturbance

    evaluate = [f"--workdir={folder / 'run'}", "--json"]
    commands = {
        "terminated": train("run", "run", signum=int(signal.SIGTERM), at_step=12),
        "killed": train("run", "run", signum=int(signal.SIGKILL), at_step=45),
        "chief_killed": train("run", "run", disturbed=0, signum=int(signal.SIGKILL), at_step=45),
        "finished": train("run", "run"),
        "evaluated": {"command": "evaluate", "arguments": [evaluate, evaluate]},
        "other_data": {
            "command": "train",
            "arguments": [
                [
                    f"--config={config}",
                    f"--workdir={folder / 'other_data'}",
                    "--config.data.name=folder",
                    "--config.data.image_size=8",
                    f"--config.data.data_dir={write_images(folder / other, other)}",
                ]
                for other in ("cat", "dog")
            ],
        },
        "diverged": train(
            "diverged", "diverged", spoiled_step=7, overrides=["--config.train.retries=1"]
        ),
    }
    arguments = [str(TESTS / "train_with_workers.py"), json.dumps(list(commands.values()))]
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            "http_proxy": f"http://127.0.0.1:{proxy.getsockname()[1]}",
        }
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))


def statuses(pair):
    return [worker["status"] for worker in pair]


def errors(pair):
    """Returns the error of each worker, the last line of its output."""
    last_lines = []
    for worker in pair:
        lines = [line for line in worker["text"].splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and worker["text"].splitlines()[-1] == lines[0], worker["text"]
        last_lines.append(lines[0])
    return last_lines


def test_a_signal_to_one_worker_stops_both_at_the_same_step(pairs):
    assert statuses(pairs["terminated"]) == [143, 143]
    for error in errors(pairs["terminated"]):
        assert "stopped by SIGTERM at step 20 of 60, saved in" in error


@pytest.mark.parametrize("killed, pair", [(1, "killed"), (0, "chief_killed")])
def test_a_worker_ends_when_the_other_is_killed(killed, pair, pairs):
    """The status is one that Kubeflow's TFJob retries."""
    survivor = 1 - killed
    assert statuses(pairs[pair])[killed] == -signal.SIGKILL
    assert statuses(pairs[pair])[survivor] == 138, pairs[pair][survivor]["text"]
    assert pairs[pair][survivor]["seconds"] < 20
    assert re.fullmatch(
        rf"error: worker {killed} \(localhost:\d+\) has ended or does not answer: read its output,"
        " and restart all workers",
        pairs[pair][survivor]["text"].splitlines()[-1],
    )


def test_restarted_workers_equal_two_replicas_of_one_process(pairs, folder):
    """Bit-exact, since the sum of two numbers does not depend on their order."""
    assert statuses(pairs["finished"]) == [0, 0], pairs["finished"]
    config = small_mlp(**CONFIG, **{"distribution.strategy": "mirrored"})
    config.distribution.replicas = 2
    expected = train_and_evaluate(config, folder / "mirrored")
    lines = [
        [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]
        for lines in (Workdir(folder / n).read_metrics() for n in ("run", "mirrored"))
    ]
    assert lines[0] == lines[1]
    assert lines[0][-1]["variables_sha256"] == expected["variables_sha256"]


def test_only_the_chief_writes(pairs, folder):
    assert statuses(pairs["finished"]) == [0, 0]
    # One file of events for each of the four starts.
    assert len(list((folder / "run").glob("events.*"))) == 4


def test_workers_evaluate_together(pairs, folder):
    assert statuses(pairs["evaluated"]) == [0, 0], pairs["evaluated"]
    last = Workdir(folder / "run").read_metrics()[-1]
    for worker in pairs["evaluated"]:
        found = json.loads(worker["text"].splitlines()[-1])
        assert found["accuracy"] == last["validation/accuracy"]
        assert found["examples"] == last["validation/examples"]


def test_a_divergence_on_one_worker_rolls_back_both(pairs, folder):
    assert statuses(pairs["diverged"]) == [3, 3]
    first, second = errors(pairs["diverged"])
    assert "the loss is not finite at step 7 " in first
    assert first == second
    lines = Workdir(folder / "diverged").read_metrics()
    assert [(line["step"], line.keys() - {"step", "examples"}) for line in lines] == [
        (0, {"retry"}),
        (7, {"diverged"}),
    ]


def test_workers_with_different_data_are_rejected(pairs, folder):
    assert statuses(pairs["other_data"]) == [2, 2], pairs["other_data"]
    for error in errors(pairs["other_data"]):
        assert "the workers read different classes: copy the same data to each machine" in error
    assert not (folder / "other_data").exists()


@pytest.mark.parametrize("here, there, accepted", [(7, 7, True), (7, 8, False), (None, 8, True)])
@pytest.mark.parametrize("key", FINGERPRINTS)
def test_only_known_hashes_of_the_data_are_compared(key, here, there, accepted, monkeypatch):
    def data(value):
        return types.SimpleNamespace(
            input_shape=(8, 8, 1),
            class_names=("cat", "dog"),
            num_train_examples=4,
            num_validation_examples=2,
            fingerprint={key: value} if value else {},
        )

    numbers = []
    monkeypatch.setattr(workers, "gather_from_workers", lambda _, n: numbers.append(n) or [n])
    workers.check_same_data(None, data(there))
    theirs = iter(numbers)
    monkeypatch.setattr(workers, "gather_from_workers", lambda _, n: [n, next(theirs)])
    expected = pytest.raises(UsageError, match=f"read different {FINGERPRINTS[key]}: copy")
    with contextlib.nullcontext() if accepted else expected:
        workers.check_same_data(None, data(here))


@pytest.mark.parametrize(
    "differs, message",
    [
        (lambda number: number > 0, "the workers have different configs"),
        (lambda number: number == 0, "the workers read the checkpoints of steps 0, 20 in workdir"),
    ],
    ids=["config", "step"],
)
def test_workers_of_different_runs_are_rejected(differs, message, tmp_path, monkeypatch):
    """The workers compare the hash of the config, then the step to resume from."""

    def gathered(strategy, number):
        return [number, number + 20 if differs(number) else number]

    monkeypatch.setattr(workers, "gather_from_workers", gathered)
    with pytest.raises(UsageError, match=message):
        train_and_evaluate(small_mlp(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
