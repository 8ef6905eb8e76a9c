"""Searches initializers and base learning rates for a network, by validation accuracy.

The configs on digits and CIFAR-10 use values found this way, for Inception only.

Example:
  bn-keras search --config=digits_inception --workdir=runs/search
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from . import cli
from .command_error import CommandError

if TYPE_CHECKING:
    from bn_keras.runs.history import Run

_CONFIG = cli.define_config()
_WORKDIR = cli.define_workdir("Folder of all runs.")
_INITIALIZERS = flags.DEFINE_list(
    "initializers", ["he_normal", "glorot_uniform"], "Values of config.model.initializer."
)
_BASE_RATES = flags.DEFINE_list(
    "base_rates", ["0.003", "0.01", "0.03"], "Values of config.schedule.base_rate."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Values of config.seed to average over.")
_PARALLEL = cli.define_parallel()


class _Result(NamedTuple):
    """Result of one combination; accuracy and loss are means over its seeds."""

    accuracy: float
    loss: float
    initializer: str
    base_rate: str
    diverged: int


def main() -> None:
    """Trains all combinations and prints the results, best first."""
    from bn_keras.experiments.run_all import train_all
    from bn_keras.text import counted
    from bn_keras.training.build import build_initializer
    from bn_keras.training.plan import describe_input, describe_length

    for flag in (_INITIALIZERS, _BASE_RATES, _SEEDS):
        if not flag.value:
            raise CommandError(
                f"--{flag.name} is empty: expected one or more values, separated by commas"
            )
        if len(set(flag.value)) < len(flag.value):
            raise CommandError(
                f"--{flag.name}={','.join(flag.value)} repeats a value: pass each value once"
            )
    settings = list(itertools.product(_INITIALIZERS.value, _BASE_RATES.value))
    configs = {}
    for initializer, base_rate in settings:
        for seed in _SEEDS.value:
            config = _CONFIG.value.copy_and_resolve_references()
            # An unknown name would otherwise be reported when its first run starts.
            build_initializer(initializer, config.model.initializer_stddev)
            config.model.initializer = initializer
            config.schedule.base_rate = cli.parse_item(float, base_rate, "--base_rates")
            config.seed = cli.parse_item(int, seed, "--seeds")
            configs[f"{initializer} {base_rate} seed {seed}"] = config
    count = f"{len(configs)} in {_WORKDIR.value}, {describe_length(_CONFIG.value)} each"
    cli.log_lines({"config": str(_CONFIG)} | describe_input(_CONFIG.value) | {"runs": count})
    runs = iter(
        train_all(configs, _WORKDIR.value, _PARALLEL.value, cli.begin_child_process).values()
    )
    results = [
        _summarize(setting, list(itertools.islice(runs, len(_SEEDS.value)))) for setting in settings
    ]
    print(f"means over {counted(len(_SEEDS.value), 'seed')}, best first")
    print(_format(results))


def _summarize(setting: tuple[str, str], seeds: Sequence[Run]) -> _Result:
    return _Result(
        statistics.mean(run.best_accuracy for run in seeds),
        statistics.mean(run.lowest_loss for run in seeds),
        *setting,
        diverged=sum(run.diverged_at is not None for run in seeds),
    )


def _format(results: Sequence[_Result]) -> str:
    from bn_keras.text import table

    header = ["initializer", "base rate", "best validation accuracy", "lowest training loss"]
    ranked = sorted(results, key=lambda r: (-r.accuracy, r.loss, r.initializer, r.base_rate))
    rows = [
        [r.initializer, r.base_rate, f"{r.accuracy:.2%}", f"{r.loss:.4f}", f"{r.diverged}"]
        for r in ranked
    ]
    return "\n".join(table([[*header, "diverged"], *rows], left=2))


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
