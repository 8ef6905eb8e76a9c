r"""Prints the batch script that trains a config with Slurm, or submits it with --submit.

Each node runs one process with all of its GPUs. The job returns to the queue when its time limit is
near, after a preemption and after a lost process, and resumes (bit-exactly on CPUs). The workdir
and this Python environment must be on storage that all nodes share.

Examples:
  bn-keras slurm --nodes=2 --gpus_per_node=8 --time=24:00:00 \
    --config=bn_x30 --config.train.global_batch_size=512 \
    --config.train.epochs=150 --config.data.data_dir=/data \
    --workdir=/shared/runs/bn_x30
  bn-keras slurm --config=mnist_bn --workdir=runs/mnist_bn --submit
"""

import os
import pathlib
import shlex
import subprocess
import sys

from absl import flags

from .. import cli
from ..command_error import CommandError
from ..training_command import check_batch_sizes, locate_config, training_arguments

_TEMPLATE = pathlib.Path(__file__).with_name("train.sbatch")

_CONFIG = cli.define_config()
_WORKDIR = cli.define_workdir()
_NODES = flags.DEFINE_integer("nodes", 1, "Number of nodes.", lower_bound=1)
_GPUS = flags.DEFINE_integer(
    "gpus_per_node", 0, "GPUs of each node; 0 requests none.", lower_bound=0
)
_CPUS = flags.DEFINE_integer(
    "cpus_per_node", None, "CPU cores of each node; without it, Slurm's default.", lower_bound=1
)
_TIME = flags.DEFINE_string(
    "time", "", "Time limit, such as 24:00:00 or 2-12; without it, Slurm's default."
)
_GRACE = flags.DEFINE_integer(
    "grace_seconds",
    120,
    "Time before the limit at which the training ends a loop of steps and saves.",
    lower_bound=1,
)
_SBATCH = flags.DEFINE_multi_string(
    "sbatch", [], "Further option of sbatch, such as --sbatch=--account=me; may be repeated."
)
_SETUP = flags.DEFINE_string("setup", "", "Shell command to run first, such as 'module load cuda'.")
_SUBMIT = flags.DEFINE_bool("submit", False, "Submit the script instead of printing it.")


def main() -> None:
    """Prints or submits the script."""
    script = _make_script()
    if not _SUBMIT.value:
        print(script, end="")
        return
    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True)
    except FileNotFoundError:
        raise CommandError(
            "sbatch is not installed: run this on a login node of the cluster"
        ) from None
    if done.returncode:
        reason = done.stderr.strip().removeprefix("sbatch: error: ").partition("\n")[0]
        raise CommandError(f"sbatch: {reason or f'exit status {done.returncode}'}")
    print(done.stdout, end="", flush=True)


def _make_script() -> str:
    """Returns the script; raises CommandError for an invalid flag."""
    _check_replicas()
    values = {
        "# @options@": "\n".join(f"#SBATCH {option}" for option in _options()),
        "# @setup@": _SETUP.value or "# Load modules here.",
        "@command@": shlex.join(_command()),
    }
    script = _TEMPLATE.read_text()
    for mark, value in values.items():
        script = script.replace(mark, value)
    return script


def _options() -> list[str]:
    """Returns the options of sbatch."""
    options = [
        f"--job-name={os.path.basename(_workdir().rstrip('/'))}",
        "--output=%x-%j.log",
        f"--nodes={_NODES.value}",
        "--ntasks-per-node=1",
        f"--signal=TERM@{_GRACE.value}",
    ]
    if _GPUS.value:
        options.append(f"--gpus-per-node={_GPUS.value}")
    if _CPUS.value:
        options.append(f"--cpus-per-task={_CPUS.value}")
    if _TIME.value:
        options.append(f"--time={_TIME.value}")
    options += _SBATCH.value
    for option in options:
        if not option.startswith("-") or not option.isprintable():
            raise CommandError(
                f"{option!r} is not an option of sbatch: expected --sbatch=--OPTION=VALUE, such as"
                " --sbatch=--account=me"
            )
    return [shlex.quote(option) for option in options]


def _command() -> list[str]:
    """Returns the command that each task runs: this Python, and the flags of the training."""
    workers = {"distribution.strategy": "multi_worker", "distribution.replicas": 0}
    required = workers if _NODES.value > 1 else {}
    arguments = training_arguments(
        locate_config(_CONFIG.source),
        _CONFIG.overrides,
        _workdir(),
        required,
        "on several nodes",
    )
    package = __package__.rpartition(".")[0]
    return [sys.executable, "-m", f"{package}.train", *arguments]


def _workdir() -> str:
    from bn_keras.storage import is_local

    workdir = _WORKDIR.value
    return os.path.abspath(workdir) if is_local(workdir) else workdir


def _check_replicas() -> None:
    """Raises CommandError, before the job is queued, if its replicas do not divide a batch."""
    from bn_keras.text import counted

    config, nodes, gpus = _CONFIG.value, _NODES.value, _GPUS.value
    if nodes == 1 and config.distribution.strategy == "one_device":
        if gpus > 1:
            raise CommandError(
                f"--gpus_per_node={gpus} and distribution.strategy=one_device are mutually"
                " exclusive: pass --config.distribution.strategy=mirrored or --gpus_per_node=1"
            )
        return
    job = counted(nodes, "node") + (f" with {counted(gpus, 'GPU')} each" if gpus else "")
    # On several nodes, each uses all of its GPUs.
    replicas = nodes * max(gpus, 1)
    if nodes == 1 and config.distribution.replicas:
        replicas = config.distribution.replicas
    check_batch_sizes(config, replicas, job)


COMMAND = cli.Command(__name__, main)
