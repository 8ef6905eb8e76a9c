"""Tries initializations and base rates for one network and ranks them.

So were the miniatures' values found, for Inception alone.

Example:
  python -m launch.search --config=configs/digits_inception.py --workdir=runs/search
"""

from absl import flags

from launch import cli

_CONFIG = cli.define_config()
_WORKDIR = cli.define_workdir("Folder with a folder for each run.")
_INITIALIZERS = flags.DEFINE_list(
    "initializers", ["he_normal", "glorot_uniform"], "Values of config.model.initializer."
)
_BASE_RATES = flags.DEFINE_list(
    "base_rates", ["0.003", "0.01", "0.03", "0.1"], "Values of config.schedule.base_rate."
)


def main() -> None:
    """Trains every combination and prints them, the best first."""
    from bn_keras.experiment import run_all

    configs = {}
    for initializer in _INITIALIZERS.value:
        for base_rate in _BASE_RATES.value:
            config = _CONFIG.value.copy_and_resolve_references()
            config.model.initializer = initializer
            config.schedule.base_rate = float(base_rate)
            configs[f"{initializer} {base_rate}"] = config
    runs = run_all(configs, _WORKDIR.value)

    runs.sort(key=lambda run: (-run.best_accuracy, run.lowest_loss))
    print("best validation accuracy, lowest training loss: initializer, base rate")
    for run in runs:
        diverged = f" (diverged at step {run.diverged_at})" if run.diverged_at else ""
        print(f"{run.best_accuracy:.4f}  {run.lowest_loss:.4f}: {run.title}{diverged}")


if __name__ == "__main__":
    cli.run(main)
