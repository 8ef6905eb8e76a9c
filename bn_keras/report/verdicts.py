"""Verdicts on statements: the same words in every section of a report."""

from collections.abc import Iterable, Mapping, Sequence

from bn_keras.report.sections import markdown_table
from bn_keras.text import counted

HOLDS = "holds"
FAILS = "does not hold"
TOO_CLOSE = "too close to call"
NO_VERDICT = "no verdict"
NOT_RUN = "not run"

_PLURALS = {HOLDS: "hold", FAILS: "do not hold"}


def judge(outcomes: Sequence[bool]) -> str:
    """Returns the verdict on a statement.

    Args:
      outcomes: whether it holds, seed by seed; none if it could not be tested.
    """
    if not outcomes:
        return NO_VERDICT
    if all(outcomes):
        return HOLDS
    return TOO_CLOSE if any(outcomes) else FAILS


def count_verdicts(verdicts: Iterable[str]) -> str:
    """Returns how often each verdict occurs, such as "13 hold, 5 do not hold"."""
    verdicts = list(verdicts)
    counts = {kind: verdicts.count(kind) for kind in (HOLDS, FAILS, TOO_CLOSE, NO_VERDICT, NOT_RUN)}
    return ", ".join(
        f"{count} {kind if count == 1 else _PLURALS.get(kind, kind)}"
        for kind, count in counts.items()
        if count
    )


def tabulate_verdicts(outcomes: Mapping[str, Sequence[bool]]) -> str:
    """Returns a table of verdicts.

    Args:
      outcomes: whether each statement holds, seed by seed.
    """
    rows = [
        (
            statement,
            f"**{judge(by_seed)}**",
            f"{sum(by_seed)} of {counted(len(by_seed), 'seed')}" if by_seed else "-",
        )
        for statement, by_seed in outcomes.items()
    ]
    return markdown_table(("statement", "verdict", "holds in"), rows, left=2)
