"""The command `slurm`, and its script in a real Slurm cluster where one can be started.

`make slurm-check` also trains in it, which takes four minutes.
"""

import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from commands import ROOT, launch  # noqa: E402
from slurm_cluster import missing, running_cluster  # noqa: E402


def needs_slurm(test):
    return pytest.mark.job(pytest.mark.skipif(bool(missing()), reason=missing())(test))


def make_script(*arguments):
    done = launch("slurm", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def script():
    """The script for two nodes."""
    return make_script(
        *("--config=mnist_bn", "--workdir=runs/one", "--nodes=2", "--gpus_per_node=5"),
        *("--cpus_per_node=4", "--time=1:00:00", "--sbatch=--account=me", "--sbatch=--comment=a b"),
        "--setup=module load cuda",
    )


def test_flags_become_options(script):
    options = re.findall(r"^#SBATCH (.*)$", script, flags=re.MULTILINE)
    assert options == [
        *("--job-name=one", "--output=%x-%j.log", "--nodes=2", "--ntasks-per-node=1"),
        *("--signal=TERM@120", "--gpus-per-node=5", "--cpus-per-task=4", "--time=1:00:00"),
        *("--account=me", "'--comment=a b'", "--requeue", "--open-mode=append"),
    ]
    assert "\nmodule load cuda\n" in script
    training = next(line for line in script.splitlines() if line.startswith("srun "))
    assert training.startswith(
        f"srun --wait=120 {sys.executable} -m launch.train --config=mnist_bn"
    )
    assert "--config.distribution.strategy=multi_worker" in training
    assert f"--workdir={ROOT}/runs/one" in training
    # Slurm reads options up to the first line of code only.
    assert script.index("--open-mode") < script.index("set -uo pipefail")
    assert "@" not in re.sub("TERM@120", "", script)


def test_the_script_has_no_faults(script, tmp_path):
    (tmp_path / "train.sh").write_text(script)
    folder = pathlib.Path(sys.executable).parent
    subprocess.run([folder / "shellcheck", tmp_path / "train.sh"], check=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nodes=7"], "=60 is invalid: expected a multiple of the 7 replicas of 7 node"),
        (
            ["--config.distribution.strategy=one_device", "--gpus_per_node=8"],
            "--gpus_per_node=8 and distribution.strategy=one_device are mutually exclusive: pass",
        ),
        (
            ["--nodes=2", "--gpus_per_node=7"],
            "expected a multiple of the 14 replicas of 2 nodes with 7 GPUs each",
        ),
        (
            [
                "--gpus_per_node=8",
                "--config.distribution.strategy=mirrored",
                "--config.distribution.replicas=7",
            ],
            "expected a multiple of the 7 replicas of 1 node with 8 GPUs each",
        ),
        (["--config.train.micro_batches=0"], "train.micro_batches=0 is invalid: expected a pos"),
        (
            ["--nodes=2", "--config.distribution.strategy=mirrored"],
            "'mirrored' is invalid on several nodes: expected 'multi_worker', which is set for you",
        ),
        (["--sbatch=account"], "'account' is not an option of sbatch: expected --sbatch=--OPTION"),
        (["--submit"], "sbatch is not installed: run this on a login node"),
    ],
)
def test_invalid_flags_are_rejected(arguments, message, tmp_path):
    done = launch("slurm", "--config=mnist_bn", "--workdir=runs/one", *arguments, PATH="")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr


# The script with commands in place of Slurm's. `srun` ends with the status of each attempt.

_FAKES = {
    "srun": '[ -z "$OWN" ] || echo "$OWN" >>"$BN_KERAS_STATUS_FILE"; exit "$STATUS"',
    "squeue": "echo RUNNING",
    "scontrol": 'echo "$@" >>"$REQUESTS"',
    "module": "true",
}


class FakeSlurm:
    """Runs the script once for each start of a job, in the folder that it was submitted in."""

    def __init__(self, script, folder):
        self._script, self._restarts = script, itertools.count()
        self.folder, self._requests = folder / "submitted", folder / "requests"
        self._programs = folder / "programs"
        for path in (self.folder, self._programs):
            path.mkdir()
        for name, line in _FAKES.items():
            (self._programs / name).write_text(f"#!/bin/sh\n{line}\n")
            (self._programs / name).chmod(0o755)

    def start(self, status, seconds=0, own=""):
        """Runs a training that ends with a status after a time; returns whether it is requeued.

        `own` is the status of the process that failed first, if `status` is that of another one.
        """
        self._requests.write_text("")
        done = subprocess.run(
            ["bash"],
            input=self._script,
            cwd=self.folder,
            env=os.environ
            | {
                "PATH": f"{self._programs}:{os.environ['PATH']}",
                "REQUESTS": str(self._requests),
                "SLURM_JOB_ID": "7",
                "SLURM_RESTART_COUNT": str(next(self._restarts)),
                "STATUS": str(status),
                "OWN": str(own),
                # bash counts on from this value.
                "SECONDS": str(seconds),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == (own or status), done.stderr
        return self._requests.read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    "ends, requeued",
    [
        # (status, seconds after the start) of each attempt, and whether the job is requeued.
        ([(138, 0)] * 4, [True, True, True, False]),
        # After days with time limits and preemptions, an error counts as the first one.
        ([(143, 86_000)] * 5 + [(75, 60)] * 4, [True] * 8 + [False]),
        ([(143, 0)] * 6, [True] * 6),
        ([(137, 300)] * 6, [True] * 6),
        ([(1, 0)] * 3 + [(1, 400)] + [(1, 0)] * 4, [True] * 7 + [False]),
        # A preemption soon after a start does not show that the training works.
        ([(1, 0), (1, 0), (143, 5), (1, 0), (1, 0)], [True] * 4 + [False]),
        ([(2, 0)], [False]),
        ([(0, 400)], [False]),
    ],
)
def test_the_job_ends_after_four_quick_failures_in_a_row(ends, requeued, script, tmp_path):
    slurm = FakeSlurm(script, tmp_path)
    assert [slurm.start(*end) for end in ends] == requeued
    assert not list(slurm.folder.iterdir()), "the count is left behind"


def test_an_error_of_one_process_that_would_recur_ends_the_job(script, tmp_path):
    """srun ends with the status of the processes that have lost this one."""
    slurm = FakeSlurm(script, tmp_path)
    assert slurm.start(138, 400)
    assert not slurm.start(138, 400, own=2)
    assert not list(slurm.folder.iterdir())


def test_a_quick_failure_that_cannot_be_counted_ends_the_job(script, tmp_path):
    slurm = FakeSlurm(script, tmp_path)
    assert slurm.start(1)
    [count] = slurm.folder.iterdir()
    count.unlink()
    count.mkdir()
    assert not slurm.start(1)


def test_setup_code_may_read_unset_variables(tmp_path):
    script = make_script(
        "--config=mnist_bn", "--workdir=runs/one", '--setup=export MISSING="$UNSET"'
    )
    assert FakeSlurm(script, tmp_path).start(143)


# A real cluster.


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with running_cluster(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


def submit(slurm, script, training, *options):
    """Submits the script with a shell command in place of the training; returns the job's id."""
    script = re.sub(r"^srun .*? \|\|", lambda _: f"srun {training} ||", script, flags=re.MULTILINE)
    script = re.sub(r"^#SBATCH --(gpus-per-node|cpus-per-task|account).*\n", "", script, flags=re.M)
    return slurm.run(
        *("sbatch", "--parsable", f"--output={slurm.folder}/%j.out", *options), stdin=script
    ).strip()


@needs_slurm
@pytest.mark.parametrize("layout", [["--nodes=2", "--ntasks=2"], ["--nodes=1", "--ntasks=1"]])
def test_each_task_finds_its_cluster(layout, slurm):
    program = "from bn_keras.distribute.detection import find_cluster; print(find_cluster())"
    lines = slurm.run("srun", *layout, sys.executable, "-c", program).splitlines()
    workers = [
        re.fullmatch(r"worker (\d) of (\d) \(Slurm: (.*)\)", line).groups() for line in lines
    ]
    assert len({addresses for *_, addresses in workers}) == 1
    assert sorted(index for index, *_ in workers) == [str(i) for i in range(len(lines))]
    assert {size for _, size, _ in workers} == {str(len(lines))} == {layout[1][-1]}


@needs_slurm
@pytest.mark.parametrize(
    "training, state, restarts",
    [
        ("true", "COMPLETED", 0),
        ("bash -c 'exit 2'", "FAILED", 0),
        # The other process has lost it.
        (
            "bash -c '((SLURM_PROCID)) && exit 138; echo 2 >>$BN_KERAS_STATUS_FILE; exit 2'",
            *("FAILED", 0),
        ),
        # The training succeeds after its first restart.
        ("bash -c '((${SLURM_RESTART_COUNT:-0})) || exit 138'", "COMPLETED", 1),
        ("bash -c '((${SLURM_RESTART_COUNT:-0})) || kill -9 $$'", "COMPLETED", 1),
    ],
)
def test_the_job_is_requeued_unless_the_error_would_recur(training, state, restarts, slurm, script):
    job = submit(slurm, script, training)
    fields = slurm.wait_for(job, lambda f: f["JobState"] in ("COMPLETED", "FAILED"), 90)
    assert (fields["JobState"], int(fields["Restarts"])) == (state, restarts)


@needs_slurm
def test_a_cancelled_job_is_not_requeued(slurm, script):
    job = submit(slurm, script, "bash -c 'trap \"exit 143\" TERM; while :; do sleep 0.1; done'")
    slurm.wait_for(job, lambda f: f["JobState"] == "RUNNING", 30)
    time.sleep(2)
    slurm.run("scancel", job)
    fields = slurm.wait_for(job, lambda f: f["JobState"] not in ("RUNNING", "COMPLETING"), 60)
    time.sleep(3)
    assert slurm.job(job)["JobState"] == "CANCELLED" and fields["Restarts"] == "0"


# A training, interrupted in each way that Slurm has.


class Training:
    """A job that trains in the cluster, and the run that it writes."""

    def __init__(self, slurm, workdir, flags):
        self.slurm, self.metrics = slurm, workdir / "metrics.jsonl"
        script = make_script(*flags, f"--workdir={workdir}", "--nodes=2", "--grace_seconds=45")
        self.job = slurm.run(
            *("sbatch", "--parsable", f"--chdir={ROOT}", f"--output={slurm.folder}/%j.out"),
            stdin=script,
        ).strip()
        self.restarts = 0

    def last_step(self):
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def log(self):
        return (self.slurm.folder / f"{self.job}.out").read_text()

    def wait_for_progress(self):
        """Waits until the job has trained further than it ever has."""
        step = self.last_step()
        self.slurm.wait_for(self.job, lambda _: self.last_step() > step, 120)

    def wait_for_requeue(self):
        """Waits until the job has left its nodes and returned to the queue."""
        self.restarts += 1
        fields = self.slurm.wait_for(
            self.job,
            lambda f: int(f["Restarts"]) == self.restarts and f["JobState"] != "COMPLETING",
            120,
        )
        assert fields["JobState"] in ("PENDING", "RUNNING"), (fields, self.log()[-3000:])

    def kill_task(self, node):
        """Kills the worker on a node."""
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_bytes().split(b"\0")
                program = (process / "cmdline").read_bytes()
            except OSError:
                continue
            own = {f"SLURM_JOB_ID={self.job}".encode(), f"SLURM_NODEID={node}".encode()}
            if own <= set(variables) and b"launch.train" in program and b"srun" not in program:
                os.kill(int(process.name), signal.SIGKILL)
                return
        raise AssertionError("the worker does not run")


@needs_slurm
@pytest.mark.skipif("SLURM_CHECK" not in os.environ, reason="only by `make slurm-check`")
def test_a_job_survives_everything_and_ends_with_the_same_bits(slurm, tmp_path):
    flags = [
        *("--config=mnist_bn", "--config.data.name=digits"),
        *("--config.data.validation_split=validation", "--config.evaluation.every_steps=100000"),
        *("--config.train.steps=20000", "--config.train.steps_per_loop=100"),
        "--config.checkpoint.every_steps=500",
    ]
    training = Training(slurm, tmp_path / "interrupted", flags)

    training.wait_for_progress()
    training.kill_task(node=1)
    training.wait_for_requeue()
    assert re.search(r"error: worker 1 \(127.0.0.3:\d+\) has ended", training.log())

    training.wait_for_progress()
    slurm.run("scontrol", "requeue", training.job)
    training.wait_for_requeue()
    assert training.log().count("error: stopped by SIGTERM at step") == 2

    training.wait_for_progress()
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
    training.wait_for_requeue()
    assert training.log().count("error: stopped by SIGTERM at step") == 4

    training.wait_for_progress()
    slurm.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=1")
    training.wait_for_requeue()
    slurm.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=UNLIMITED")
    assert training.log().count("error: stopped by SIGTERM at step") == 6

    slurm.wait_for(training.job, lambda f: f["JobState"] == "COMPLETED", 300)
    print(training.log())
    reference = tmp_path / "uninterrupted"
    subprocess.run(
        [
            *(sys.executable, "-m", "launch.train", *flags, f"--workdir={reference}"),
            *("--config.distribution.strategy=mirrored", "--config.distribution.replicas=2"),
        ],
        cwd=ROOT,
        check=True,
    )
    hashes = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["variables_sha256"]
        for folder in (tmp_path / "interrupted", reference)
    ]
    assert hashes[0] == hashes[1]
