"""Compares the times of functions within one run."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def compare(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 9, block: int = 3
) -> dict[str, float]:
    """Returns the median time of a call of each function, in milliseconds.

    The functions take turns in blocks of calls, so that other load on the machine affects all of
    them. The first call of a block is not timed: it allocates the memory that the previous
    function has freed.

    Args:
      functions: functions by name; each waits for its own result.
      rounds: number of blocks per function.
      block: number of timed calls in a block.
    """
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            for _ in range(block):
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def print_table(
    title: str, rows: Mapping[str, Mapping[str, float]], ratios: Mapping[str, tuple[str, str]]
) -> None:
    """Prints milliseconds and ratios as a Markdown table, with the ratios' geometric means.

    Args:
      title: title of the table.
      rows: milliseconds by case and function.
      ratios: (numerator, denominator) by heading, both names of functions.
    """
    names = list(next(iter(rows.values())))
    print(f"\n{title}\n")
    print("|".join(["", "ms per call", *names, *ratios, ""]))
    print("|---" * (1 + len(names) + len(ratios)) + "|")
    values = {h: [row[a] / row[b] for row in rows.values()] for h, (a, b) in ratios.items()}
    for i, (case, row) in enumerate(rows.items()):
        cells = [f"{row[n]:.2f}" for n in names] + [f"{values[h][i]:.2f}" for h in ratios]
        print("|".join(["", case, *cells, ""]))
    means = [f"{statistics.geometric_mean(values[h]):.2f}" for h in ratios]
    print("|".join(["", "geometric mean", *[""] * len(names), *means, ""]), flush=True)
