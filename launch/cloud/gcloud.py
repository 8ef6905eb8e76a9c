"""Runs gcloud and explains its failures on one line, with advice."""

import dataclasses
import re
import subprocess
from collections.abc import Callable

from ..command_error import CommandError
from .job import ShellCommand


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The exit status and the output of a command."""

    status: int
    stdout: str = ""
    stderr: str = ""


Runner = Callable[[ShellCommand], Outcome]


class GcloudError(CommandError):
    """A gcloud command failed.

    Attributes:
      transient: whether the same command may succeed later.
    """

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class NotFoundInCloudError(GcloudError):
    """The job or the file does not exist."""


class NameTakenError(GcloudError):
    """A job or a VM of that name exists already."""


_LOGIN = "run `gcloud auth login`, or `gcloud auth activate-service-account`"
# Advice by pattern in the error messages of gcloud and its services. The first match applies.
_ADVICE = {
    r"active account|auth login|[Rr]eauth|invalid_grant|UNAUTHENTICATED": f"log in: {_LOGIN}",
    r"attribute \[project\]": "pass --project, or run `gcloud config set project PROJECT`",
    r"SERVICE_DISABLED|has not been used in project": "run `gcloud services enable"
    " tpu.googleapis.com`",
    r"[Ll]ocation .*(not found|invalid)|locations/\S+'? \(or it may not exist\)": "check"
    " --zone with `gcloud compute tpus locations list`, and that the project may use it",
    r"[Aa]ccelerator.?[Tt]ype": "the zone may not have this type: `gcloud compute tpus"
    " accelerator-types list --zone=ZONE` lists its types",
    r"[Qq]uota": "request more in the console under IAM & Admin, Quotas, or try another --zone or"
    " --accelerator_type, or --spot",
    r"RESOURCE_EXHAUSTED|[Cc]apacity|stockout": "the zone has no free TPU: try later, another"
    " --zone, or --spot",
    r"PERMISSION_DENIED|does not have permission|HTTPError 403": "the account lacks a role: TPU"
    " Admin on the project, or Storage Object Admin on the bucket",
    r"bucket does not exist|gs://\S+ not found: 404": "create the bucket first: `gcloud storage"
    " buckets create gs://BUCKET --location=REGION`",
}
_NOT_FOUND = r"NOT_FOUND.*(queuedResources|nodes)/|matched no objects"
_TRANSIENT = (
    r"RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED"
    r"|HTTPError (429|5\d\d)|[Cc]apacity|stockout|[Tt]imed? ?out|[Cc]onnection"
    r"|problem refreshing|unable to (find|connect)|[Nn]etwork is unreachable|name resolution"
)


def run_command(command: ShellCommand) -> Outcome:
    """Runs a command and waits for it.

    Raises:
      CommandError: the program is not installed.
    """
    stdin = command.stdin
    try:
        if isinstance(stdin, ShellCommand):
            producer = subprocess.run(stdin.argv, capture_output=True)
            if producer.returncode:
                return Outcome(producer.returncode, stderr=producer.stderr.decode(errors="replace"))
            content = producer.stdout
        else:
            content = stdin.encode()
        done = subprocess.run(command.argv, input=content, capture_output=True)
    except FileNotFoundError as error:
        advice = ": see https://cloud.google.com/sdk/docs/install, then run `gcloud init`"
        raise CommandError(
            f"{error.filename} is not installed{advice if error.filename == 'gcloud' else ''}"
        ) from None
    return Outcome(
        done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    )


def checked_output(outcome: Outcome) -> str:
    """Returns what a command printed.

    Raises:
      NotFoundInCloudError: the job or the file does not exist.
      NameTakenError: the job to create exists; transient, since a deleted job can keep its name for
        a while.
      GcloudError: any other failure.
    """
    if outcome.status == 0:
        return outcome.stdout
    message = " ".join(outcome.stderr.split())
    reason = _extract_reason(message)
    if re.search(_NOT_FOUND, message):
        raise NotFoundInCloudError(f"gcloud: {reason}")
    if "ALREADY_EXISTS" in message:
        raise NameTakenError(
            f"gcloud: {reason}: pass another --name, or delete the resource with this name",
            transient=True,
        )
    advice = next((text for pattern, text in _ADVICE.items() if re.search(pattern, message)), "")
    raise GcloudError(
        f"gcloud: {reason or f'exit status {outcome.status}'}{advice and ': '}{advice}",
        transient=bool(re.search(_TRANSIENT, message)),
    )


def _extract_reason(message: str) -> str:
    """Returns the reason within gcloud's error output."""
    # The service's answer is quoted as JSON.
    quoted = re.search(r'"message": "((?:[^"\\]|\\.)*)"', message)
    if quoted:
        return quoted[1].replace('\\"', '"')
    # The reason follows the command's name in parentheses and precedes multi-line advice.
    reason = re.sub(r"^.*?ERROR: (\(\S+\) )?", "", message)
    return re.split(r"\.? Please run:|\. The attribute can be set", reason)[0][:300]
