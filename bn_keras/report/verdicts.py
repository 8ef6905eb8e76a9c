"""Verdicts on statements: the same words in every section of a report."""

from collections.abc import Iterable, Mapping, Sequence

from bn_keras.report.sections import join_words, markdown_table
from bn_keras.text import counted

HOLDS = "holds"
FAILS = "does not hold"
TOO_CLOSE = "too close to call"
NO_VERDICT = "no verdict"
NOT_RUN = "not run"

# Each verdict as the predicate of a sentence about one statement, and about several.
_PREDICATES = {
    HOLDS: ("holds", "hold"),
    FAILS: ("does not hold", "do not hold"),
    TOO_CLOSE: ("is too close to call", "are too close to call"),
    NO_VERDICT: ("has no verdict", "have no verdict"),
    NOT_RUN: ("was not run", "were not run"),
}


# Whether a statement holds in one seed; None for a tie, a difference within the margin.
Outcome = bool | None


def exceeds(difference: float, margin: float = 0.0) -> Outcome:
    """Returns whether a difference supports a statement; None within the margin on either side."""
    if abs(difference) <= margin:
        return None
    return difference > 0


def judge(outcomes: Sequence[Outcome]) -> str:
    """Returns the verdict on a statement.

    Ties, and seeds that disagree, leave it open.

    Args:
      outcomes: one per seed; none if it could not be tested.
    """
    if not outcomes:
        return NO_VERDICT
    if all(outcomes):
        return HOLDS
    return FAILS if all(outcome is False for outcome in outcomes) else TOO_CLOSE


def count_verdicts(verdicts: Iterable[str]) -> str:
    """Returns how many times each verdict occurs, such as "13 hold and 5 do not hold"."""
    verdicts = list(verdicts)
    return join_words(
        f"{count} {predicates[count > 1]}"
        for kind, predicates in _PREDICATES.items()
        if (count := verdicts.count(kind))
    )


def tabulate_verdicts(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Returns a table of verdicts.

    Args:
      outcomes: outcomes of each statement, seed by seed.
    """
    rows = [
        (statement, f"**{judge(by_seed)}**", _count_seeds(by_seed))
        for statement, by_seed in outcomes.items()
    ]
    return markdown_table(("statement", "verdict", "holds in"), rows, left=3)


def explain_verdicts(num_seeds: int) -> str:
    """Explains the verdicts of a table whose statements are tested in this many seeds."""
    text = (
        "A statement holds if it holds in every seed. A tie is a difference below the resolution:"
        " equal numbers, or accuracies so close that the number of images leaves open which is"
        " higher (95% confidence)."
    )
    if num_seeds == 1:
        return (
            f"{text} With a tie, the statement is {TOO_CLOSE}. With a single seed, the verdicts"
            " describe these runs: another seed may differ."
        )
    return f"{text} With ties, or if seeds disagree, the statement is {TOO_CLOSE}."


def _count_seeds(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return "-"
    text = f"{outcomes.count(True)} of {counted(len(outcomes), 'seed')}"
    ties = outcomes.count(None)
    return f"{text}, {counted(ties, 'tie')}" if ties else text
