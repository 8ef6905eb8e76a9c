"""Submits a job to a Cloud TPU, watches it across preemptions, and deletes it."""

import dataclasses
import datetime
import json
import shlex
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from .. import cli
from ..command_error import CommandError
from . import job as jobs
from .gcloud import (
    GcloudError,
    NameTakenError,
    NotFoundInCloudError,
    Runner,
    checked_output,
    run_command,
)
from .job import Job

# Repeats of one request after transient failures.
_MAX_REPEATS = 10
# Only the end of metrics.jsonl is read; a line has a few hundred bytes.
_LAST_BYTES = 65_536
# A VM sends its first log a minute after it has booted, which takes a few minutes.
_MAX_SILENCE = datetime.timedelta(minutes=20)
_BY_USER = "by a user"

Answer = TypeVar("Answer")


class JobFailedError(CommandError):
    """The job ended or cannot run, and its training is unfinished."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=4)


@dataclasses.dataclass(frozen=True)
class Status:
    """The status of a job.

    Args:
      state: state of the queued resource, or of its VM if the VM is lost; "ABSENT" without a job.
      detail: the service's explanation.
      marker: "DONE" or "FAILED" once the startup script has written it; "" before.
      problem: what probably keeps an active VM from training, and what to do; "" without a problem.
    """

    state: str
    detail: str = ""
    marker: str = ""
    problem: str = ""

    def __str__(self) -> str:
        state = " ".join(filter(None, (self.state, self.detail)))
        return self.marker or ", but ".join(filter(None, (state, self.problem)))


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _echo(text: str) -> None:
    # Flushed, because a pipe buffers its lines.
    print(text, flush=True)


@dataclasses.dataclass
class Cloud:
    """The connection to gcloud, the clock and the output; tests replace them.

    Args:
      run: runs one command.
      now: returns the time, with its time zone.
      sleep: waits a number of seconds.
      echo: prints a line.
    """

    run: Runner = run_command
    now: Callable[[], datetime.datetime] = _utc_now
    sleep: Callable[[float], None] = time.sleep
    echo: Callable[[str], None] = _echo

    def execute(self, command: jobs.ShellCommand) -> str:
        """Runs a command and returns its output; raises GcloudError if it fails."""
        return checked_output(self.run(command))

    def echo_with_time(self, text: str) -> None:
        """Prints a line with the time in front."""
        self.echo(f"{self.now():%H:%M:%S} {text}")


def read_status(job: Job, cloud: Cloud) -> Status:
    """Returns the status of a job."""
    try:
        description = json.loads(cloud.execute(jobs.describe_command(job)))["state"]
        status = Status(description["state"], _detail(description))
    except NotFoundInCloudError:
        status = Status("ABSENT")
    if status.state == "ACTIVE":
        status = _node_status(job, cloud)
    # Read last: a job whose VM is lost after the marker was written has ended.
    files = list_files(job, cloud)
    marker = next((m for m in (jobs.DONE, jobs.FAILED) if m in files), "")
    problem = "" if marker or "logs" in files else status.problem
    return dataclasses.replace(status, marker=marker, problem=problem)


def _node_status(job: Job, cloud: Cloud) -> Status:
    try:
        node = json.loads(cloud.execute(jobs.describe_node_command(job)))
    except NotFoundInCloudError:
        return Status("TERMINATED")
    if node["state"] in ("PREEMPTED", "TERMINATED"):
        return Status(node["state"])
    return Status("ACTIVE", node["state"], problem=_explain_silence(job, node, cloud.now()))


def _explain_silence(job: Job, node: dict, now: datetime.datetime) -> str:
    """Returns why a VM without a log has not sent one; "" while that is not overdue."""
    created = node.get("createTime")
    if node["state"] != "READY" or not created:
        return ""
    age = now - datetime.datetime.fromisoformat(created)
    if age < _MAX_SILENCE:
        return ""
    account = node.get("serviceAccount", {}).get("email", "ACCOUNT")
    return (
        f"its VM has sent no log since its creation {age // datetime.timedelta(minutes=1)} minutes"
        f" ago: the service account {account} probably lacks Storage Object Admin on the bucket;"
        f" grant it with `{jobs.grant_command(job, account)}`"
    )


def _detail(state: dict) -> str:
    if state["state"] == "SUSPENDED" and state.get("stateInitiator") == "USER":
        return _BY_USER
    error = state.get("failedData", {}).get("error", {}).get("message", "")
    return " ".join(error.split())


def list_files(job: Job, cloud: Cloud) -> set[str]:
    """Returns the names of the files in a job's folder; none if it does not exist."""
    try:
        urls = cloud.execute(jobs.list_command(job.folder)).split()
    except NotFoundInCloudError:
        return set()
    return {url.removeprefix(f"{job.folder}/").rstrip("/") for url in urls}


def read_last_metrics(job: Job, cloud: Cloud) -> str:
    """Returns the last complete line of the run's metrics, or ""."""
    try:
        end = cloud.execute(
            jobs.read_command(f"{job.workdir.rstrip('/')}/metrics.jsonl", _LAST_BYTES)
        )
    except NotFoundInCloudError:
        return ""
    return "".join(end.split("\n")[-2:-1])


def _read_failure(job: Job, cloud: Cloud) -> str:
    return cloud.execute(jobs.read_command(f"{job.folder}/{jobs.FAILED}")).strip()


def submit_commands(job: Job) -> list[jobs.ShellCommand]:
    """Returns the commands that submit a job to a new workdir: two checks, then the changes."""
    checks = [jobs.list_command(job.folder), jobs.describe_command(job)]
    return [*checks, *jobs.upload_commands(job), jobs.create_command(job)]


def submit(job: Job, cloud: Cloud) -> None:
    """Queues a job.

    A finished training is continued by a job with other arguments, such as a larger train.steps.

    Raises:
      CommandError: the workdir's training is done, another job has the workdir or the name, or
        gcloud fails.
    """
    files = list_files(job, cloud)
    previous = load_job(job.workdir, cloud) if "job.json" in files else None
    if jobs.DONE in files and (previous is None or previous.arguments == job.arguments):
        raise CommandError(
            f"the training in {job.workdir} is done: pass a larger train.steps or train.epochs to"
            " continue it, or another --workdir"
        )
    if previous:
        _check_absent(previous, cloud)
    _check_name_is_free(job, cloud)
    for marker in (jobs.DONE, jobs.FAILED):
        if marker in files:
            cloud.execute(jobs.remove_command(f"{job.folder}/{marker}"))
    for command in jobs.upload_commands(job):
        cloud.execute(command)
    try:
        cloud.execute(jobs.create_command(job))
    except NameTakenError:
        # Otherwise `delete --workdir` would delete the other job of that name.
        cloud.execute(jobs.remove_command(f"{job.folder}/job.json"))
        raise


def _check_absent(previous: Job, cloud: Cloud) -> None:
    state = read_status(previous, cloud).state
    if state != "ABSENT":
        raise CommandError(
            f"job {previous.name} in {previous.zone} trains in {previous.workdir} and is {state}:"
            " two trainers would corrupt the run; delete the job first:"
            f" {format_command('delete', previous)}"
        )


def _check_name_is_free(job: Job, cloud: Cloud) -> None:
    try:
        cloud.execute(jobs.describe_command(job))
    except NotFoundInCloudError:
        return
    raise CommandError(
        f"the name {job.name} is taken in {job.zone} by a job with another workdir: pass another"
        " --name"
    )


def load_job(workdir: str, cloud: Cloud) -> Job:
    """Loads the job that was submitted for a workdir.

    Raises:
      CommandError: no job was submitted for it, or the job's file is damaged.
    """
    jobs.check_bucket_folder(workdir)
    try:
        return Job.from_json(
            cloud.execute(jobs.read_command(f"{jobs.job_folder(workdir)}/job.json"))
        )
    except NotFoundInCloudError:
        raise CommandError(
            f"no job was submitted for {workdir}; `gcloud compute tpus queued-resources list"
            " --zone=ZONE` lists all jobs"
        ) from None


def watch(job: Job, cloud: Cloud, max_retries: int, poll_seconds: float) -> str:
    """Follows a job until it ends, and creates it again when its VM is preempted.

    A job with a time limit is deleted when it ends, because its VM costs money until then and its
    user expects a maximum cost. Any other job is kept, as its user may want to inspect the VM.

    Args:
      job: a submitted job.
      cloud: see `Cloud`.
      max_retries: maximum number of times the job is created again.
      poll_seconds: time between two polls.

    Returns:
      The last line of the run's metrics.

    Raises:
      JobFailedError: the training failed, the job was deleted or suspended by a user, its time
        limit is past, or its VM sends no log or was lost too often.
    """
    retries = iter(range(1, max_retries + 1))
    while not _wait_until_done(job, cloud, poll_seconds):
        _retrying(delete, job, cloud, poll_seconds)
        _create_again(job, cloud, retries, max_retries, poll_seconds)
    return _retrying(read_last_metrics, job, cloud, poll_seconds)


def _wait_until_done(job: Job, cloud: Cloud, poll_seconds: float) -> bool:
    """Waits until the job is done, and returns True, or its VM is lost, and returns False."""
    reported = ""
    while True:
        status = _retrying(read_status, job, cloud, poll_seconds)
        if str(status) != reported:
            reported = str(status)
            cloud.echo_with_time(reported)
        if status.marker or status.problem:
            # Before any other request, whose failure would leave a job with a maximum cost running.
            _retrying(_delete_or_remind, job, cloud, poll_seconds)
        if status.problem:
            raise JobFailedError(f"job {job.name} is {status}")
        if status.marker == jobs.DONE:
            return True
        if status.marker == jobs.FAILED:
            reason = _retrying(_read_failure, job, cloud, poll_seconds)
            raise JobFailedError(f"job {job.name} failed: {reason}")
        if _is_lost(job, status):
            return False
        left = _seconds_left(job, cloud)
        if left <= 0:
            _retrying(delete, job, cloud, poll_seconds)
            raise JobFailedError(
                f"job {job.name} reached its time limit and is deleted; submit it with a larger"
                " --max_hours to resume the run"
            )
        cloud.sleep(min(poll_seconds, left))


def _is_lost(job: Job, status: Status) -> bool:
    """Returns whether the VM is lost; raises JobFailedError if the job must not be retried."""
    match status.state:
        case "ABSENT":
            raise JobFailedError(
                f"job {job.name} does not exist: someone deleted it; submit it again to resume the"
                " run"
            )
        case "FAILED":
            raise JobFailedError(
                f"job {job.name} did not get a TPU: {status.detail}; delete the job, then submit it"
                " again, or with another --zone or --accelerator_type"
            )
        case "SUSPENDED" if status.detail == _BY_USER:
            raise JobFailedError(
                f"job {job.name} was suspended by a user, not preempted; delete the job and submit"
                " it again to resume the run"
            )
    return status.state in ("SUSPENDED", "PREEMPTED", "TERMINATED")


def _retrying(
    request: Callable[[Job, Cloud], Answer], job: Job, cloud: Cloud, pause_seconds: float
) -> Answer:
    """Repeats a request after transient failures, so that they do not end `watch`."""
    for _ in range(_MAX_REPEATS):
        try:
            return request(job, cloud)
        except GcloudError as error:
            if not error.transient:
                raise
            cloud.echo_with_time(f"failed, retrying: {error}")
            cloud.sleep(pause_seconds)
    return request(job, cloud)


def _create_again(
    job: Job, cloud: Cloud, retries: Iterator[int], max_retries: int, poll_seconds: float
) -> None:
    try:
        _try_to_create(job, cloud, retries, max_retries, poll_seconds)
    except KeyboardInterrupt:
        raise CommandError(
            f"interrupted: job {job.name} is deleted and not created again: submit it to resume the"
            " run",
            130,
        ) from None


def _try_to_create(
    job: Job, cloud: Cloud, retries: Iterator[int], max_retries: int, poll_seconds: float
) -> None:
    for retry in retries:
        pause = min(60 * 2 ** (retry - 1), 3600)
        cloud.echo_with_time(f"creating the job again in {pause} s ({retry}/{max_retries})")
        cloud.sleep(pause)
        if job.valid_until and cloud.now() >= job.valid_until:
            raise JobFailedError(
                f"job {job.name} was lost after its --valid_until; submit it with a later one, or"
                " with a larger --max_hours, to resume the run"
            )
        try:
            cloud.execute(jobs.create_command(job))
            return
        except GcloudError as error:
            if not error.transient:
                raise
            cloud.echo_with_time(f"not created: {error}")
            # The job exists if only the answer was lost.
            status = _retrying(read_status, job, cloud, poll_seconds)
            if status.state not in ("ABSENT", "DELETING"):
                return
    raise JobFailedError(
        f"job {job.name} was lost after being created again {max_retries} times, and is deleted;"
        " submit it to resume from its last checkpoint"
    )


def _seconds_left(job: Job, cloud: Cloud) -> float:
    if job.delete_at is None:
        return float("inf")
    return (job.delete_at - cloud.now()).total_seconds()


def read_logs(job: Job, cloud: Cloud) -> str:
    """Returns the output of a job over all boots of its VMs, up to a minute late."""
    try:
        return cloud.execute(jobs.read_command(f"{job.folder}/logs/*"))
    except NotFoundInCloudError:
        status = read_status(job, cloud)
        advice = "" if status.problem else ": a VM sends its first log a minute after it starts"
        raise CommandError(f"job {job.name} has no log yet, and is {status}{advice}") from None


def delete(job: Job, cloud: Cloud) -> None:
    """Deletes a job and its VM; keeps the run and the logs."""
    try:
        cloud.execute(jobs.delete_command(job))
    except NotFoundInCloudError:
        cloud.echo(f"Job {job.name} in {job.zone} does not exist.")
    else:
        cloud.echo(f"Job {job.name} is deleted. The run stays in {job.workdir}.")


def remind_of_cost(job: Job, cloud: Cloud) -> None:
    """Prints the command that deletes a job."""
    cloud.echo(f"It costs money until it is deleted: {format_command('delete', job)}")


def _delete_or_remind(job: Job, cloud: Cloud) -> None:
    """Deletes a job with a time limit, and prints the command that deletes any other job."""
    if job.delete_at:
        delete(job, cloud)
    else:
        remind_of_cost(job, cloud)


def format_command(subcommand: str, job: Job) -> str:
    """Returns the command line that runs a subcommand on a job."""
    return shlex.join([*cli.command_line("tpu"), subcommand, f"--workdir={job.workdir}"])
