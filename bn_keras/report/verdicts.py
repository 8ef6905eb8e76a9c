"""What became of a statement of the paper's: the words for it, the same in all of a report."""

from collections.abc import Iterable, Mapping, Sequence

from bn_keras.report.page import table

HOLDS = "holds"
FAILS = "does not hold here"
WITHIN_SPREAD = "within the spread of the seeds"
# For a reason that stands beside it.
UNDECIDED = "undecided"
NOT_RUN = "not run"


def judge(holds: Sequence[bool]) -> str:
    """Judges by whether a statement holds in each seed; of no seed it is undecided."""
    if not holds:
        return UNDECIDED
    if all(holds):
        return HOLDS
    return WITHIN_SPREAD if any(holds) else FAILS


def count(verdicts: Iterable[str]) -> str:
    """Says how many there are of each verdict."""
    verdicts = list(verdicts)
    kinds = (HOLDS, FAILS, WITHIN_SPREAD, UNDECIDED, NOT_RUN)
    return "; ".join(f"{kind}: {verdicts.count(kind)}" for kind in kinds if kind in verdicts)


def tabulate(statements: Mapping[str, Sequence[bool]]) -> str:
    """Makes a table of statements, and of whether each holds, seed by seed."""
    rows = [
        (statement, f"**{judge(holds)}**", f"{sum(holds)} of {len(holds)}" if holds else "-")
        for statement, holds in statements.items()
    ]
    return table(("statement", "verdict", "seeds in which it holds"), rows, left=2)
