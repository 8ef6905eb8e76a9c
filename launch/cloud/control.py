"""The life of a job on a Cloud TPU: submitted, watched over its preemptions, deleted."""

import dataclasses
import datetime
import json
import shlex
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..command_error import CommandError
from . import job as jobs
from .gcloud import (
    GcloudError,
    NameTakenError,
    NotFoundInCloudError,
    Runner,
    checked,
    run_command,
)
from .job import Job

# How many polls in a row may go without an answer.
_MAX_UNANSWERED = 10
# Of the metrics; a line has a few hundred.
_LAST_BYTES = 65_536
_BY_USER = "by a user"

Answer = TypeVar("Answer")


class JobFailedError(CommandError):
    """The job came to an end that is not its training's."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=4)


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a job stands.

    Args:
      state: of the queued resource, or of its VM if that was lost; "ABSENT" where there is no job.
      detail: what the service says to it.
      marker: "DONE" or "FAILED" once the startup script wrote it; else "".
    """

    state: str
    detail: str = ""
    marker: str = ""

    def __str__(self) -> str:
        return self.marker or " ".join(filter(None, (self.state, self.detail)))


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _say(text: str) -> None:
    # At once, for whoever follows it through a pipe.
    print(text, flush=True)


@dataclasses.dataclass
class Cloud:
    """What the commands below do things with; tests put their own in.

    Args:
      run: runs one command.
      now: gives the time, with its zone.
      sleep: waits so many seconds.
      say: prints a line.
    """

    run: Runner = run_command
    now: Callable[[], datetime.datetime] = _utc_now
    sleep: Callable[[float], None] = time.sleep
    say: Callable[[str], None] = _say

    def do(self, command: jobs.Command) -> str:
        """Runs a command and gives what it prints; raises GcloudError if it fails."""
        return checked(self.run(command))


def status_of(job: Job, cloud: Cloud) -> Status:
    """Looks where a job stands."""
    try:
        description = json.loads(cloud.do(jobs.describe_command(job)))["state"]
        status = Status(description["state"], _detail(description))
    except NotFoundInCloudError:
        status = Status("ABSENT")
    if status.state == "ACTIVE":
        status = _node_status(job, cloud)
    # Only now: what is lost after its marker was written is not lost.
    files = files_of(job, cloud)
    marker = next((m for m in (jobs.DONE, jobs.FAILED) if m in files), "")
    return dataclasses.replace(status, marker=marker)


def _node_status(job: Job, cloud: Cloud) -> Status:
    try:
        node = json.loads(cloud.do(jobs.describe_node_command(job)))
    except NotFoundInCloudError:
        return Status("TERMINATED")
    lost = node["state"] in ("PREEMPTED", "TERMINATED")
    return Status(node["state"]) if lost else Status("ACTIVE", node["state"])


def _detail(state: dict) -> str:
    if state["state"] == "SUSPENDED" and state.get("stateInitiator") == "USER":
        return _BY_USER
    error = state.get("failedData", {}).get("error", {}).get("message", "")
    return " ".join(error.split())


def files_of(job: Job, cloud: Cloud) -> set[str]:
    """Lists the names in a job's folder; none where there is no folder."""
    try:
        urls = cloud.do(jobs.list_command(job.folder)).split()
    except NotFoundInCloudError:
        return set()
    return {url.removeprefix(f"{job.folder}/").rstrip("/") for url in urls}


def last_metrics(job: Job, cloud: Cloud) -> str:
    """Gives the last whole line of the run's metrics; "" before there is one."""
    try:
        end = cloud.do(jobs.read_command(f"{job.workdir.rstrip('/')}/metrics.jsonl", _LAST_BYTES))
    except NotFoundInCloudError:
        return ""
    return "".join(end.split("\n")[-2:-1])


def _reason(job: Job, cloud: Cloud) -> str:
    return cloud.do(jobs.read_command(f"{job.folder}/{jobs.FAILED}")).strip()


def submission(job: Job) -> list[jobs.Command]:
    """Gives the commands that submit a job whose workdir has had none: two look-ups, then deeds."""
    looks = [jobs.list_command(job.folder), jobs.describe_command(job)]
    return [*looks, *jobs.upload_commands(job), jobs.create_command(job)]


def submit(job: Job, cloud: Cloud) -> None:
    """Puts a job into the queue.

    Raises:
      CommandError: the workdir's training is done, another job has the workdir or the name, or
        gcloud refuses.
    """
    files = files_of(job, cloud)
    if jobs.DONE in files:
        raise CommandError(f"the training in {job.workdir} is done: give another --workdir")
    if "job.json" in files:
        before = load(job.workdir, cloud)
        state = status_of(before, cloud).state
        if state != "ABSENT":
            raise CommandError(
                f"job {before.name} in {before.zone} has {job.workdir} and is {state}: two trainers"
                f" would spoil the run; delete it first: {delete_line(job)}"
            )
    try:
        cloud.do(jobs.describe_command(job))
    except NotFoundInCloudError:
        pass
    else:
        raise CommandError(
            f"the name {job.name} is taken in {job.zone}, by a job with another workdir:"
            " give another --name"
        )
    if jobs.FAILED in files:
        cloud.do(jobs.remove_command(f"{job.folder}/{jobs.FAILED}"))
    for command in jobs.upload_commands(job):
        cloud.do(command)
    try:
        cloud.do(jobs.create_command(job))
    except NameTakenError:
        # With it, `delete --workdir` would delete whatever has the name.
        cloud.do(jobs.remove_command(f"{job.folder}/job.json"))
        raise


def load(workdir: str, cloud: Cloud) -> Job:
    """Reads the job that was submitted for a workdir.

    Raises:
      CommandError: there is none, or it can't be read.
    """
    jobs.check_workdir(workdir)
    try:
        return Job.from_json(cloud.do(jobs.read_command(f"{jobs.job_folder(workdir)}/job.json")))
    except NotFoundInCloudError:
        raise CommandError(
            f"no job was submitted for {workdir}; `gcloud compute tpus queued-resources list"
            " --zone=ZONE` shows those that are there"
        ) from None


def watch(job: Job, cloud: Cloud, max_retries: int, poll_seconds: float) -> str:
    """Follows a job to its end, and submits it again when its VM was taken away.

    Args:
      job: submitted.
      cloud: to act on.
      max_retries: how often in all it is created again.
      poll_seconds: between two looks.

    Returns:
      The last line of the run's metrics.

    Raises:
      JobFailedError: its training failed, it was deleted or suspended by somebody, it is past its
        time, or it was lost once too often.
    """
    retries = iter(range(1, max_retries + 1))
    while not _ends_well(job, cloud, poll_seconds):
        _patiently(delete, job, cloud, poll_seconds)
        _create_again(job, cloud, retries, max_retries)
    return _patiently(last_metrics, job, cloud, poll_seconds)


def _ends_well(job: Job, cloud: Cloud, poll_seconds: float) -> bool:
    """Waits until the job is done (True) or its VM was taken away (False)."""
    said = None
    while True:
        status = _patiently(status_of, job, cloud, poll_seconds)
        if str(status) != said:
            said = str(status)
            cloud.say(f"{cloud.now():%H:%M:%S} {said}")
        if status.marker == jobs.DONE:
            return True
        if status.marker == jobs.FAILED:
            reason = _patiently(_reason, job, cloud, poll_seconds)
            raise JobFailedError(f"job {job.name} failed: {reason}")
        match status.state:
            case "ABSENT":
                raise JobFailedError(f"job {job.name} is gone: somebody deleted it")
            case "FAILED":
                raise JobFailedError(f"job {job.name} was not given a TPU: {status.detail}")
            case "SUSPENDED" if status.detail == _BY_USER:
                raise JobFailedError(f"job {job.name} was suspended by a user, not preempted")
            case "SUSPENDED" | "PREEMPTED" | "TERMINATED":
                return False
        left = _seconds_left(job, cloud)
        if left <= 0:
            _patiently(delete, job, cloud, poll_seconds)
            raise JobFailedError(f"job {job.name} was past its hours, and is deleted")
        cloud.sleep(min(poll_seconds, left))


def _patiently(
    look: Callable[[Job, Cloud], Answer], job: Job, cloud: Cloud, pause_seconds: float
) -> Answer:
    """Asks again for a while if gcloud gets no answer: a watch is longer than many a network."""
    for _ in range(_MAX_UNANSWERED):
        try:
            return look(job, cloud)
        except GcloudError as error:
            if not error.transient:
                raise
            cloud.say(f"{cloud.now():%H:%M:%S} no answer, trying again: {error}")
            cloud.sleep(pause_seconds)
    return look(job, cloud)


def _create_again(job: Job, cloud: Cloud, retries: Iterator[int], max_retries: int) -> None:
    try:
        _try_to_create(job, cloud, retries, max_retries)
    except KeyboardInterrupt:
        cloud.say(f"Job {job.name} is deleted and not created again: submit it to go on.")
        raise


def _try_to_create(job: Job, cloud: Cloud, retries: Iterator[int], max_retries: int) -> None:
    for retry in retries:
        pause = min(60 * 2 ** (retry - 1), 3600)
        cloud.say(f"{cloud.now():%H:%M:%S} creating it again in {pause} s ({retry}/{max_retries})")
        cloud.sleep(pause)
        if job.valid_until and cloud.now() >= job.valid_until:
            raise JobFailedError(f"job {job.name} was lost and its --valid_until is past")
        try:
            cloud.do(jobs.create_command(job))
            return
        except GcloudError as error:
            if not error.transient:
                raise
            cloud.say(f"{cloud.now():%H:%M:%S} not created: {error}")
            # It may be there all the same, if only the answer was lost.
            if status_of(job, cloud).state not in ("ABSENT", "DELETING"):
                return
    raise JobFailedError(
        f"job {job.name} was lost and created again {max_retries} times; it is deleted, and"
        " goes on from its last checkpoint when it is submitted again"
    )


def _seconds_left(job: Job, cloud: Cloud) -> float:
    if job.delete_at is None:
        return float("inf")
    return (job.delete_at - cloud.now()).total_seconds()


def logs(job: Job, cloud: Cloud) -> str:
    """Gives what the job has printed, over all boots of its VMs; up to a minute late."""
    try:
        return cloud.do(jobs.read_command(f"{job.folder}/logs/*"))
    except NotFoundInCloudError:
        raise CommandError(
            f"job {job.name} has no log yet, and is {status_of(job, cloud)}: a VM sends its first a"
            " minute after its start"
        ) from None


def delete(job: Job, cloud: Cloud) -> None:
    """Deletes a job with its VM; its run and its logs stay."""
    try:
        cloud.do(jobs.delete_command(job))
    except NotFoundInCloudError:
        cloud.say(f"There is no job {job.name} in {job.zone} any more.")
    else:
        cloud.say(f"Job {job.name} is deleted. The run stays in {job.workdir}.")


def command_line(command: str, job: Job) -> str:
    """Gives one of these commands as it is typed."""
    return f"python -m launch.tpu {command} {shlex.quote(f'--workdir={job.workdir}')}"


def delete_line(job: Job) -> str:
    """Gives the command that deletes a job."""
    return command_line("delete", job)
