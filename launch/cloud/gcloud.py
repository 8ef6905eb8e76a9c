"""Runs gcloud, and says on one line what it refused and what to do about it."""

import dataclasses
import re
import subprocess
from collections.abc import Callable

from ..command_error import CommandError
from .job import Command


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command that was run came to."""

    status: int
    stdout: str = ""
    stderr: str = ""


Runner = Callable[[Command], Outcome]


class GcloudError(CommandError):
    """Gcloud refused.

    Attributes:
      transient: whether the same may work later.
    """

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class NotFoundInCloudError(GcloudError):
    """There is no such job, or no such file."""


class NameTakenError(GcloudError):
    """There is a job, or a VM, of that name already."""


# What gcloud and the service behind it say, and what helps. The first that fits is taken.
_LOGIN = "run `gcloud auth login`, or `gcloud auth activate-service-account`"
_HINTS = {
    r"active account|auth login|[Rr]eauth|invalid_grant|UNAUTHENTICATED": f"log in: {_LOGIN}",
    r"attribute \[project\]": "give --project, or run `gcloud config set project PROJECT`",
    r"SERVICE_DISABLED|has not been used in project": "run `gcloud services enable"
    " tpu.googleapis.com`",
    r"[Ll]ocation .*(not found|invalid)|locations/\S+'? \(or it may not exist\)": "check"
    " --zone with `gcloud compute tpus locations list`, and that the project may use it",
    r"[Aa]ccelerator.?[Tt]ype": "the zone may not have this type: `gcloud compute tpus"
    " accelerator-types list --zone=ZONE` shows what it has",
    r"[Qq]uota": "ask for more in the console under IAM & Admin, Quotas, or take another --zone,"
    " --accelerator_type or --spot",
    r"RESOURCE_EXHAUSTED|[Cc]apacity|stockout": "the zone has none free now: try later,"
    " another --zone, or --spot",
    r"PERMISSION_DENIED|does not have permission|HTTPError 403": "the account lacks the role: TPU"
    " Admin on the project, Storage Object Admin on the bucket",
    r"bucket does not exist|gs://\S+ not found: 404": "make the bucket first: `gcloud storage"
    " buckets create gs://BUCKET --location=REGION`",
}
_NOT_FOUND = r"NOT_FOUND.*(queuedResources|nodes)/|matched no objects"
_TRANSIENT = (
    r"RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED"
    r"|HTTPError (429|5\d\d)|[Cc]apacity|stockout|[Tt]imed? ?out|[Cc]onnection"
    r"|problem refreshing|unable to (find|connect)|[Nn]etwork is unreachable|name resolution"
)


def run_command(command: Command) -> Outcome:
    """Runs a command and waits for it.

    Raises:
      CommandError: its program is not installed.
    """
    stdin = command.stdin
    try:
        if isinstance(stdin, Command):
            made = subprocess.run(stdin.argv, capture_output=True)
            if made.returncode:
                return Outcome(made.returncode, stderr=made.stderr.decode(errors="replace"))
            given = made.stdout
        else:
            given = stdin.encode()
        done = subprocess.run(command.argv, input=given, capture_output=True)
    except FileNotFoundError as error:
        install = (
            ": install it from https://cloud.google.com/sdk/docs/install, then run `gcloud init`"
        )
        raise CommandError(
            f"{error.filename} is not installed{install if error.filename == 'gcloud' else ''}"
        ) from None
    return Outcome(
        done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    )


def checked(outcome: Outcome) -> str:
    """Gives what a command printed.

    Raises:
      NotFoundInCloudError: the command was about something that is not there.
      NameTakenError: it was to make something that is there; transient, since a job that was just
        deleted may keep its name for a while.
      GcloudError: it failed in any other way.
    """
    if outcome.status == 0:
        return outcome.stdout
    said = " ".join(outcome.stderr.split())
    reason = _reason(said)
    if re.search(_NOT_FOUND, said):
        raise NotFoundInCloudError(f"gcloud: {reason}")
    if "ALREADY_EXISTS" in said:
        raise NameTakenError(
            f"gcloud: {reason}: the name is taken: give another --name, or delete what has it",
            transient=True,
        )
    hint = next((hint for pattern, hint in _HINTS.items() if re.search(pattern, said)), "")
    raise GcloudError(
        f"gcloud: {reason or f'it ended with status {outcome.status}'}{hint and ': '}{hint}",
        transient=bool(re.search(_TRANSIENT, said)),
    )


def _reason(said: str) -> str:
    """Finds what matters in what gcloud printed on its way to the end."""
    # An answer of the service, quoted as it came.
    message = re.search(r'"message": "((?:[^"\\]|\\.)*)"', said)
    if message:
        return message[1].replace('\\"', '"')
    # After the name of the command in parentheses, and before advice that runs over many lines.
    reason = re.sub(r"^.*?ERROR: (\(\S+\) )?", "", said)
    return re.split(r"\.? Please run:|\. The attribute can be set", reason)[0][:300]
