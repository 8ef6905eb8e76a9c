"""A training on a Cloud TPU: what it consists of, and the commands that make, show and end it.

Everything in here is a pure function of the job; `control` runs what comes out.
"""

import dataclasses
import datetime
import difflib
import json
import math
import pathlib
import re
import shlex
from collections.abc import Mapping

from ..command_error import CommandError

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What the Dockerfile copies, and itself.
SOURCE = (
    "Dockerfile",
    ".dockerignore",
    "setup.cfg",
    "pyproject.toml",
    "bn_keras",
    "configs",
    "launch",
)
DONE, FAILED = "DONE", "FAILED"

_STARTUP = pathlib.Path(__file__).with_name("startup.sh")
_QUEUE = ("gcloud", "compute", "tpus", "queued-resources")
_STORAGE = ("gcloud", "storage")

# The VM's image for each generation, and the types of it that are one host.
_GENERATIONS = {
    "v2": ("tpu-ubuntu2204-base", (8,)),
    "v3": ("tpu-ubuntu2204-base", (8,)),
    "v4": ("tpu-ubuntu2204-base", (8,)),
    "v5litepod": ("v2-alpha-tpuv5-lite", (1, 4, 8)),
    "v5p": ("v2-alpha-tpuv5", (8,)),
    "v6e": ("v2-alpha-tpuv6e", (1, 4, 8)),
}
_CONTINENTS = ("africa", "asia", "australia", "europe", "me", "northamerica", "southamerica", "us")
_DIRECTIONS = (
    *("central", "east", "north", "northeast", "northwest"),
    *("south", "southeast", "southwest", "west"),
)
_ZONE = re.compile(rf"({'|'.join(_CONTINENTS)})-({'|'.join(_DIRECTIONS)})[0-9]{{1,2}}-[a-z]")
# Zones with TPUs, to guess from what was meant; others of the form are left to gcloud to judge.
_TPU_ZONES = (
    *("us-central1-a", "us-central1-b", "us-central1-c", "us-central1-f", "us-central2-b"),
    *("us-east1-c", "us-east1-d", "us-east5-a", "us-east5-b", "us-east5-c", "us-south1-a"),
    *("us-west1-c", "us-west4-a", "us-west4-b", "southamerica-west1-a"),
    *("europe-west4-a", "europe-west4-b", "asia-east1-c", "asia-northeast1-b"),
    *("asia-southeast1-b",),
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A program with its arguments and what it reads.

    Args:
      argv: program and arguments.
      stdin: text, or the command whose output it is.
    """

    argv: tuple[str, ...]
    stdin: "str | Command" = ""

    def __str__(self) -> str:
        """The command as a shell takes it."""
        line = shlex.join(self.argv)
        if isinstance(self.stdin, Command):
            return f"{self.stdin} | {line}"
        if self.stdin:
            return f"{line} <<'END_OF_INPUT'\n{self.stdin.rstrip()}\nEND_OF_INPUT"
        return line


@dataclasses.dataclass(frozen=True)
class Job:
    """One training on one TPU host, checked.

    Args:
      name: of the queued resource and of its node.
      zone: as us-east5-b.
      accelerator_type: as v6e-8; of one host.
      workdir: of the run, a folder of a bucket.
      arguments: of launch.train.
      image: of the container; "" builds it on the VM from this checkout.
      project: "" is gcloud's own default.
      service_account: that the VM acts as; "" is the project's default.
      spot: cheap, and taken away when somebody pays more.
      valid_until: when the request lapses if it is still queued; None never.
      delete_at: when `watch` deletes the job, running or not; None never.

    Raises:
      CommandError: one of them can't be meant.
    """

    name: str
    zone: str
    accelerator_type: str
    workdir: str
    arguments: tuple[str, ...]
    image: str = ""
    project: str = ""
    service_account: str = ""
    spot: bool = False
    valid_until: datetime.datetime | None = None
    delete_at: datetime.datetime | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_zone(self.zone)
        _check_accelerator_type(self.accelerator_type)
        check_workdir(self.workdir)
        if re.search(r"\s", self.image):
            raise CommandError(f"image is {self.image!r}: name one as REGISTRY/PROJECT/NAME:TAG")

    def __str__(self) -> str:
        """What is to be done, in a few lines."""
        kind = f"{self.accelerator_type}{' spot' if self.spot else ''}"
        return (
            f"job {self.name}: one {kind} TPU in {self.zone}, with {self.runtime_version}\n"
            f"  image: {self.image or 'built on the VM from this checkout'}\n"
            f"  command: python -m launch.train {shlex.join(self.arguments)}\n"
            f"  run: {self.workdir}\n"
            f"  logs and the job's other files: {self.folder}"
        )

    @property
    def folder(self) -> str:
        """Where the job keeps its own files, beside the run's workdir."""
        return job_folder(self.workdir)

    @property
    def runtime_version(self) -> str:
        """Image of the VM."""
        return _GENERATIONS[self.accelerator_type.rpartition("-")[0]][0]

    def to_json(self) -> str:
        """Gives it as text that `from_json` reads."""
        values = dataclasses.asdict(self)
        return json.dumps(values, default=lambda time: time.isoformat(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Reads what `to_json` wrote.

        Raises:
          CommandError: it is something else.
        """
        try:
            values = json.loads(text)
            for key in ("valid_until", "delete_at"):
                values[key] = values[key] and datetime.datetime.fromisoformat(values[key])
            return cls(**values | {"arguments": tuple(values["arguments"])})
        except (ValueError, TypeError, KeyError, CommandError) as error:
            raise CommandError(
                f"the job's file is damaged, or another version of bn_keras wrote it: {error}"
            ) from None


def job_folder(workdir: str) -> str:
    """Gives the folder of the job that trains in a workdir."""
    return workdir.rstrip("/") + ".job"


def training_arguments(
    config_file: str, overrides: Mapping[str, object], workdir: str
) -> tuple[str, ...]:
    """Gives launch.train's arguments for the container, which holds the checkout's configs/.

    Args:
      config_file: of configs/.
      overrides: of its values, by their keys.
      workdir: of the run.

    Raises:
      CommandError: a file from elsewhere, or another distribution than the one for TPUs.
    """
    file = pathlib.Path(config_file).resolve()
    if not file.is_relative_to(ROOT / "configs"):
        raise CommandError(
            f"config {config_file} is not in {ROOT / 'configs'}, which is what the VM gets:"
            " put it there"
        )
    on_tpu = {"distribution.strategy": "tpu", "distribution.replicas": 0}
    overrides = on_tpu | dict(overrides)
    for key, value in on_tpu.items():
        if overrides[key] != value:
            raise CommandError(
                f"{key} is {overrides[key]!r}: on a TPU it is {value!r}; leave it out"
            )
    values = (f"--config.{key}={value}" for key, value in overrides.items())
    return (f"--config={file.relative_to(ROOT).as_posix()}", *values, f"--workdir={workdir}")


def check_data(name: str, data_dir: str) -> None:
    """Raises CommandError, before the TPU costs anything, if its VM can't have the data.

    Args:
      name: of the data set.
      data_dir: where it lies.
    """
    is_known = name in ("digits", "synthetic")
    # What is left for TFDS to download may be had.
    is_left = not data_dir and name not in ("folder", "imagenet2012")
    if not (is_known or is_left or data_dir.startswith("gs://")):
        raise CommandError(
            f"data.data_dir is {data_dir!r}, where the VM finds no {name}: copy it into a bucket,"
            " and give --config.data.data_dir=gs://BUCKET/FOLDER"
        )


def check_batch_size(key: str, size: int, parts: int, accelerator_type: str) -> None:
    """Raises CommandError, before the TPU costs anything, if its replicas do not divide a batch.

    Args:
      key: of the config.
      size: of the global batch.
      parts: that it is taken in, one after the other.
      accelerator_type: of a Job.
    """
    generation, _, cores = accelerator_type.rpartition("-")
    # Where a type counts cores, these generations join the two of a chip to one replica.
    replicas = int(cores) // (2 if generation in ("v4", "v5p") else 1)
    unit = replicas * parts
    if size % unit:
        in_parts = f" in {parts} parts" if parts > 1 else ""
        raise CommandError(
            f"{key} is {size}, which the {replicas} replicas of a {accelerator_type} do not"
            f" divide{in_parts}: give --config.{key}={math.ceil(size / unit) * unit}"
        )


def check_workdir(workdir: str) -> None:
    """Raises CommandError if a workdir is not a folder of a bucket."""
    if not workdir.startswith("gs://"):
        raise CommandError(
            f"workdir is {workdir!r}: a TPU VM can be taken away with its disk, so that it has to"
            " be a folder of a bucket, gs://BUCKET/FOLDER"
        )
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]{2,}(/+[^/\s*?\[\]#]+)+/*", workdir):
        raise CommandError(
            f"workdir is {workdir!r}: it has to be gs://BUCKET/FOLDER, where the bucket's name has"
            " 3 or more of a-z, 0-9, -, _ and ., and the folder no space and none of * ? [ ] #"
        )


def parse_valid_until(given: str, now: datetime.datetime) -> datetime.datetime:
    """Reads a duration such as 6h, 90m or 1d12h, or a time such as 2026-01-31T08:00Z.

    Args:
      given: what to read; a time without a zone is UTC.
      now: what a duration counts from.

    Raises:
      CommandError: it is neither, or past.
    """
    match = re.fullmatch(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", given)
    try:
        if match:
            days, hours, minutes = (int(part or 0) for part in match.groups())
            until = now + datetime.timedelta(days=days, hours=hours, minutes=minutes)
        else:
            until = datetime.datetime.fromisoformat(given)
            until = until if until.tzinfo else until.replace(tzinfo=datetime.UTC)
    except (ValueError, OverflowError):
        raise CommandError(
            f"valid_until is {given!r}: give a duration such as 6h, 90m or 1d12h, or a time such as"
            " 2026-01-31T08:00Z"
        ) from None
    if until <= now:
        raise CommandError(f"valid_until is {given!r}: it has to lie ahead")
    return until.astimezone(datetime.UTC).replace(microsecond=0)


def startup_script(job: Job, folder: str = "/var/lib/bn_keras") -> str:
    """Gives the script that the VM runs at every boot.

    Args:
      job: to train.
      folder: of the VM, for the lock, the logs and the source.
    """
    values = {"job": job.folder, "image": job.image, "folder": folder}
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    lines.append(f"arguments=({shlex.join(job.arguments)})")
    return _STARTUP.read_text().replace("# @settings@", "\n".join(lines))


def create_command(job: Job) -> Command:
    """Puts the job into the queue. The startup script is read from standard input."""
    options = [
        f"--accelerator-type={job.accelerator_type}",
        f"--runtime-version={job.runtime_version}",
        f"--node-id={job.name}",
        "--metadata-from-file=startup-script=/dev/stdin",
    ]
    if job.spot:
        options.append("--spot")
    if job.service_account:
        options.append(f"--service-account={job.service_account}")
    if job.valid_until:
        options.append(f"--valid-until-time={job.valid_until:%Y-%m-%dT%H:%M:%SZ}")
    return Command(
        (*_QUEUE, "create", job.name, *_place(job), *options, "--quiet"), startup_script(job)
    )


def describe_command(job: Job) -> Command:
    """Shows the job's place in the queue, as JSON."""
    return Command((*_QUEUE, "describe", job.name, *_place(job), "--format=json", "--quiet"))


def describe_node_command(job: Job) -> Command:
    """Shows the job's VM, as JSON: it can be preempted while the queue still has it as active."""
    node = ("gcloud", "compute", "tpus", "tpu-vm", "describe", job.name)
    return Command((*node, *_place(job), "--format=json", "--quiet"))


def delete_command(job: Job) -> Command:
    """Ends the job, deletes its VM, and waits until both are gone."""
    return Command((*_QUEUE, "delete", job.name, *_place(job), "--force", "--quiet"))


def upload_commands(job: Job) -> list[Command]:
    """Writes what the VM and `watch` read into the job's folder."""
    commands = []
    if not job.image:
        tar = ("tar", "-czf", "-", "--exclude=__pycache__", "-C", str(ROOT), *SOURCE)
        commands.append(write_command(f"{job.folder}/source.tar.gz", Command(tar)))
    commands.append(write_command(f"{job.folder}/job.json", job.to_json()))
    return commands


def write_command(url: str, content: str | Command) -> Command:
    """Writes a file of a bucket."""
    return Command((*_STORAGE, "cp", "-", url, "--quiet"), content)


def read_command(url: str, last_bytes: int = 0) -> Command:
    """Prints files of a bucket, or the end of one."""
    end = (f"--range=-{last_bytes}",) if last_bytes else ()
    return Command((*_STORAGE, "cat", url, *end, "--quiet"))


def list_command(folder: str) -> Command:
    """Lists a folder of a bucket."""
    return Command((*_STORAGE, "ls", f"{folder}/", "--quiet"))


def remove_command(url: str) -> Command:
    """Deletes a file of a bucket."""
    return Command((*_STORAGE, "rm", url, "--quiet"))


def _place(job: Job) -> tuple[str, ...]:
    return (f"--zone={job.zone}", *((f"--project={job.project}",) if job.project else ()))


def _check_name(name: str) -> None:
    if re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
        return
    legal = re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789")[:63].strip("-")
    raise CommandError(
        f"name is {name!r}: it has to be up to 63 of a-z, 0-9 and -, begin with a letter and"
        f" not end with -{f', as {legal!r}' if legal else ''}"
    )


def _check_zone(zone: str) -> None:
    if _ZONE.fullmatch(zone):
        return
    raise CommandError(
        f"zone is {zone!r}, which is no zone's name{_did_you_mean(zone, _TPU_ZONES)};"
        " `gcloud compute tpus locations list` shows those with TPUs"
    )


def _check_accelerator_type(given: str) -> None:
    types = [f"{name}-{n}" for name, (_, sizes) in _GENERATIONS.items() for n in sizes]
    if given in types:
        return
    generation, _, size = given.rpartition("-")
    generation = {"v5e": "v5litepod", "v5lite": "v5litepod"}.get(generation, generation)
    if generation in _GENERATIONS and size.isdecimal():
        sizes = _GENERATIONS[generation][1]
        if int(size) > max(sizes):
            raise CommandError(
                f"accelerator_type {given} has several hosts, and a job is one process on one host,"
                f" which sees no other host's chips: {generation}-{max(sizes)} is the largest"
            )
        names = ", ".join(f"{generation}-{n}" for n in sizes)
        raise CommandError(f"accelerator_type {given!r} does not exist: accepted are {names}")
    raise CommandError(
        f"unknown accelerator_type {given!r}{_did_you_mean(given, types)}:"
        f" accepted are {', '.join(types)}"
    )


def _did_you_mean(given: str, known: tuple[str, ...] | list[str]) -> str:
    nearest = difflib.get_close_matches(given.lower(), known, n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
