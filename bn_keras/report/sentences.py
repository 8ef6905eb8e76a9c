"""The sentences of the paper that runs can test, each with what was measured and a verdict."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from bn_keras.experiments.titles import (
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
    X5_SIGMOID_DECAY,
    X30,
    X30_DECAY,
    scaled,
)
from bn_keras.report import invariance, verdicts
from bn_keras.report.margins import (
    Difference,
    Group,
    NotRunError,
    accuracy_at,
    best_by,
    common_steps,
    compare,
    ended_runs,
    margin_of,
    points,
)
from bn_keras.report.page import Section, escape, table
from bn_keras.report.plots import STYLES, lighten
from bn_keras.report.verdicts import FAILS, HOLDS, NOT_RUN, UNDECIDED, WITHIN_SPREAD
from bn_keras.runs.history import ACCURACY, LOSS, Results, Run, Spread

# An accuracy below so many times that of guessing is at chance.
CHANCE_FACTOR = 1.5
# Rounding explains a deviation of up to so much of the largest value.
ROUNDING = {"float64": 1e-12, "float32": 1e-4}


class Finding(NamedTuple):
    """What became of a claim.

    Attributes:
      measured: Markdown, on one line.
      verdict: of `verdicts`.
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
      test: from the runs to the finding; raises NotRunError where one of them is missing.
    """

    section: str
    sentence: str
    test: Callable[[Results], Finding]


def claims(results: Results) -> Section:
    """Tests each sentence by the runs that there are, and section 3.3's by measuring it now.

    Args:
      results: of the paper's networks, and of the runs of bn_keras/experiments/claim_runs.py. What is missing, or
        has not come to its end, is a line that says so.
    """
    findings = {claim: find(claim, results) for claim in CLAIMS}
    rows = [
        (claim.section, claim.sentence, finding.measured, f"**{finding.verdict}**")
        for claim, finding in findings.items()
    ]
    counts = verdicts.count(finding.verdict for finding in findings.values())
    plots = _draw_plots(results)
    body = [
        f"**{len(rows)} sentences; {counts}.**",
        table(("section", "what is said", "what was measured", "verdict"), rows, left=4),
        *(f"![{plot.shows}]({name})\n\n{plot.shows}. {plot.key}." for name, plot in plots.items()),
        "### How a verdict comes about",
        _tell_rules(results),
        *_tell_notes(findings),
        "### A factor on the weights in front of BN",
        *invariance.describe(),
    ]
    figures = {name: plot.figure for name, plot in plots.items()}
    return Section("The paper's claims, one by one", "\n\n".join(body), figures)


def find(claim: Claim, results: Results) -> Finding:
    """Tests one claim."""
    try:
        return claim.test(results)
    except NotRunError as error:
        return Finding(f"{error}", NOT_RUN)


# --- The tests.


def _chance(run: Run) -> float:
    if not run.num_classes:
        raise NotRunError(f"{escape(run.title)}: it isn't known how many classes there are")
    return 1 / run.num_classes


def _is_at_chance(run: Run) -> bool:
    return run.best_accuracy < CHANCE_FACTOR * _chance(run)


def _outcomes(runs: Sequence[Run]) -> str:
    """Says how each seed ended."""

    def outcome(run: Run) -> str:
        if run.diverged_at:
            return f"diverged at step {run.diverged_at:,}"
        return f"{run.best_accuracy:.1%}{' (at chance)' if _is_at_chance(run) else ''}"

    return f"{escape(runs[0].title)}: {', '.join(map(outcome, runs))}"


def _diverges(title: str, results: Results) -> Finding:
    """Every seed's loss or weights stop being finite."""
    runs, note = ended_runs(results, title), _tell_rate(results)
    if all(run.diverged_at or _is_at_chance(run) for run in runs):
        note += " It doesn't train at this one either: it stays at chance."
    verdict = HOLDS if all(run.diverged_at for run in runs) else FAILS
    return Finding(_outcomes(runs), verdict, note)


def _is_too_high(title: str, results: Results) -> Finding:
    """Inception is better at its own rate."""
    found = compare(results, INCEPTION, title)
    return Finding(found.measured, found.verdict, f"{_tell_rate(results)} {found.resolution}")


def _tell_rate(results: Results) -> str:
    rate = ended_runs(results, INCEPTION)[0].config.schedule.base_rate
    return f"Inception's rate is {rate:g} here, and 0.0015 in the paper."


def _stays_at_chance(title: str, results: Results) -> Finding:
    """No seed is ever above chance, even if it diverges in the end."""
    runs = ended_runs(results, title)
    note = f"The paper has 1,000 classes, so that chance is 0.1%; here it is {_chance(runs[0]):.1%}"
    return Finding(_outcomes(runs), HOLDS if all(map(_is_at_chance, runs)) else FAILS, f"{note}.")


def _trains(titles: Sequence[str], results: Results) -> Finding:
    """No seed diverges or stays at chance."""
    networks = [ended_runs(results, title) for title in titles]
    fails = any(run.diverged_at or _is_at_chance(run) for runs in networks for run in runs)
    return Finding("; ".join(map(_outcomes, networks)), FAILS if fails else HOLDS)


def _is_better(title: str, other: str, results: Results) -> Finding:
    found = compare(results, title, other)
    return Finding(found.measured, found.verdict, found.resolution)


def _helps(change: str, results: Results) -> Finding:
    """BN-x5 is better than with the change taken back."""
    found = compare(results, X5, ABLATIONS[change])
    note = f"{_tell_setting(change, results)} {found.resolution}"
    return Finding(found.measured, found.verdict, note)


def _does_no_harm(change: str, results: Results) -> Finding:
    """BN-x5 is not worse than with the change taken back."""
    return _or_alike(_helps(change, results))


def _is_no_worse(title: str, other: str, results: Results) -> Finding:
    return _or_alike(_is_better(title, other, results))


def _or_alike(found: Finding) -> Finding:
    return found._replace(verdict=HOLDS) if found.verdict == WITHIN_SPREAD else found


def _tell_setting(change: str, results: Results) -> str:
    """Says what a change amounts to in these runs, if they tell that."""
    runs, other = ended_runs(results, X5), ended_runs(results, ABLATIONS[change])[0]
    if change not in _SETTINGS or any(run.diverged_at for run in (*runs, other)):
        return ""
    return _SETTINGS[change](runs, other)


def _tell_overfitting(runs: Sequence[Run], other: Run) -> str:
    training, validation = (
        statistics.mean(list(run.curve(key).values())[-1] for run in runs)
        for key in ("train/accuracy", ACCURACY)
    )
    return (
        f"{_tell_length(runs[0])}At its end BN-x5 has {training:.1%} on training images, distorted"
        f" as it sees them, and {validation:.1%} on validation images."
    )


def _tell_decay(runs: Sequence[Run], other: Run) -> str:
    ends = [f"{_rate_kept(run):.2g}" for run in (runs[0], other)]
    return f"At its end BN-x5 has {ends[0]} of its first rate, the other run {ends[1]}."


def _tell_repetitions(runs: Sequence[Run], other: Run) -> str:
    return f"{_tell_length(runs[0])}The paper's difference is about 1 point."


def _tell_strengths(runs: Sequence[Run], other: Run) -> str:
    before, after = (run.config.data.distortion for run in (other, runs[0]))
    return f"{_tell_length(runs[0])}The strength goes from {before:g} to {after:g}."


# By the change: what it amounts to, from the runs of BN-x5 and the one without the change.
_SETTINGS: Mapping[str, Callable[[Sequence[Run], Run], str]] = {
    "dropout": _tell_overfitting,
    "l2": _tell_overfitting,
    "decay": _tell_decay,
    "shuffling": _tell_repetitions,
    "distortions": _tell_strengths,
}


def _tell_length(run: Run) -> str:
    if not run.num_train_examples:
        return ""
    examples = run.config.train.steps * run.config.train.global_batch_size
    return f"The runs are {examples / run.num_train_examples:.1f} epochs long. "


def _rate_kept(run: Run) -> float:
    rates = list(run.curve("train/learning_rate").values())
    return rates[-1] / rates[0]


def _initialization(results: Results) -> Finding:
    """Over the factors on the initial weights, BN-Baseline's accuracies lie closer together."""
    networks = (INCEPTION, BASELINE)
    means = {title: [s.mean for s in _sweep(results, title).values()] for title in networks}
    step = _sweep_steps(results, INCEPTION)
    measured = f"by step {step:,}, factors {min(SCALES):g} to {max(SCALES):g}: " + ", ".join(
        f"{title} {min(of_title):.1%} to {max(of_title):.1%}" for title, of_title in means.items()
    )
    runs = {title: ended_runs(results, title) for title in networks}
    if max(means[INCEPTION]) < CHANCE_FACTOR * _chance(runs[INCEPTION][0]):
        note = "Inception is at chance this early with any of the factors."
        return Finding(measured, UNDECIDED, note)
    inception, baseline = (max(of_title) - min(of_title) for of_title in means.values())
    margin = margin_of([Group.of(of_title, step) for of_title in runs.values()])
    found = Difference(measured, inception - baseline, margin)
    return Finding(found.measured, found.verdict, found.resolution)


def _sweep(results: Results, title: str) -> dict[float, Spread]:
    """Accuracies at the end of the short runs, by the factor on the initial weights."""
    step = _sweep_steps(results, title)
    runs = {factor: ended_runs(results, scaled(title, factor)) for factor in SCALES}
    runs[1.0] = ended_runs(results, title)
    return {
        factor: Spread.of(best_by(run, step) for run in runs[factor]) for factor in sorted(runs)
    }


def _sweep_steps(results: Results, title: str) -> int:
    return common_steps(
        *(run for factor in SCALES for run in ended_runs(results, scaled(title, factor)))
    )


def _moving_statistics(results: Results) -> Finding:
    """By the same weights, the figure's moving averages are as good as the population's.

    As good is within the standard error of the accuracy, at the last step of the shorter run.
    """
    population = ended_runs(results, POPULATION)[0]
    step = population.config.train.steps
    moving = [run for run in ended_runs(results, X5) if run.config.seed == population.config.seed]
    if not moving:
        raise NotRunError(f"{X5}: no run of seed {population.config.seed}")
    # The figures' memory may be the long one itself, which then has no run of its own.
    others = [*moving, *(ended_runs(results, LONG_MEMORY) if results.get(LONG_MEMORY) else ())]
    expected = accuracy_at(population, step)
    measured = [
        f"BN-x5 at step {step:,}: {expected:.1%} by population statistics over"
        f" {population.config.population.num_batches} batches"
    ]
    for run in others:
        momentum = run.config.batch_norm.momentum
        measured.append(
            f"{accuracy_at(run, step):.1%} by averages of momentum {momentum:g}"
            f" ({1 / (1 - momentum):,.0f} steps)"
        )
    if not all(_is_same_training(run, population) for run in others):
        measured.append("not of the same weights: the training losses differ")
    gap = abs(accuracy_at(moving[0], step) - expected)
    error = population.standard_error(expected)
    note = f"The two accuracies are {points(gap)} apart, and a standard error is {points(error)}."
    verdict = HOLDS if gap <= error else FAILS
    return Finding(", ".join(measured), verdict, note)


def _is_same_training(run: Run, other: Run) -> bool:
    """Tells whether the training losses are the same up to the end of the shorter one."""
    end = common_steps(run, other)
    first, second = (
        [point for point in each.curve(LOSS).items() if point[0] <= end] for each in (run, other)
    )
    return first == second


def _is_invariant(attribute: str, results: Results) -> Finding:
    """Without epsilon only rounding is left."""
    tiny, usual = invariance.EPSILONS
    measured, holds = [], True
    for dtype in invariance.DTYPES:
        worst = invariance.worst(attribute, epsilon=tiny, dtype=dtype)
        holds &= worst <= ROUNDING[dtype]
        measured.append(f"{worst:.0e} in {dtype}")
    small, large = (
        invariance.worst(attribute, epsilon=usual, factor=factor)
        for factor in (min(invariance.FACTORS), max(invariance.FACTORS))
    )
    text = (
        f"a from {min(invariance.FACTORS):g} to {max(invariance.FACTORS):g}: off by"
        f" {' and '.join(measured)} at most; with epsilon {usual:g} by {small:.0%} at the smallest"
        f" a and {large:.1%} at the largest"
    )
    return Finding(text, HOLDS if holds else FAILS)


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
        "With BN, rates 5 and 30 times Inception's can be trained with",
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
    Claim("ours", "It does none to BN-x30, either", partial(_is_no_worse, X30, X30_DECAY)),
    Claim(
        "ours",
        "Nor does it to BN-x5-Sigmoid",
        partial(_is_no_worse, X5_SIGMOID, X5_SIGMOID_DECAY),
    ),
    Claim("4.2.1", "Local response normalization is not needed", partial(_does_no_harm, "lrn")),
    Claim("4.2.1", "Shuffling within shards improves the accuracy", partial(_helps, "shuffling")),
    Claim("4.2.1", "Weaker distortions do no harm", partial(_does_no_harm, "distortions")),
    Claim("4.2.2", "Inception diverges at 5 times its rate", partial(_diverges, INCEPTION_X5)),
    Claim(
        "ours", "At 30 times its rate Inception diverges, too", partial(_diverges, INCEPTION_X30)
    ),
    Claim("4.2.2", "Inception with sigmoids stays at chance", partial(_stays_at_chance, SIGMOID)),
    Claim(
        "ours", "At 5 times its rate it stays at chance, too", partial(_stays_at_chance, SIGMOID_X5)
    ),
    Claim("4.2.2", "With BN, a network of sigmoids trains", partial(_trains, (X5_SIGMOID,))),
)


# --- What stands around the table.


def _tell_rules(results: Results) -> str:
    seeds = len(results.get(X5, ()))
    rules = [
        "*Ours* in place of a section: a control that the paper doesn't have.",
        "An accuracy is the best of the evaluations up to the step that is named, the last of the"
        " shorter run; a shorter run is, step for step, the first part of what a longer one would"
        f" be. Of the seeds, the five networks have {seeds}, the other runs one: of several it is"
        " the mean, with the lowest and the highest in brackets.",
        "One network is better than another if each of its seeds is better than each of the"
        " other's, by more than the margin; a run that diverged is worse than any that did not."
        " The margin is the wider of the two networks' spreads over their seeds, and at least the"
        " standard error of an accuracy. Between networks that are alike, three seeds of the one"
        " and one of the other, this finds a difference in up to one of seven comparisons: a"
        " single line that is just beyond its margin says little.",
        f"*{WITHIN_SPREAD.capitalize()}*: the difference is within the margin.",
        f"*{UNDECIDED.capitalize()}*: there is one seed of each, or what stands below.",
        "A change does no harm unless the network is better with it taken back; harm that is less"
        " than the margin isn't seen.",
        f"*At chance*: below {CHANCE_FACTOR:g} times the accuracy of guessing. *Diverges*: the loss"
        " or a weight is no longer finite, which ends the run. *Trains*: no seed does either.",
        "The scale of the initial weights: how far a network's highest accuracy is from its lowest,"
        " over all factors. Inception and BN-Baseline have the same rate and differ in BN alone;"
        " the difference of the two ranges has to be more than their margin.",
        "Moving averages can stand in if the accuracy with them is within one standard error of"
        " that with population statistics.",
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
        "What is known of these runs and may have to do with it; it isn't shown to be the cause.",
        "\n".join(notes),
    ]


# --- The plots.


class _Plot(NamedTuple):
    """A plot, what it shows in words, and how to read it."""

    shows: str
    key: str
    figure: Figure


def _draw_plots(results: Results) -> dict[str, _Plot]:
    """Gives what there is to be drawn, by file name."""
    drawn = {}
    for name, draw in (
        ("claims_initialization.png", _draw_sweep),
        ("claims_ablations.png", _draw_ablations),
    ):
        try:
            drawn[name] = draw(results)
        except NotRunError:
            continue
    return drawn


def _draw_sweep(results: Results) -> _Plot:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for title, marker in ((INCEPTION, "o"), (BASELINE, "s")):
        sweep = _sweep(results, title)
        means = [spread.mean for spread in sweep.values()]
        bars = [
            [spread.mean - spread.low for spread in sweep.values()],
            [spread.high - spread.mean for spread in sweep.values()],
        ]
        style = STYLES[title] | {"marker": marker, "label": title}
        axes.errorbar(list(sweep), means, bars, capsize=3, **style)
    factors = sorted((*SCALES, 1.0))
    axes.set(xscale="log", xlabel="factor on the initial weights", ylim=(0, None))
    axes.set_ylabel(f"accuracy by step {_sweep_steps(results, INCEPTION):,}")
    axes.xaxis.set_major_locator(FixedLocator(factors))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lighten(axes)
    axes.legend(loc="best")
    shows = (
        "Validation accuracy of Inception and BN-Baseline against the factor on the initial weights"
    )
    key = "At 1 it is the mean of the seeds and their spread, elsewhere one run; one at 0 diverged"
    return _Plot(shows, key, figure)


def _draw_ablations(results: Results) -> _Plot:
    titles = [title for title in ABLATIONS.values() if results.get(title)]
    if not titles:
        raise NotRunError("no ablations")
    networks = [ended_runs(results, title) for title in (X5, *titles)]
    groups = [Group.of(runs, common_steps(*runs)) for runs in networks]
    figure = Figure(figsize=(6.4, 0.9 + 0.36 * len(groups)), layout="constrained")
    axes = figure.subplots()
    blue = STYLES[X5]["color"]
    low, high = min(groups[0].accuracies), max(groups[0].accuracies)
    axes.axvspan(low, high, color=blue, alpha=0.2, linewidth=0)
    margin = margin_of(groups)
    if margin is not None:
        for edge in (low - margin, high + margin):
            axes.axvline(edge, color=blue, linestyle=(0, (4, 3)), linewidth=1)
    for place, group in enumerate(groups):
        for accuracy in group.accuracies:
            marker = "o" if accuracy else "x"
            axes.plot(accuracy, place, marker, color=blue if place == 0 else "black")
    axes.set_yticks(range(len(groups)), [group.title for group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("best validation accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    lighten(axes)
    shows = "Validation accuracy of BN-x5, and of BN-x5 with one change of section 4.2.1 taken back"
    key = (
        "A point is a run; BN-x5's span the band, and the dashes are the margin away from it; a"
        " cross at 0 diverged"
    )
    return _Plot(shows, key, figure)
