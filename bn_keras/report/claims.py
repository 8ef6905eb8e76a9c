"""The sentences of the paper that runs can test, each with what was measured and a verdict."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from bn_keras.report import invariance
from bn_keras.report.page import Section, escape, table
from bn_keras.report.runs import Results, Run, Spread
from bn_keras.report.titles import (
    ABLATIONS,
    BASELINE,
    CONTROL,
    INCEPTION,
    INCEPTION_X5,
    INCEPTION_X30,
    LONG_MEMORY,
    POPULATION,
    SCALES,
    SIGMOID,
    SIGMOID_X5,
    X5,
    X5_AT_RATE_1,
    X5_SIGMOID,
    X30,
    scaled,
)
from bn_keras.workdir import Workdir

HOLDS = "holds"
FAILS = "does not hold here"
WITHIN_SPREAD = "within the spread of the seeds"
# For a reason that the note tells.
UNDECIDED = "undecided"
NOT_RUN = "not run"

# An accuracy below so many times that of guessing is at chance.
CHANCE_FACTOR = 1.5
# Rounding explains a deviation of up to so much of the largest value.
ROUNDING = {"float64": 1e-12, "float32": 1e-4}


class Finding(NamedTuple):
    """What became of a claim.

    Attributes:
      measured: Markdown, on one line.
      verdict: HOLDS, FAILS, WITHIN_SPREAD, UNDECIDED or NOT_RUN.
      note: what in the runs' settings may have to do with it, where it doesn't hold; Markdown.
    """

    measured: str
    verdict: str
    note: str = ""


class Claim(NamedTuple):
    """A sentence that can be tested.

    Attributes:
      section: of the paper; "ours" marks a control that the paper does not have.
      sentence: what it says, in our words.
      test: from the runs to the finding; raises _NotRunError where one of them is missing.
    """

    section: str
    sentence: str
    test: Callable[[Results], Finding]


class _NotRunError(Exception):
    """A claim can't be tested, for the reason that is its text."""


def claims(results: Results) -> Section:
    """Tests each sentence by the runs that there are, and section 3.3's by measuring it now.

    Args:
      results: of the paper's networks, and of the runs of configs/claims.py. What is missing, or
        has not come to its end, is a line that says so.
    """
    findings = {claim: find(claim, results) for claim in CLAIMS}
    rows = [
        (claim.section, claim.sentence, finding.measured, f"**{finding.verdict}**")
        for claim, finding in findings.items()
    ]
    verdicts = [finding.verdict for finding in findings.values()]
    kinds = (HOLDS, FAILS, WITHIN_SPREAD, UNDECIDED, NOT_RUN)
    counts = {verdict: verdicts.count(verdict) for verdict in kinds}
    plots = _draw_plots(results)
    body = [
        f"{len(rows)} sentences; {'; '.join(f'{v}: {n}' for v, n in counts.items() if n)}.",
        table(("section", "what is said", "what was measured", "verdict"), rows, left=4),
        *(f"![{text}]({name})" for name, (text, _) in plots.items()),
        "### How a verdict comes about",
        _tell_rules(results),
        *_tell_notes(findings),
        "### A factor on the weights in front of BN",
        _tell_invariance(),
        _tabulate_invariance(),
    ]
    figures = {name: figure for name, (_, figure) in plots.items()}
    return Section("The paper's claims, one by one", "\n\n".join(body), figures)


def find(claim: Claim, results: Results) -> Finding:
    """Tests one claim."""
    try:
        return claim.test(results)
    except _NotRunError as error:
        return Finding(f"{error}", NOT_RUN)


# --- What runs say, and when two networks differ.


def _runs(results: Results, title: str) -> Sequence[Run]:
    """Gives a network's runs, each of them at its end."""
    runs = results.get(title, ())
    if not runs:
        raise _NotRunError(f"{escape(title)}: no run")
    if not all(run.diverged_at or Workdir.FINISHED in _last(run) for run in runs):
        raise _NotRunError(f"{escape(title)}: not at its end")
    return runs


def _last(run: Run) -> Mapping[str, object]:
    return run.metrics[-1] if run.metrics else {}


def _steps(*runs: Run) -> int:
    """Gives the length of the shortest: the others' first part is compared with it."""
    return min(run.config.train.steps for run in runs)


def _has_diverged(run: Run, until: int) -> bool:
    return run.diverged_at is not None and run.diverged_at <= until


def _accuracy(run: Run, until: int) -> float:
    """Gives the best validation accuracy up to a step; 0 if the run diverged by then."""
    if _has_diverged(run, until):
        return 0.0
    points = dict(zip(*run.curve("validation/accuracy"), strict=True))
    if until not in points:
        raise _NotRunError(f"{escape(run.title)}: no evaluation at step {until:,}")
    return max(accuracy for step, accuracy in points.items() if step <= until)


def _standard_error(run: Run, accuracy: float) -> float:
    """Gives that of an accuracy on as many validation images as the run has."""
    count = max(run.curve("validation/examples")[1], default=math.inf)
    return math.sqrt(accuracy * (1 - accuracy) / count)


def _chance(run: Run) -> float:
    if not run.num_classes:
        raise _NotRunError(f"{escape(run.title)}: it isn't known how many classes there are")
    return 1 / run.num_classes


def _is_at_chance(run: Run) -> bool:
    return run.best_accuracy < CHANCE_FACTOR * _chance(run)


class _Group(NamedTuple):
    """What the seeds of one network reach up to some step.

    Attributes:
      title: of the network.
      accuracies: one a seed; 0 where it diverged.
      standard_error: the highest of those of its accuracies.
      num_diverged: how many seeds did.
    """

    title: str
    accuracies: list[float]
    standard_error: float
    num_diverged: int

    @classmethod
    def of(cls, runs: Sequence[Run], until: int) -> "_Group":
        accuracies = [_accuracy(run, until) for run in runs]
        error = max(map(_standard_error, runs, accuracies))
        return cls(runs[0].title, accuracies, error, sum(_has_diverged(r, until) for r in runs))

    @property
    def spread(self) -> float:
        return max(self.accuracies) - min(self.accuracies)

    def __str__(self) -> str:
        count, title = len(self.accuracies), escape(self.title)
        if self.num_diverged == count:
            return f"{title} diverged"
        note = f", {self.num_diverged} of {count} diverged" if self.num_diverged else ""
        return f"{title} {Spread.of(self.accuracies):.1%}{note}"


def margin_of(groups: Sequence[_Group]) -> float | None:
    """Gives the gap from which two groups differ; None where there is no second seed in either.

    It is the wider of the spreads over the seeds, and at least the standard error of an accuracy.
    """
    if all(len(group.accuracies) == 1 for group in groups):
        return None
    return max(max(group.spread, group.standard_error) for group in groups)


class _Comparison(NamedTuple):
    """Two networks up to the end of the shorter of their runs.

    Attributes:
      measured: as a finding has it.
      sign: 1 or -1: all seeds of the first are better or worse than all of the second, by more
        than the margin; 0: neither.
      margin: as `margin_of`.
    """

    measured: str
    sign: int
    margin: float | None

    @property
    def verdict(self) -> str:
        """Whether the first is better."""
        undecided = UNDECIDED if self.margin is None else WITHIN_SPREAD
        return {1: HOLDS, 0: undecided, -1: FAILS}[self.sign]

    @property
    def resolution(self) -> str:
        """Why it may not be decided."""
        if self.margin is None:
            return "There is one seed of each: what another one would change isn't known."
        if self.sign:
            return ""
        return f"Differences below {_points(self.margin)} can't be decided by these runs."


def _compare(results: Results, title: str, other: str) -> _Comparison:
    runs = _runs(results, title), _runs(results, other)
    step = _steps(*runs[0], *runs[1])
    first, second = groups = [_Group.of(of_title, step) for of_title in runs]
    margin = margin_of(groups)
    measured = f"by step {step:,}: {first}, {second}"
    if margin is not None:
        measured += f"; margin {_points(margin)}"
    ahead = min(first.accuracies) - max(second.accuracies)
    behind = min(second.accuracies) - max(first.accuracies)
    return _Comparison(measured, _sign(max(ahead, 0) - max(behind, 0), margin), margin)


def _sign(difference: float, margin: float | None) -> int:
    """Gives that of a difference that is more than the margin, else 0."""
    if margin is None:
        return 0
    return (difference > margin) - (difference < -margin)


def _points(difference: float) -> str:
    return f"{100 * difference:.1f} points"


def _outcomes(runs: Sequence[Run]) -> str:
    """Says how each seed ended."""

    def outcome(run: Run) -> str:
        if run.diverged_at:
            return f"diverged at step {run.diverged_at:,}"
        return f"{run.best_accuracy:.1%}{' (at chance)' if _is_at_chance(run) else ''}"

    return f"{escape(runs[0].title)}: {', '.join(map(outcome, runs))}"


# --- The tests.


def _diverges(title: str, results: Results) -> Finding:
    """Every seed's loss or weights stop being finite."""
    runs, note = _runs(results, title), _tell_rate(results)
    if all(run.diverged_at or _is_at_chance(run) for run in runs):
        note += " At this one it does not train here either, but stays at chance."
    verdict = HOLDS if all(run.diverged_at for run in runs) else FAILS
    return Finding(_outcomes(runs), verdict, note)


def _is_too_high(title: str, results: Results) -> Finding:
    """Inception is better at its own rate."""
    found = _compare(results, INCEPTION, title)
    return Finding(found.measured, found.verdict, f"{_tell_rate(results)} {found.resolution}")


def _tell_rate(results: Results) -> str:
    rate = _runs(results, INCEPTION)[0].config.schedule.base_rate
    return (
        f"Inception's rate is {rate:g} here and 0.0015 in the paper; how far each lies below the"
        " highest with which Inception trains need not be the same."
    )


def _stays_at_chance(title: str, results: Results) -> Finding:
    """No seed is ever above chance, even if it diverges in the end."""
    runs = _runs(results, title)
    note = f"The paper has 1,000 classes, so that chance is 0.1%; here it is {_chance(runs[0]):.1%}"
    return Finding(_outcomes(runs), HOLDS if all(map(_is_at_chance, runs)) else FAILS, f"{note}.")


def _trains(titles: Sequence[str], results: Results) -> Finding:
    """No seed diverges or stays at chance."""
    networks = [_runs(results, title) for title in titles]
    fails = any(run.diverged_at or _is_at_chance(run) for runs in networks for run in runs)
    return Finding("; ".join(map(_outcomes, networks)), FAILS if fails else HOLDS)


def _is_better(title: str, other: str, results: Results) -> Finding:
    found = _compare(results, title, other)
    return Finding(found.measured, found.verdict, found.resolution)


def _helps(change: str, results: Results) -> Finding:
    """BN-x5 is better than with the change taken back."""
    found = _compare(results, X5, ABLATIONS[change])
    note = f"{_setting(change, results)} {found.resolution}"
    return Finding(found.measured, found.verdict, note)


def _does_no_harm(change: str, results: Results) -> Finding:
    """BN-x5 is not worse than with the change taken back."""
    found = _helps(change, results)
    return found._replace(verdict=HOLDS) if found.verdict == WITHIN_SPREAD else found


def _setting(change: str, results: Results) -> str:
    """Says what a change amounts to in these runs, if they tell that."""
    runs, other = _runs(results, X5), _runs(results, ABLATIONS[change])[0]
    run = runs[0]
    if change == "lrn" or any(each.diverged_at for each in (*runs, other)):
        return ""
    examples = run.config.train.steps * run.config.train.global_batch_size
    epochs = examples / run.num_train_examples if run.num_train_examples else 0
    length = f"The runs are {epochs:.1f} epochs long" if epochs else "The runs are short"
    if change in ("dropout", "l2"):
        training = Spread.of(run.curve("train/accuracy")[1][-1] for run in runs)
        validation = Spread.of(run.curve("validation/accuracy")[1][-1] for run in runs)
        return (
            f"{length}. At its end BN-x5 has {training.mean:.1%} on training images, distorted as"
            f" it sees them, and {validation.mean:.1%} on validation images: the less the first is"
            " above the second, the less there is for regularization to act against."
        )
    if change == "decay":
        ends = [f"{_rate_kept(each):.2g}" for each in (run, other)]
        return f"At its end BN-x5 has {ends[0]} of its first rate, the other run {ends[1]}."
    if change == "shuffling" and epochs:
        return (
            f"{length}: the same examples meet in a mini-batch {math.ceil(epochs)} times at most."
            " The paper's difference is about 1 point."
        )
    if change == "distortions":
        strengths = (other.config.data.distortion, run.config.data.distortion)
        return f"{length}, and the strength goes from {strengths[0]:g} to {strengths[1]:g}."
    return f"{length}."


def _rate_kept(run: Run) -> float:
    rates = run.curve("train/learning_rate")[1]
    return rates[-1] / rates[0]


def _initialization(results: Results) -> Finding:
    """Over the factors on the initial weights, BN-Baseline's accuracies lie closer together."""
    sweeps = {title: _sweep(results, title) for title in (INCEPTION, BASELINE)}
    ends = {title: Spread.of(s.mean for s in sweep.values()) for title, sweep in sweeps.items()}
    inception, baseline = (ends[title].high - ends[title].low for title in (INCEPTION, BASELINE))
    runs = {title: _runs(results, title) for title in sweeps}
    step = _sweep_steps(results, INCEPTION)
    margin = margin_of([_Group.of(of_title, step) for of_title in runs.values()])
    measured = f"by step {step:,}, factors {min(SCALES):g} to {max(SCALES):g}: " + ", ".join(
        f"{title} {spread.low:.1%} to {spread.high:.1%}" for title, spread in ends.items()
    )
    if ends[INCEPTION].high < CHANCE_FACTOR * _chance(runs[INCEPTION][0]):
        note = "Inception is at chance this early with any of the factors."
        return Finding(measured, UNDECIDED, note)
    found = _Comparison(measured, _sign(inception - baseline, margin), margin)
    return Finding(found.measured, found.verdict, found.resolution)


def _sweep(results: Results, title: str) -> dict[float, Spread]:
    """Accuracies at the end of the short runs, by the factor on the initial weights."""
    step = _sweep_steps(results, title)
    runs = {factor: _runs(results, scaled(title, factor)) for factor in SCALES}
    runs[1.0] = _runs(results, title)
    return {
        factor: Spread.of(_accuracy(run, step) for run in runs[factor]) for factor in sorted(runs)
    }


def _sweep_steps(results: Results, title: str) -> int:
    return _steps(*(run for factor in SCALES for run in _runs(results, scaled(title, factor))))


def _moving_statistics(results: Results) -> Finding:
    """By the same weights, the figure's moving averages are as good as the population's.

    As good is within the standard error of the accuracy, at the last step of the shorter run.
    """
    population = _runs(results, POPULATION)[0]
    step = _steps(population)
    moving = [run for run in _runs(results, X5) if run.config.seed == population.config.seed]
    if not moving:
        raise _NotRunError(f"{X5}: no run of seed {population.config.seed}")
    # The figures' memory may be the long one itself, which then has no run of its own.
    others = [*moving, *(_runs(results, LONG_MEMORY) if results.get(LONG_MEMORY) else ())]
    expected = _at(population, step)
    measured = [
        f"BN-x5 at step {step:,}: {expected:.1%} by population statistics over"
        f" {population.config.population.num_batches} batches"
    ]
    for run in others:
        momentum = run.config.batch_norm.momentum
        measured.append(
            f"{_at(run, step):.1%} by averages of momentum {momentum:g}"
            f" ({1 / (1 - momentum):,.0f} steps)"
        )
    if not all(_is_same_training(run, population) for run in others):
        measured.append("not of the same weights: the training losses differ")
    gap = abs(_at(moving[0], step) - expected)
    error = _standard_error(population, expected)
    note = (
        f"The two accuracies are {_points(gap)} apart, and a standard error is {_points(error)}."
        " The shorter a memory is, the fewer mini-batches an average is taken over; the longer, the"
        " older are the weights that some of them saw."
    )
    verdict = HOLDS if gap <= error else FAILS
    return Finding(", ".join(measured), verdict, note)


def _at(run: Run, step: int) -> float:
    """Gives the accuracy of the evaluation at a step."""
    points = dict(zip(*run.curve("validation/accuracy"), strict=True))
    if step not in points:
        raise _NotRunError(f"{escape(run.title)}: no evaluation at step {step:,}")
    return points[step]


def _is_same_training(run: Run, other: Run) -> bool:
    """Tells whether the training losses are the same up to the end of the shorter one."""
    losses = [dict(zip(*each.curve("train/loss"), strict=True)) for each in (run, other)]
    step = _steps(run, other)
    first, second = ({s: loss for s, loss in each.items() if s <= step} for each in losses)
    return first == second


def _is_invariant(attribute: str, results: Results) -> Finding:
    """Without epsilon only rounding is left."""
    tiny, usual = invariance.EPSILONS
    measured, holds = [], True
    for dtype in invariance.DTYPES:
        worst = max(_deviations(attribute, epsilon=tiny, dtype=dtype))
        holds &= worst <= ROUNDING[dtype]
        measured.append(f"{worst:.0e} in {dtype}")
    small, large = (
        max(_deviations(attribute, epsilon=usual, factor=factor))
        for factor in (min(invariance.FACTORS), max(invariance.FACTORS))
    )
    text = (
        f"a from {min(invariance.FACTORS):g} to {max(invariance.FACTORS):g}: off by"
        f" {' and '.join(measured)} at most; with epsilon {usual:g} by {small:.0%} at the smallest"
        f" a and {large:.1%} at the largest"
    )
    return Finding(text, HOLDS if holds else FAILS)


@functools.cache
def _measured_invariance() -> list[invariance.Deviation]:
    return invariance.measure()


def _deviations(attribute: str, **conditions: object) -> list[float]:
    return [
        getattr(deviation, attribute)
        for deviation in _measured_invariance()
        if all(getattr(deviation, name) == value for name, value in conditions.items())
    ]


CLAIMS = (
    Claim(
        "3.1",
        "While a network trains, moving averages can stand in for the population's statistics",
        _moving_statistics,
    ),
    Claim("3.3", "But for epsilon, BN((aW)u) = BN(Wu)", partial(_is_invariant, "output")),
    Claim(
        "3.3",
        "But for epsilon, the gradient with respect to u is the same for any a",
        partial(_is_invariant, "to_input"),
    ),
    Claim(
        "3.3",
        "But for epsilon, the gradient with respect to aW is 1/a of that with respect to W",
        partial(_is_invariant, "to_weights"),
    ),
    Claim(
        "3.3",
        "With BN, rates 5 and 30 times as high can be trained with",
        partial(_trains, (X5, X30)),
    ),
    Claim(
        "3.3",
        "Without BN, 5 times the rate is worse than Inception's own",
        partial(_is_too_high, INCEPTION_X5),
    ),
    Claim(
        "1",
        "With BN, the accuracy depends less on the scale of the initial weights",
        _initialization,
    ),
    Claim(
        "4.2.1",
        "Adding BN alone does not take full advantage of it: with the other changes BN-x5 gets"
        " further than BN-Baseline",
        partial(_is_better, X5, BASELINE),
    ),
    Claim(
        "ours",
        "The same changes without BN, at Inception's rate, do not get as far as BN-x5",
        partial(_is_better, X5, CONTROL),
    ),
    Claim(
        "4.2.1",
        "With BN, a higher rate speeds training up",
        partial(_is_better, X5, X5_AT_RATE_1),
    ),
    Claim(
        "4.2.1",
        "Without dropout, BN-x5 gets further in the same steps",
        partial(_helps, "dropout"),
    ),
    Claim("4.2.1", "A fifth of the L2 weight improves the accuracy", partial(_helps, "l2")),
    Claim(
        "4.2.1", "A rate that decays 6 times faster does no harm", partial(_does_no_harm, "decay")
    ),
    Claim("4.2.1", "Local response normalization is not needed", partial(_does_no_harm, "lrn")),
    Claim("4.2.1", "Shuffling within shards improves the accuracy", partial(_helps, "shuffling")),
    Claim("4.2.1", "Weaker distortions do no harm", partial(_does_no_harm, "distortions")),
    Claim("4.2.2", "Inception diverges at 5 times its rate", partial(_diverges, INCEPTION_X5)),
    Claim("ours", "And at 30 times, the rate of BN-x30", partial(_diverges, INCEPTION_X30)),
    Claim("4.2.2", "Inception with sigmoids stays at chance", partial(_stays_at_chance, SIGMOID)),
    Claim("ours", "And at the rate of BN-x5-Sigmoid", partial(_stays_at_chance, SIGMOID_X5)),
    Claim("4.2.2", "With BN, a network of sigmoids trains", partial(_trains, (X5_SIGMOID,))),
)


# --- What stands around the table.


def _tell_rules(results: Results) -> str:
    seeds = len(results.get(X5, ()))
    rules = [
        "An accuracy is the best of all evaluations on the validation images up to the step that is"
        " named, the last of the shorter run. A shorter run is step for step the first part of what"
        " a longer one would be. Several seeds are a mean, with the lowest and the highest in"
        f" brackets: the five networks have {seeds}, the other runs one.",
        "One network is better than another if each of its seeds is better than each of the other,"
        " by more than the margin; a run that diverged is worse than any that did not. The margin"
        " is the wider of the two networks' spreads over the seeds, and at least the standard error"
        " of an accuracy on so many validation images. If nothing differed but the seeds, three of"
        " the one network and one of the other would come out as different up to one time in seven:"
        " among so many lines, a single one that is just beyond its margin says little.",
        "That a change does no harm holds unless the network is better, in this sense, with the"
        " change taken back.",
        "A difference that is less than its margin is within the spread of the seeds. Between one"
        " seed and one it is undecided.",
        f"At chance is less than {CHANCE_FACTOR:g} times the accuracy of guessing. A network"
        " diverges if its loss or a weight is no longer finite, which ends the run. It trains if no"
        " seed does either.",
        "For the initial weights the accuracies at all factors are taken, and how far the highest"
        " is from the lowest; Inception and BN-Baseline have the same rate and differ in BN alone."
        " The difference between the two has to be more than the margin of the two networks.",
        "Moving averages can stand in if the accuracy with them is within one standard error of the"
        " one by the statistics of the population.",
    ]
    return "\n".join(f"- {rule}" for rule in rules)


def _tell_notes(findings: Mapping[Claim, Finding]) -> list[str]:
    notes = [
        f"- *{claim.sentence}* ({finding.verdict}): {finding.note.strip()}"
        for claim, finding in findings.items()
        if finding.verdict not in (HOLDS, NOT_RUN) and finding.note.strip()
    ]
    if not notes:
        return []
    return [
        "### Where it is not as the paper has it",
        "What in these runs' own settings may have to do with it; that it is the cause isn't shown"
        " by it.",
        "\n".join(notes),
    ]


def _tell_invariance() -> str:
    return (
        "Measured with this package's layer when the report was made, behind a dense layer and a"
        " convolution with weights W times a; the variance of Wu is about 1. Each number is the"
        " larger of the two layers' deviations from what float64 gives for a = 1, as a part of the"
        " largest value. Section 3.3 leaves epsilon out, and without it all three statements are"
        f" exact; our layer does not take 0, for which {invariance.EPSILONS[0]:g} stands. With the"
        f" default, {invariance.EPSILONS[1]:g}, they hold as long as the variance of aWu is large"
        " beside that, and no longer."
    )


def _tabulate_invariance() -> str:
    parts = {
        "output": "BN((aW)u)",
        "to_input": "gradient to u",
        "to_weights": "a times that to aW",
    }
    columns = list(itertools.product(invariance.DTYPES, parts))
    header = ["epsilon", "a", *(f"{parts[part]}, {dtype}" for dtype, part in columns)]
    rows = []
    for epsilon, factor in itertools.product(invariance.EPSILONS, invariance.FACTORS):
        worst = [
            max(_deviations(part, epsilon=epsilon, factor=factor, dtype=dtype))
            for dtype, part in columns
        ]
        rows.append(
            [f"{epsilon:g}", f"{factor:g}", *(f"{value:.0e}" if value else "0" for value in worst)]
        )
    return table(header, rows, left=0)


# --- The plots.

# Of Okabe and Ito's colours, which colour-blind readers can tell apart; markers for grey print.
_STYLES = {
    INCEPTION: dict(color="#000000", linestyle="-", marker="o"),
    BASELINE: dict(color="#E69F00", linestyle=(0, (6, 2)), marker="s"),
}
_BLUE = "#0072B2"


def _draw_plots(results: Results) -> dict[str, tuple[str, Figure]]:
    """Gives what there is to be drawn: by name, what it shows and the plot."""
    drawn = {}
    for name, draw in (
        ("claims_initialization.png", _draw_sweep),
        ("claims_ablations.png", _draw_ablations),
    ):
        try:
            drawn[name] = draw(results)
        except _NotRunError:
            continue
    return drawn


def _draw_sweep(results: Results) -> tuple[str, Figure]:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for title, style in _STYLES.items():
        sweep = _sweep(results, title)
        means = [spread.mean for spread in sweep.values()]
        bars = [
            [spread.mean - spread.low for spread in sweep.values()],
            [spread.high - spread.mean for spread in sweep.values()],
        ]
        axes.errorbar(list(sweep), means, bars, label=title, capsize=3, **style)
    factors = sorted((*SCALES, 1.0))
    axes.set(xscale="log", xlabel="factor on the initial weights", ylim=(0, None))
    axes.set_ylabel(f"accuracy by step {_sweep_steps(results, INCEPTION):,}")
    axes.xaxis.set_major_locator(FixedLocator(factors))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _lighten(axes)
    axes.legend(loc="best")
    text = (
        "Validation accuracy against the factor on the initial weights, of Inception and"
        " BN-Baseline; at 1 with the spread of the seeds, and 0 for a run that diverged"
    )
    return text, figure


def _draw_ablations(results: Results) -> tuple[str, Figure]:
    titles = [title for title in ABLATIONS.values() if results.get(title)]
    if not titles:
        raise _NotRunError("no ablations")
    groups = [_Group.of(_runs(results, t), _steps(*_runs(results, t))) for t in (X5, *titles)]
    figure = Figure(figsize=(6.4, 0.9 + 0.36 * len(groups)), layout="constrained")
    axes = figure.subplots()
    low, high = min(groups[0].accuracies), max(groups[0].accuracies)
    axes.axvspan(low, high, color=_BLUE, alpha=0.2, linewidth=0)
    margin = margin_of(groups)
    if margin is not None:
        for edge in (low - margin, high + margin):
            axes.axvline(edge, color=_BLUE, linestyle=(0, (4, 3)), linewidth=1)
    for place, group in enumerate(groups):
        for accuracy in group.accuracies:
            marker = "o" if accuracy else "x"
            axes.plot(accuracy, place, marker, color=_BLUE if place == 0 else "black")
    axes.set_yticks(range(len(groups)), [group.title for group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("best validation accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    _lighten(axes)
    text = (
        "Best validation accuracy of BN-x5, its seeds as a band with the margin as dashes on either"
        " side, and of BN-x5 with one change of section 4.2.1 taken back; a cross at 0 diverged"
    )
    return text, figure


def _lighten(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
