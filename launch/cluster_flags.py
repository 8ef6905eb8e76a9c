"""The flags --workers and --worker, for machines without a cluster manager."""

from absl import flags, logging

from .command_error import CommandError

# Flags defined in this module belong to the command that calls it: --help lists them there.
flags.disclaim_key_flags()


def define_cluster() -> None:
    """Defines --workers and --worker, which `apply_flags` reads."""
    flags.DEFINE_list(
        "workers", [], "HOST:PORT of each worker, without Slurm, SkyPilot or TF_CONFIG."
    )
    flags.DEFINE_integer(
        "worker", None, "Index of this process in --workers, from 0.", lower_bound=0
    )


def apply_flags() -> bool:
    """Applies --workers and --worker; returns whether this process takes part in the command.

    An evaluator of TF_CONFIG does not: the workers evaluate by themselves.

    Raises:
      CommandError: one of the two flags is missing.
      UsageError: the flags or TF_CONFIG are invalid.
    """
    from bn_keras import distribute

    workers, worker = flags.FLAGS.workers, flags.FLAGS.worker
    if bool(workers) != (worker is not None):
        missing = "--worker" if workers else "--workers"
        raise CommandError(f"{missing} is missing: --workers and --worker belong together")
    if workers:
        distribute.join_cluster(workers, worker)
    if distribute.is_evaluator():
        logging.info(
            "nothing to do: the workers evaluate, so the evaluator of TF_CONFIG is not needed"
        )
        return False
    return True
