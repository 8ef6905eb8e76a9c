"""Trains a network, or resumes its run.

--dry_run builds everything, prints the network and the schedule, trains one step on synthetic
images and writes nothing; the data set is not needed. --verify_resume trains a few steps twice,
uninterrupted and resumed, compares all variables and writes nothing.

Examples:
  bn-keras train --config=mnist_bn --workdir=runs/mnist_bn
  bn-keras train --config=bn_x5 --workdir=runs/bn_x5 --config.train.ema=0.9999
"""

import shlex

from absl import flags

from . import cli, cluster_flags
from .command_error import CommandError

_CONFIG = cli.define_config()
_WORKDIR = cli.define_workdir()
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only describe the training and try one step.")
_VERIFY_RESUME = flags.DEFINE_bool(
    "verify_resume", False, "Only check that resuming is bit-exact on these devices."
)
_PROFILE_STEPS = flags.DEFINE_integer(
    "profile_steps",
    0,
    "Profile the last N steps of the first loop, for TensorBoard.",
    lower_bound=0,
)
cluster_flags.define_cluster()


def main() -> None:
    """Trains, or tries the training."""
    from bn_keras.training.plan import describe_training

    if _DRY_RUN.value and _VERIFY_RESUME.value:
        raise CommandError("--dry_run and --verify_resume are mutually exclusive")
    if not cluster_flags.apply_flags():
        return
    plan = describe_training(_CONFIG.value, _WORKDIR.value)
    cli.log_lines({"config": str(_CONFIG)} | plan)
    if _DRY_RUN.value:
        _dry_run()
    elif _VERIFY_RESUME.value:
        _verify_resume()
    else:
        _train()


def _dry_run() -> None:
    from bn_keras.training.dry_run import dry_run

    for paragraph in dry_run(_CONFIG.value):
        print(f"{paragraph}\n", flush=True)
    print("Nothing was written.")


def _verify_resume() -> None:
    from bn_keras.training.resume_check import verify_resume

    digest = verify_resume(_CONFIG.value)
    print(f"Resuming is bit-exact: both runs have variables_sha256 {digest}")


def _train() -> None:
    from bn_keras.report import Run, describe_accuracy
    from bn_keras.runs.workdir import Workdir
    from bn_keras.training.loop import train_and_evaluate

    workdir = _WORKDIR.value
    last = train_and_evaluate(_CONFIG.value, workdir, profile_steps=_PROFILE_STEPS.value)
    run = Workdir(workdir)
    files = (run.metrics, run.checkpoints, run.best, run.finished, run.classes)
    # A value that is not finite is None.
    values = (last[f"validation/{name}"] for name in ("accuracy", "loss"))
    accuracy, loss = ("not finite" if value is None else f"{value:.4f}" for value in values)
    cli.log_lines(
        {
            "finished": f"step {last['step']:,}: validation accuracy {accuracy}, loss {loss}",
            "result": describe_accuracy(Run.read(run.name, workdir)),
            "written": f"{workdir}: {', '.join(file.name for file in files if file.exists())}",
            "curves": shlex.join(["tensorboard", f"--logdir={workdir}"]),
            "evaluate": shlex.join([*cli.command_line("evaluate"), f"--workdir={workdir}"]),
        }
    )


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
