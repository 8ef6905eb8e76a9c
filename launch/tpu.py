"""Trains on a Cloud TPU: submit, watch, status, logs or delete a job.

A job is identified by its --workdir. It costs money until it is deleted.

Example:
  bn-keras tpu submit --help
"""

import dataclasses
import datetime
import inspect
import math
import sys
from collections.abc import Callable

from absl import flags

from . import cli
from .cloud import control
from .cloud.control import Cloud
from .cloud.gcloud import GcloudError
from .cloud.job import (
    Job,
    check_data,
    check_initial_weights,
    container_arguments,
    delete_command,
    find_source,
    num_tpu_replicas,
    parse_valid_until,
)
from .command_error import CommandError, did_you_mean
from .help import format_help
from .training_command import check_batch_sizes

_WORKDIR = cli.define_workdir(
    "Folder of the run, gs://BUCKET/FOLDER; the job's files are beside it.", required=False
)
_NAME = flags.DEFINE_string("name", "", "Name of the job.")
_ZONE = flags.DEFINE_string("zone", "", "Zone of the TPU, such as us-central1-a.")
_TYPE = flags.DEFINE_string("accelerator_type", "", "Single-host TPU type, such as v5litepod-8.")
_CONFIG = cli.define_config(required=False)
_IMAGE = flags.DEFINE_string(
    "image", "", "Container image; without it, the VM builds one from this checkout."
)
_PROJECT = flags.DEFINE_string("project", "", "Google Cloud project; without it, gcloud's default.")
_SERVICE_ACCOUNT = flags.DEFINE_string(
    "service_account", "", "Account of the VM; without it, the project's default."
)
_SPOT = flags.DEFINE_bool("spot", False, "Use a spot VM: cheaper, and preemptible.")
_VALID_UNTIL = flags.DEFINE_string(
    "valid_until", "", "How long the job may stay queued: 6h, or until 2026-01-31T08:00Z."
)
_MAX_HOURS = flags.DEFINE_float(
    "max_hours",
    None,
    "Like --valid_until, in hours; watch deletes the job then, or when its training ends.",
    lower_bound=0.01,
    upper_bound=8760,
)
_PRICE = flags.DEFINE_float("price_per_hour", None, "Price, to print the maximum cost.", 0.0)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the commands that would run.")
_MAX_RETRIES = flags.DEFINE_integer(
    "max_retries", 10, "How many times a preempted job is created again.", 0
)
_POLL_SECONDS = flags.DEFINE_float("poll_seconds", 60.0, "Time between two polls.", 1.0)
_YES = flags.DEFINE_bool("yes", False, "Do not ask for confirmation.")

for _name in ("max_hours", "price_per_hour", "poll_seconds"):
    flags.register_validator(
        _name, lambda value: value is None or math.isfinite(value), "a finite number"
    )


def main(arguments: list[str]) -> None:
    """Runs a subcommand."""
    subcommand = _parse_subcommand(arguments)
    cloud = Cloud()
    try:
        if subcommand == "submit":
            _submit(cloud)
        else:
            _SUBCOMMANDS[subcommand].run(control.load_job(_WORKDIR.value, cloud), cloud)
    except KeyboardInterrupt:
        status = " ".join(cli.command_line("tpu"))
        raise CommandError(f"interrupted: see `{status} status` for the job's state", 130) from None


def _submit(cloud: Cloud) -> None:
    r"""Queues a job, which trains when a TPU is available and resumes after every reboot.

    Set up the account and the bucket first: see docs/launching.md.

    Example:
      bn-keras tpu submit --name=bn-x30 --zone=us-central1-a --spot \
        --accelerator_type=v5litepod-8 --workdir=gs://my-bucket/runs/bn_x30 \
        --config=bn_x30 --config.data.data_dir=gs://my-bucket/data \
        --config.train.global_batch_size=256 --config.train.epochs=150 \
        --config.train.steps_per_loop=100 \
        --max_hours=12 --price_per_hour=9.60 --dry_run
    """
    job = _make_job(cloud.now())
    cloud.echo(f"{job}\n{_describe_cost()}")
    if _DRY_RUN.value:
        cloud.echo("\n".join(f"\n$ {command}" for command in control.submit_commands(job)))
        cloud.echo("\nDry run: nothing was executed.")
        return
    control.submit(job, cloud)
    cloud.echo("Submitted. Next:")
    for subcommand in ("watch", "status", "logs", "delete"):
        cloud.echo(f"  {control.format_command(subcommand, job)}")


def _make_job(now: datetime.datetime) -> Job:
    if _VALID_UNTIL.value and _MAX_HOURS.value:
        raise CommandError("--max_hours and --valid_until are mutually exclusive")
    if not _IMAGE.value:
        find_source()
    delete_at = None
    if _MAX_HOURS.value:
        delete_at = (now + datetime.timedelta(hours=_MAX_HOURS.value)).replace(microsecond=0)
    job = Job(
        name=_NAME.value,
        zone=_ZONE.value,
        accelerator_type=_TYPE.value,
        workdir=_WORKDIR.value,
        arguments=container_arguments(_CONFIG.source, _CONFIG.overrides, _WORKDIR.value),
        image=_IMAGE.value,
        project=_PROJECT.value,
        service_account=_SERVICE_ACCOUNT.value,
        spot=_SPOT.value,
        valid_until=parse_valid_until(_VALID_UNTIL.value, now) if _VALID_UNTIL.value else delete_at,
        delete_at=delete_at,
    )
    _check_training(job.accelerator_type)
    return job


def _check_training(accelerator_type: str) -> None:
    config = _CONFIG.value
    check_data(config.data.name, config.data.data_dir)
    check_initial_weights(config.model.init_from)
    check_batch_sizes(config, num_tpu_replicas(accelerator_type), f"a {accelerator_type}")


def _describe_cost() -> str:
    hours, price = _MAX_HOURS.value, _PRICE.value
    rate = f" at {price:.2f} per hour" if price else ""
    if not hours:
        return f"  cost: no limit, accrues{rate} until the job is deleted; --max_hours sets a limit"
    total = f"{rate}, at most {hours * price:.2f}" if price else ""
    return (
        f"  cost: up to {hours:g} hours{total}, provided that `watch` runs: it deletes the job when"
        " the training ends or the time is up"
    )


def _print_status(job: Job, cloud: Cloud) -> None:
    """Prints the state of a job and the last metrics of its run.

    Example:
      bn-keras tpu status --workdir=gs://my-bucket/runs/bn_x30
    """
    cloud.echo(f"{job}\n  state: {control.read_status(job, cloud)}")
    cloud.echo(f"  last metrics: {control.read_last_metrics(job, cloud) or 'none yet'}")
    cloud.echo(f"To delete it: {control.format_command('delete', job)}")


def _print_logs(job: Job, cloud: Cloud) -> None:
    """Prints the output of a job, over all boots of its VMs; up to a minute late.

    Example:
      bn-keras tpu logs --workdir=gs://my-bucket/runs/bn_x30
    """
    cloud.echo(control.read_logs(job, cloud))


def _watch(job: Job, cloud: Cloud) -> None:
    """Follows a job until it ends, and creates it again when its VM is preempted.

    A job with --max_hours is then deleted. Any other job is kept, and costs money until you delete
    it with the command that is printed.

    Example:
      bn-keras tpu watch --workdir=gs://my-bucket/runs/bn_x30
    """
    cloud.echo(str(job))
    try:
        metrics = control.watch(job, cloud, _MAX_RETRIES.value, _POLL_SECONDS.value)
    except GcloudError:
        control.remind_of_cost(job, cloud)
        raise
    except KeyboardInterrupt:
        control.remind_of_cost(job, cloud)
        raise CommandError(
            "interrupted: the job is unchanged, and nothing enforces its --max_hours", 130
        ) from None
    cloud.echo(f"Job {job.name} is done. Run: {job.workdir}. Last metrics:\n{metrics}")


def _delete(job: Job, cloud: Cloud) -> None:
    """Deletes a job and its VM; keeps the run and the logs.

    Example:
      bn-keras tpu delete --workdir=gs://my-bucket/runs/bn_x30
    """
    if _DRY_RUN.value:
        cloud.echo(f"$ {delete_command(job)}")
    elif _YES.value or _confirms_deletion(job, cloud):
        control.delete(job, cloud)
    else:
        cloud.echo("Nothing was deleted.")


def _confirms_deletion(job: Job, cloud: Cloud) -> bool:
    if not sys.stdin.isatty():
        raise CommandError("delete asks for confirmation, which needs a terminal: pass --yes")
    state = control.read_status(job, cloud)
    answer = input(f"Delete job {job.name} in {job.zone} ({state})? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


@dataclasses.dataclass(frozen=True)
class _Subcommand:
    """A function, whose docstring is the help text, and the names of its flags."""

    run: Callable[..., None]
    required: tuple[str, ...] = ("workdir",)
    optional: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.run) or ""


_SUBCOMMANDS = {
    "submit": _Subcommand(
        _submit,
        required=("workdir", "name", "zone", "accelerator_type", "config"),
        optional=(
            *("image", "project", "service_account", "spot", "valid_until", "max_hours"),
            *("price_per_hour", "dry_run"),
        ),
    ),
    "watch": _Subcommand(_watch, optional=("max_retries", "poll_seconds")),
    "status": _Subcommand(_print_status),
    "logs": _Subcommand(_print_logs),
    "delete": _Subcommand(_delete, optional=("yes", "dry_run")),
}


def _parse_subcommand(arguments: list[str]) -> str:
    """Checks the flags of the subcommand and returns its name."""
    name, *rest = arguments
    if name not in _SUBCOMMANDS:
        raise CommandError(
            f"unknown subcommand {name!r}{did_you_mean(name, _SUBCOMMANDS)}: expected one of"
            f" {', '.join(_SUBCOMMANDS)}"
        )
    if rest:
        raise CommandError(f"unexpected argument {rest[0]!r}: flags are written as --flag=value")
    for flag in (flag for subcommand in _SUBCOMMANDS.values() for flag in subcommand.flags):
        if flags.FLAGS[flag].present and flag not in _SUBCOMMANDS[name].flags:
            users = [user for user, other in _SUBCOMMANDS.items() if flag in other.flags]
            raise CommandError(f"--{flag} belongs to {' and '.join(users)}, not to {name}")
    for flag in _SUBCOMMANDS[name].required:
        if not flags.FLAGS[flag].value:
            command = " ".join([*cli.command_line("tpu"), name])
            raise CommandError(f"--{flag} is missing: see `{command} --help`")
    return name


def _format_help(argv: list[str]) -> str:
    name = next((argument for argument in argv if argument in _SUBCOMMANDS), None)
    if not name:
        summaries = {name: sub.doc.partition("\n")[0] for name, sub in _SUBCOMMANDS.items()}
        return format_help(__doc__ or "", [flags.FLAGS["workdir"]], ["workdir"], summaries)
    subcommand = _SUBCOMMANDS[name]
    options = [flags.FLAGS[flag] for flag in subcommand.flags]
    return format_help(subcommand.doc, options, subcommand.required)


COMMAND = cli.Command(
    __name__,
    main,
    positional="a subcommand (submit, watch, status, logs or delete)",
    needs_tensorflow=False,
    make_help=_format_help,
)

if __name__ == "__main__":
    COMMAND.run()
