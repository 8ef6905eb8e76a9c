"""Trains on a Cloud TPU: submit, watch, status, logs or delete a job.

A job is known by its --workdir. It costs money until it is deleted.

Example:
  python -m launch.tpu submit --help
"""

import datetime
import difflib
import itertools
import math
import sys

from absl import flags

from . import cli
from .cloud import control
from .cloud.control import Cloud
from .cloud.job import (
    Job,
    check_batch_size,
    check_data,
    delete_command,
    parse_valid_until,
    training_arguments,
)
from .help import format_help

_WORKDIR = cli.define_workdir(
    "Folder of the run, gs://BUCKET/FOLDER; the job's own lies beside it.", required=False
)
_NAME = flags.DEFINE_string("name", "", "Name of the job.")
_ZONE = flags.DEFINE_string("zone", "", "Zone of the TPU, as us-east5-b.")
_TYPE = flags.DEFINE_string("accelerator_type", "", "Type of one host, as v6e-8.")
_CONFIG = cli.define_config(required=False)
_IMAGE = flags.DEFINE_string(
    "image", "", "Image of the container; else the VM builds it from this checkout."
)
_PROJECT = flags.DEFINE_string("project", "", "Project; else gcloud's own default.")
_SERVICE_ACCOUNT = flags.DEFINE_string(
    "service_account", "", "Account of the VM; else the project's default one."
)
_SPOT = flags.DEFINE_bool("spot", False, "Take a spot VM, cheaper and preemptible.")
_VALID_UNTIL = flags.DEFINE_string(
    "valid_until", "", "Drop the job if it still waits then: 6h, or 2026-01-31T08:00Z."
)
_MAX_HOURS = flags.DEFINE_float(
    "max_hours",
    None,
    "The same in hours, and then watch deletes it even if it runs.",
    lower_bound=0.01,
    upper_bound=8760,
)
_PRICE = flags.DEFINE_float("price_per_hour", None, "Says what the job can cost.", 0.0)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print what would run.")
_MAX_RETRIES = flags.DEFINE_integer("max_retries", 10, "Submit the job again so often.", 0)
_POLL_SECONDS = flags.DEFINE_float("poll_seconds", 60.0, "Time between two looks.", 1.0)
_YES = flags.DEFINE_bool("yes", False, "Don't ask.")

for _name in ("max_hours", "price_per_hour", "poll_seconds"):
    flags.register_validator(
        _name, lambda value: value is None or math.isfinite(value), "it has to be a number"
    )


def main(arguments: list[str]) -> None:
    """Does what the subcommand and the flags say."""
    subcommand = _subcommand(arguments)
    cloud = Cloud()
    try:
        if subcommand == "submit":
            _submit(cloud)
        else:
            _ACTIONS[subcommand](control.load(_WORKDIR.value, cloud), cloud)
    except KeyboardInterrupt:
        cli.fail("interrupted; `python -m launch.tpu status` tells what became of the job", 130)


def _submit(cloud: Cloud) -> None:
    r"""Puts a job into the queue, which trains once there is a TPU, and again after every reboot.

    Before it can, the account and the bucket of docs/launching.md have to be there.

    Example:
      python -m launch.tpu submit --name=bn-x30 --zone=us-east5-b --spot \
        --accelerator_type=v6e-8 --workdir=gs://my-bucket/runs/bn_x30 \
        --config=configs/bn_x30.py --config.data.data_dir=gs://my-bucket/data \
        --max_hours=12 --price_per_hour=2.50 --dry_run
    """
    job = _job(cloud.now())
    cloud.say(f"{job}\n{_cost()}")
    if _DRY_RUN.value:
        cloud.say("\n".join(f"\n$ {command}" for command in control.submission(job)))
        cloud.say("\nNothing of this was run.")
        return
    control.submit(job, cloud)
    cloud.say("Submitted. Now:")
    for subcommand in ("watch", "status", "logs", "delete"):
        cloud.say(f"  {control.command_line(subcommand, job)}")


def _job(now: datetime.datetime) -> Job:
    if _VALID_UNTIL.value and _MAX_HOURS.value:
        cli.fail("--max_hours sets --valid_until, too: give one of them", 2)
    delete_at = None
    if _MAX_HOURS.value:
        delete_at = (now + datetime.timedelta(hours=_MAX_HOURS.value)).replace(microsecond=0)
    job = Job(
        name=_NAME.value,
        zone=_ZONE.value,
        accelerator_type=_TYPE.value,
        workdir=_WORKDIR.value,
        arguments=training_arguments(_CONFIG.given, _CONFIG.overrides, _WORKDIR.value),
        image=_IMAGE.value,
        project=_PROJECT.value,
        service_account=_SERVICE_ACCOUNT.value,
        spot=_SPOT.value,
        valid_until=parse_valid_until(_VALID_UNTIL.value, now) if _VALID_UNTIL.value else delete_at,
        delete_at=delete_at,
    )
    config = _CONFIG.value
    check_data(config.data.name, config.data.data_dir)
    for section, parts in (("train", config.train.micro_batches), ("evaluation", 1)):
        size = config[section].global_batch_size
        check_batch_size(f"{section}.global_batch_size", size, parts, job.accelerator_type)
    return job


def _cost() -> str:
    hours, price = _MAX_HOURS.value, _PRICE.value
    rate = f" at {price:.2f} an hour" if price else ""
    if not hours:
        return f"  for any number of hours{rate}, until it is deleted: --max_hours sets a limit"
    total = f"{rate}, {hours * price:.2f} in all" if price else ""
    return f"  for at most {hours:g} hours from now{total}, if watch runs: it deletes the job then"


def _status(job: Job, cloud: Cloud) -> None:
    """Looks where a job stands, and at the run's last metrics.

    Example:
      python -m launch.tpu status --workdir=gs://my-bucket/runs/bn_x30
    """
    cloud.say(f"{job}\n  state: {control.status_of(job, cloud)}")
    cloud.say(f"  last metrics: {control.last_metrics(job, cloud) or 'none yet'}")
    cloud.say(f"To delete it: {control.delete_line(job)}")


def _logs(job: Job, cloud: Cloud) -> None:
    """Prints what a job has printed, over all boots of its VMs; up to a minute late.

    Example:
      python -m launch.tpu logs --workdir=gs://my-bucket/runs/bn_x30
    """
    cloud.say(control.logs(job, cloud))


def _watch(job: Job, cloud: Cloud) -> None:
    """Follows a job to its end, and submits it again when its VM was taken away.

    The job stays afterwards: the last line is the command that deletes it.

    Example:
      python -m launch.tpu watch --workdir=gs://my-bucket/runs/bn_x30
    """
    cloud.say(str(job))
    try:
        metrics = control.watch(job, cloud, _MAX_RETRIES.value, _POLL_SECONDS.value)
        cloud.say(
            f"Job {job.name} is done. The run is in {job.workdir}; its last metrics:\n{metrics}"
        )
    except KeyboardInterrupt:
        cli.fail("interrupted: the job is left as it is, and nobody watches its hours", 130)
    finally:
        cloud.say(f"It costs until it is deleted: {control.delete_line(job)}")


def _delete(job: Job, cloud: Cloud) -> None:
    """Ends a job and deletes its VM; the run and the logs stay.

    Example:
      python -m launch.tpu delete --workdir=gs://my-bucket/runs/bn_x30
    """
    if _DRY_RUN.value:
        cloud.say(f"$ {delete_command(job)}")
        return
    if not _YES.value:
        if not sys.stdin.isatty():
            cli.fail("delete asks, and there is no terminal to ask on: give --yes", 2)
        answer = input(
            f"Delete job {job.name} in {job.zone} ({control.status_of(job, cloud)})? [y/N] "
        )
        if answer.strip().lower() not in ("y", "yes"):
            cloud.say("Nothing is deleted.")
            return
    control.delete(job, cloud)


_ACTIONS = {
    "submit": _submit,
    "watch": _watch,
    "status": _status,
    "logs": _logs,
    "delete": _delete,
}
_REQUIRED = dict.fromkeys(_ACTIONS, ("workdir",))
_REQUIRED["submit"] += ("name", "zone", "accelerator_type", "config")
_OPTIONAL = {
    "submit": (
        *("image", "project", "service_account", "spot", "valid_until", "max_hours"),
        *("price_per_hour", "dry_run"),
    ),
    "watch": ("max_retries", "poll_seconds"),
    "status": (),
    "logs": (),
    "delete": ("yes", "dry_run"),
}


def _subcommand(arguments: list[str]) -> str:
    accepted = ", ".join(_ACTIONS)
    subcommand, *rest = arguments
    if subcommand not in _ACTIONS:
        nearest = difflib.get_close_matches(subcommand, _ACTIONS, n=1)
        guess = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        cli.fail(f"unknown subcommand {subcommand!r}{guess}: accepted are {accepted}", 2)
    if rest:
        cli.fail(f"unexpected argument {rest[0]!r}: values are given as --flag=value", 2)
    takes = {name: (*_REQUIRED[name], *_OPTIONAL[name]) for name in _ACTIONS}
    for name in itertools.chain(*takes.values()):
        if flags.FLAGS[name].present and name not in takes[subcommand]:
            users = " and ".join(user for user, names in takes.items() if name in names)
            cli.fail(f"--{name} is of {users}, not of {subcommand}", 2)
    for name in _REQUIRED[subcommand]:
        if not flags.FLAGS[name].value:
            cli.fail(f"--{name} is missing: see `python -m launch.tpu {subcommand} --help`", 2)
    return subcommand


def _help(argv: list[str]) -> str:
    subcommand = next((argument for argument in argv if argument in _ACTIONS), None)
    if not subcommand:
        summaries = {name: act.__doc__.partition("\n")[0] for name, act in _ACTIONS.items()}
        return format_help(__doc__, [flags.FLAGS["workdir"]], ["workdir"], summaries)
    required = _REQUIRED[subcommand]
    options = [flags.FLAGS[name] for name in (*required, *_OPTIONAL[subcommand])]
    return format_help(_ACTIONS[subcommand].__doc__, options, required)


COMMAND = cli.Command(
    __name__,
    main,
    positional="a subcommand (submit, watch, status, logs or delete)",
    needs_tensorflow=False,
    make_help=_help,
)

if __name__ == "__main__":
    COMMAND.run()
