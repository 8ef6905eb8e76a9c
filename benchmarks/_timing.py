"""Times functions against each other in one run."""

import statistics
import time
from collections.abc import Callable, Mapping


def compare(
    functions: Mapping[str, Callable[[], object]], rounds: int = 9, block: int = 3
) -> dict[str, float]:
    """Gives each function's median time of a call in milliseconds.

    The functions take turns in blocks of calls, so that whatever else the machine does befalls
    all of them. A block's first call is not timed: it pays for the memory that the function
    before it has returned.

    Args:
      functions: each waits for its own result.
      rounds: how often the turn comes round.
      block: timed calls in a turn.
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


def table(title: str, rows: Mapping[str, Mapping[str, float]], ratios: Mapping[str, tuple]) -> None:
    """Prints milliseconds and ratios as a Markdown table, with the ratios' geometric means.

    Args:
      title: what was measured.
      rows: by case, the milliseconds of each function.
      ratios: by heading, the two functions whose times are divided.
    """
    names = list(next(iter(rows.values())))
    print(f"\n{title}\n")
    print("|".join(["", "ms a call", *names, *ratios, ""]))
    print("|---" * (1 + len(names) + len(ratios)) + "|")
    of = {h: [row[a] / row[b] for row in rows.values()] for h, (a, b) in ratios.items()}
    for i, (case, row) in enumerate(rows.items()):
        cells = [f"{row[n]:.2f}" for n in names] + [f"{of[h][i]:.2f}" for h in ratios]
        print("|".join(["", case, *cells, ""]))
    means = [f"{statistics.geometric_mean(of[h]):.2f}" for h in ratios]
    print("|".join(["", "geometric mean", *[""] * len(names), *means, ""]), flush=True)
