"""Trains a network, or goes on with a run that was stopped.

--dry_run builds everything, shows the network and the schedule, takes one step on made-up images
and writes nothing; the data need not be there. --verify_resume trains a few steps at a stretch,
and stopped and resumed, and compares all variables; it writes nothing either.

Example:
  python -m launch.train --config=configs/mnist_bn.py --workdir=runs/mnist_bn
"""

import shlex

from absl import flags

from . import cli

_CONFIG = cli.define_config()
_WORKDIR = cli.define_workdir()
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only show what would be trained, and try a step.")
_VERIFY_RESUME = flags.DEFINE_bool(
    "verify_resume", False, "Only prove that the run can be resumed exactly."
)
_PROFILE_STEPS = flags.DEFINE_integer(
    "profile_steps",
    0,
    "Profile the first loop's last N steps, for TensorBoard.",
    lower_bound=0,
)


def main() -> None:
    """Trains what the flags say, or tries it."""
    from bn_keras.training.plan import plan

    if _DRY_RUN.value and _VERIFY_RESUME.value:
        cli.fail("--dry_run and --verify_resume are two things: give one of them", 2)
    cli.log_lines({"config": str(_CONFIG)} | plan(_CONFIG.value, _WORKDIR.value))
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
    from bn_keras.training.loop import verify_resume

    digest = verify_resume(_CONFIG.value)
    print(f"A resumed run is the unbroken one: both have variables_sha256 {digest}")


def _train() -> None:
    from bn_keras.report import Run, figure_3_row
    from bn_keras.runs.workdir import Workdir
    from bn_keras.training.loop import train_and_evaluate

    workdir = _WORKDIR.value
    last = train_and_evaluate(_CONFIG.value, workdir, profile_steps=_PROFILE_STEPS.value)
    run = Workdir(workdir)
    parts = (run.metrics, run.checkpoints, run.best, run.finished)
    there = ", ".join(part.name for part in parts if part.exists())
    accuracy, loss = (last[f"validation/{name}"] for name in ("accuracy", "loss"))
    cli.log_lines(
        {
            "end": f"step {last['step']:,}: validation accuracy {accuracy:.4f}, loss {loss:.4f}",
            "figure 3": figure_3_row(Run.read(run.path.name, workdir)),
            "run": f"{workdir}: {there}",
            "look": shlex.join(["tensorboard", f"--logdir={workdir}"]),
            "next": shlex.join([*cli.command_line("evaluate"), f"--workdir={workdir}"]),
        }
    )


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
