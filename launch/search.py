"""Tries initializations and base rates for one network and ranks them by validation accuracy.

So were the miniatures' values found, for Inception alone.

Example:
  python -m launch.search --config=configs/digits_inception.py --workdir=runs/s
"""

import itertools
import statistics

from absl import flags

from . import cli

_CONFIG = cli.define_config()
_WORKDIR = cli.define_workdir("Folder with a folder for each run.")
_INITIALIZERS = flags.DEFINE_list(
    "initializers", ["he_normal", "glorot_uniform"], "Values of config.model.initializer."
)
_BASE_RATES = flags.DEFINE_list(
    "base_rates", ["0.003", "0.01", "0.03"], "Values of config.schedule.base_rate."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Values of config.seed to average over.")
_PARALLEL = cli.define_parallel()


def main() -> None:
    """Trains every combination and prints them, the best first."""
    from bn_keras.experiments.run_all import run_all
    from bn_keras.training.plan import describe

    for flag in (_INITIALIZERS, _BASE_RATES, _SEEDS):
        if not flag.value:
            cli.fail(f"--{flag.name} is empty: give one value or more, separated by commas", 2)
    settings = list(itertools.product(_INITIALIZERS.value, _BASE_RATES.value))
    configs = {}
    for initializer, base_rate in settings:
        for seed in _SEEDS.value:
            config = _CONFIG.value.copy_and_resolve_references()
            config.model.initializer = initializer
            config.schedule.base_rate = cli.parse(float, base_rate, "--base_rates")
            config.seed = cli.parse(int, seed, "--seeds")
            configs[f"{initializer} {base_rate} seed {seed}"] = config
    count = f"{len(configs)}, of {_CONFIG.value.train.steps:,} steps each, in {_WORKDIR.value}"
    cli.log_lines({"config": str(_CONFIG)} | describe(_CONFIG.value) | {"runs": count})
    runs = run_all(configs, _WORKDIR.value, _PARALLEL.value, cli.begin_process)
    found = iter(runs.values())

    rows = []
    for initializer, base_rate in settings:
        seeds = list(itertools.islice(found, len(_SEEDS.value)))
        accuracy = statistics.mean(run.best_accuracy for run in seeds)
        loss = statistics.mean(run.lowest_loss for run in seeds)
        diverged = sum(run.diverged_at is not None for run in seeds)
        rows.append((-accuracy, loss, f"{initializer:16} {base_rate:9} {diverged:8}"))
    print(f"means over {len(_SEEDS.value)} seeds, the best first")
    print("best validation accuracy  lowest training loss  initializer      base rate  diverged")
    for accuracy, loss, setting in sorted(rows):
        print(f"{-accuracy:24.4f}  {loss:20.4f}  {setting}")


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
