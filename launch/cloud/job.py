"""A training job on a Cloud TPU, and the commands that create, inspect and delete it.

Nothing here runs a command; `control` does.
"""

import dataclasses
import datetime
import json
import pathlib
import re
import shlex
from collections.abc import Mapping

from .. import training_command
from ..command_error import CommandError, did_you_mean

_LAUNCH = pathlib.Path(__file__).resolve().parents[1]
# configs/ in a checkout, bn_keras_configs/ where bn_keras is installed.
CONFIGS = _LAUNCH.parent / _LAUNCH.name.replace("launch", "configs")
# The Dockerfile and what it copies.
SOURCE = (
    "Dockerfile",
    ".dockerignore",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "bn_keras",
    "configs",
    "launch",
)
DONE, FAILED = "DONE", "FAILED"

_STARTUP = pathlib.Path(__file__).with_name("startup.sh")
_QUEUE = ("gcloud", "compute", "tpus", "queued-resources")
_STORAGE = ("gcloud", "storage")

# VM image and sizes of the single-host types, by generation.
_GENERATIONS = {
    "v2": ("tpu-ubuntu2204-base", (8,)),
    "v3": ("tpu-ubuntu2204-base", (8,)),
    "v4": ("tpu-ubuntu2204-base", (8,)),
    "v5litepod": ("v2-alpha-tpuv5-lite", (1, 4, 8)),
    "v5p": ("v2-alpha-tpuv5", (8,)),
    "v6e": ("v2-alpha-tpuv6e", (1, 4, 8)),
}
_TYPES = [f"{name}-{n}" for name, (_, sizes) in _GENERATIONS.items() for n in sizes]
_CONTINENTS = ("africa", "asia", "australia", "europe", "me", "northamerica", "southamerica", "us")
_DIRECTIONS = (
    *("central", "east", "north", "northeast", "northwest"),
    *("south", "southeast", "southwest", "west"),
)
_ZONE = re.compile(rf"({'|'.join(_CONTINENTS)})-({'|'.join(_DIRECTIONS)})[0-9]{{1,2}}-[a-z]")
# Zones with TPUs, for suggestions only: gcloud checks whether a well-formed zone exists.
_TPU_ZONES = (
    *("us-central1-a", "us-central1-b", "us-central1-c", "us-central1-f", "us-central2-b"),
    *("us-east1-c", "us-east1-d", "us-east5-a", "us-east5-b", "us-east5-c", "us-south1-a"),
    *("us-west1-c", "us-west4-a", "us-west4-b", "southamerica-west1-a"),
    *("europe-west4-a", "europe-west4-b", "asia-east1-c", "asia-northeast1-b"),
    *("asia-southeast1-b",),
)


@dataclasses.dataclass(frozen=True)
class ShellCommand:
    """A program with its arguments and its standard input.

    Args:
      argv: program and arguments.
      stdin: text, or a command whose output is piped in.
    """

    argv: tuple[str, ...]
    stdin: "str | ShellCommand" = ""

    def __str__(self) -> str:
        """Returns the command as shell code."""
        line = shlex.join(self.argv)
        if isinstance(self.stdin, ShellCommand):
            return f"{self.stdin} | {line}"
        if self.stdin:
            return f"{line} <<'END_OF_INPUT'\n{self.stdin.rstrip()}\nEND_OF_INPUT"
        return line


@dataclasses.dataclass(frozen=True)
class Job:
    """One training on one TPU host, validated.

    Args:
      name: name of the queued resource and of its node.
      zone: zone of the TPU, such as us-east5-b.
      accelerator_type: a single-host type such as v6e-8.
      workdir: folder of the run, in a bucket.
      arguments: arguments of `bn-keras train`.
      image: container image; "" builds one on the VM from this checkout.
      project: Google Cloud project; "" is gcloud's default.
      service_account: account of the VM; "" is the project's default.
      spot: use a spot VM: cheaper, and preemptible.
      valid_until: time at which a request that is still queued expires; None: never.
      delete_at: time limit: `watch` deletes the job then, or when its training ends; None: `watch`
        keeps the job.

    Raises:
      CommandError: an invalid value.
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
        check_bucket_folder(self.workdir)
        if re.search(r"\s", self.image):
            raise CommandError(
                f"image={self.image!r} is invalid: expected a name such as"
                " REGISTRY/PROJECT/NAME:TAG"
            )

    def __str__(self) -> str:
        """Returns a summary on several lines."""
        kind = f"{self.accelerator_type}{' spot' if self.spot else ''}"
        return (
            f"job {self.name}: one {kind} TPU in {self.zone}, VM image {self.runtime_version}\n"
            f"  container: {self.image or 'built on the VM from this checkout'}\n"
            f"  command: bn-keras train {shlex.join(self.arguments)}\n"
            f"  run: {self.workdir}\n"
            f"  logs and job files: {self.folder}"
        )

    @property
    def folder(self) -> str:
        """The folder of the job's own files, beside the workdir."""
        return job_folder(self.workdir)

    @property
    def runtime_version(self) -> str:
        """The VM image."""
        return _GENERATIONS[self.accelerator_type.rpartition("-")[0]][0]

    def to_json(self) -> str:
        """Returns the job as JSON, for `from_json`."""
        values = dataclasses.asdict(self)
        return json.dumps(values, default=lambda time: time.isoformat(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Reads the text of `to_json`.

        Raises:
          CommandError: the text is damaged.
        """
        try:
            values = json.loads(text)
            for key in ("valid_until", "delete_at"):
                values[key] = values[key] and datetime.datetime.fromisoformat(values[key])
            return cls(**values | {"arguments": tuple(values["arguments"])})
        except (ValueError, TypeError, KeyError, CommandError) as error:
            raise CommandError(
                f"the job's file is damaged, or written by another version of bn_keras: {error}"
            ) from None


def job_folder(workdir: str) -> str:
    """Returns the folder of the job that trains in a workdir."""
    return workdir.rstrip("/") + ".job"


def container_arguments(
    config: str, overrides: Mapping[str, object], workdir: str
) -> tuple[str, ...]:
    """Returns the arguments of `bn-keras train` in the container.

    Args:
      config: name or file of a config in configs/, the only ones that the container has.
      overrides: settings that differ from the config, by key.
      workdir: folder of the run.

    Raises:
      CommandError: a config from elsewhere, or a distribution that is not for TPUs.
    """
    on_tpu = {"distribution.strategy": "tpu", "distribution.replicas": 0}
    name = _config_name(config)
    return training_command.training_arguments(name, overrides, workdir, on_tpu, "on a TPU")


def _config_name(config: str) -> str:
    """Returns the name, such as bn_x5, of a config that is given by name or as a file."""
    name, colon, argument = config.partition(":")
    path = pathlib.Path(name)
    file = CONFIGS / f"{path.stem}.py"
    if path.suffix == ".py" and path.is_file():
        is_in_configs = path.resolve() == file
    else:
        is_in_configs = str(path.parent) in (".", CONFIGS.name) and file.is_file()
    if not is_in_configs:
        raise CommandError(
            f"config {config} is not in {CONFIGS}, the only configs that the VM has: copy it there"
        )
    return f"{file.stem}{colon}{argument}"


def check_data(name: str, data_dir: str) -> None:
    """Raises CommandError, before the TPU costs anything, if its VM cannot read the data.

    Args:
      name: name of the data set.
      data_dir: folder of the data.
    """
    from bn_keras.data.built_in import BUILT_IN

    # TFDS can download most other sets on the VM.
    may_be_downloaded = not data_dir and name not in ("folder", "imagenet2012")
    if not (name in BUILT_IN or may_be_downloaded or data_dir.startswith("gs://")):
        raise CommandError(
            f"data.data_dir={data_dir!r} is invalid: the VM finds no {name} there; copy the data to"
            " a bucket and pass --config.data.data_dir=gs://BUCKET/FOLDER"
        )


def check_initial_weights(init_from: str) -> None:
    """Raises CommandError, before the TPU costs anything, if its VM cannot read the weights.

    Args:
      init_from: run or file with the initial weights; "" draws them from the seed.
    """
    if init_from and not init_from.startswith("gs://"):
        raise CommandError(
            f"model.init_from={init_from!r} is invalid: the VM finds no weights there; copy the"
            " weights to a bucket and pass --config.model.init_from=gs://BUCKET/PATH"
        )


def num_tpu_replicas(accelerator_type: str) -> int:
    """Returns the number of replicas of a type of a Job."""
    generation, _, cores = accelerator_type.rpartition("-")
    # These types count cores, of which two form one replica.
    return int(cores) // (2 if generation in ("v4", "v5p") else 1)


def check_bucket_folder(workdir: str) -> None:
    """Raises CommandError if a workdir is not a folder in a bucket."""
    if not workdir.startswith("gs://"):
        raise CommandError(
            f"workdir={workdir!r} is invalid: expected a folder in a bucket, gs://BUCKET/FOLDER,"
            " because a preempted VM loses its disk"
        )
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]{2,}(/[^/\s*?\[\]#]+)+/*", workdir):
        raise CommandError(
            f"workdir={workdir!r} is invalid: expected gs://BUCKET/FOLDER with a bucket name of at"
            " least 3 characters (a-z, 0-9, -, _ or .) and a folder without spaces, empty names or"
            " any of * ? [ ] #"
        )


def parse_valid_until(text: str, now: datetime.datetime) -> datetime.datetime:
    """Parses a duration such as 6h, 90m or 1d12h, or a time such as 2026-01-31T08:00Z.

    Args:
      text: a duration from now, or a time; without a time zone, it is in UTC.
      now: the current time.

    Raises:
      CommandError: the text is neither, or the time is past.
    """
    match = re.fullmatch(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", text)
    try:
        if match:
            days, hours, minutes = (int(part or 0) for part in match.groups())
            until = now + datetime.timedelta(days=days, hours=hours, minutes=minutes)
        else:
            until = datetime.datetime.fromisoformat(text)
            until = until if until.tzinfo else until.replace(tzinfo=datetime.UTC)
    except (ValueError, OverflowError):
        raise CommandError(
            f"valid_until={text!r} is invalid: expected a duration such as 6h, 90m or 1d12h, or a"
            " time such as 2026-01-31T08:00Z"
        ) from None
    if until <= now:
        raise CommandError(f"valid_until={text!r} is invalid: expected a time in the future")
    return until.astimezone(datetime.UTC).replace(microsecond=0)


def startup_script(job: Job, folder: str = "/var/lib/bn_keras") -> str:
    """Returns the script that the VM runs at every boot.

    Args:
      job: job to train.
      folder: folder on the VM for the lock, the logs and the source.
    """
    values = {"job": job.folder, "image": job.image, "folder": folder}
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    lines.append(f"arguments=({shlex.join(job.arguments)})")
    return _STARTUP.read_text().replace("# @settings@", "\n".join(lines))


def create_command(job: Job) -> ShellCommand:
    """Returns the command that queues the job; it reads the startup script from its input."""
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
    return ShellCommand(
        (*_QUEUE, "create", job.name, *_location(job), *options, "--quiet"), startup_script(job)
    )


def describe_command(job: Job) -> ShellCommand:
    """Returns the command that prints the queued resource as JSON."""
    return ShellCommand(
        (*_QUEUE, "describe", job.name, *_location(job), "--format=json", "--quiet")
    )


def describe_node_command(job: Job) -> ShellCommand:
    """Returns the command that prints the VM as JSON.

    A VM can be preempted while its queued resource is still ACTIVE.
    """
    node = ("gcloud", "compute", "tpus", "tpu-vm", "describe", job.name)
    return ShellCommand((*node, *_location(job), "--format=json", "--quiet"))


def delete_command(job: Job) -> ShellCommand:
    """Returns the command that deletes the job with its VM, and waits until both are deleted."""
    return ShellCommand((*_QUEUE, "delete", job.name, *_location(job), "--force", "--quiet"))


def upload_commands(job: Job) -> list[ShellCommand]:
    """Returns the commands that upload job.json and, without an image, the source code."""
    commands = []
    if not job.image:
        tar = ("tar", "-czf", "-", "--exclude=__pycache__", "-C", str(find_source()), *SOURCE)
        commands.append(write_command(f"{job.folder}/source.tar.gz", ShellCommand(tar)))
    commands.append(write_command(f"{job.folder}/job.json", job.to_json()))
    return commands


def find_source() -> pathlib.Path:
    """Returns the checkout whose SOURCE a job without an image runs.

    It contains this file, or it is the current folder.

    Raises:
      CommandError: neither has all of SOURCE.
    """
    for folder in (_LAUNCH.parent, pathlib.Path.cwd()):
        if all((folder / name).exists() for name in SOURCE):
            return folder
    raise CommandError(
        "--image is missing: without one, the VM builds it from a checkout of bn_keras; run the"
        " command in that folder"
    )


def write_command(url: str, content: str | ShellCommand) -> ShellCommand:
    """Returns the command that writes a file to a bucket."""
    return ShellCommand((*_STORAGE, "cp", "-", url, "--quiet"), content)


def read_command(url: str, last_bytes: int = 0) -> ShellCommand:
    """Returns the command that prints files in a bucket, or the last bytes of one."""
    end = (f"--range=-{last_bytes}",) if last_bytes else ()
    return ShellCommand((*_STORAGE, "cat", url, *end, "--quiet"))


def list_command(folder: str) -> ShellCommand:
    """Returns the command that lists a folder in a bucket."""
    return ShellCommand((*_STORAGE, "ls", f"{folder}/", "--quiet"))


def remove_command(url: str) -> ShellCommand:
    """Returns the command that deletes a file in a bucket."""
    return ShellCommand((*_STORAGE, "rm", url, "--quiet"))


def grant_command(job: Job, account: str) -> ShellCommand:
    """Returns the command that lets a service account read and write the job's bucket."""
    bucket = "/".join(job.workdir.split("/")[:3])
    role = (f"--member=serviceAccount:{account}", "--role=roles/storage.objectAdmin")
    return ShellCommand((*_STORAGE, "buckets", "add-iam-policy-binding", bucket, *role))


def _location(job: Job) -> tuple[str, ...]:
    return (f"--zone={job.zone}", *((f"--project={job.project}",) if job.project else ()))


def _check_name(name: str) -> None:
    if re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
        return
    legal = re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789")[:63].strip("-")
    raise CommandError(
        f"name={name!r} is invalid: expected up to 63 characters (a-z, 0-9 or -), the first a"
        f" letter and the last not -{f', such as {legal!r}' if legal else ''}"
    )


def _check_zone(zone: str) -> None:
    if _ZONE.fullmatch(zone):
        return
    raise CommandError(
        f"unknown zone {zone!r}{did_you_mean(zone, _TPU_ZONES)}:"
        " `gcloud compute tpus locations list` lists the zones with TPUs"
    )


def _check_accelerator_type(accelerator_type: str) -> None:
    if accelerator_type in _TYPES:
        return
    generation, _, size = accelerator_type.rpartition("-")
    generation = {"v5e": "v5litepod", "v5lite": "v5litepod"}.get(generation, generation)
    if generation not in _GENERATIONS or not size.isdecimal():
        raise CommandError(
            f"unknown accelerator_type {accelerator_type!r}"
            f"{did_you_mean(accelerator_type, _TYPES)}: expected one of {', '.join(_TYPES)}"
        )
    sizes = _GENERATIONS[generation][1]
    if int(size) > max(sizes):
        raise CommandError(
            f"accelerator_type {accelerator_type} has several hosts, but a job is one process on"
            f" one host and cannot use another host's chips: the largest is"
            f" {generation}-{max(sizes)}"
        )
    names = ", ".join(f"{generation}-{n}" for n in sizes)
    raise CommandError(
        f"accelerator_type {accelerator_type!r} does not exist: expected one of {names}"
    )
