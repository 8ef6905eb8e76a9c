"""The paper's claims that runs can test, each with the measurement and a verdict."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bn_keras.experiments.titles import (
    ABLATIONS,
    BASELINE,
    CONTROL,
    INCEPTION,
    INCEPTION_X5,
    INCEPTION_X30,
    LONG_MEMORY,
    POPULATION,
    SIGMOID,
    SIGMOID_X5,
    WEIGHT_FACTORS,
    X5,
    X5_AT_RATE_1,
    X5_SIGMOID,
    X30,
    X30_AT_HALF,
    with_weight_factor,
)
from bn_keras.report import published, scale_invariance
from bn_keras.report.figure_2 import describe_setup
from bn_keras.report.longer_inception import build_longer_inception, select_with_longer_inception
from bn_keras.report.margins import (
    Difference,
    Group,
    NotRunError,
    accuracy_at,
    best_accuracy_by,
    common_steps,
    compare,
    ended_runs,
    format_points,
    reaches_sooner,
    seed_variation,
)
from bn_keras.report.plots import (
    FIGURE_WIDTH,
    STYLES,
    format_percent,
    replace_frame_by_grid,
    scale_logarithmically,
)
from bn_keras.report.sections import Section, escape, join_words, markdown_table
from bn_keras.report.verdicts import (
    FAILS,
    HOLDS,
    NO_VERDICT,
    NOT_RUN,
    TOO_CLOSE,
    count_verdicts,
    judge,
)
from bn_keras.runs.history import LOSS, Results, Run, Spread
from bn_keras.runs.metrics_log import ACCURACY
from bn_keras.text import counted

# An accuracy below this multiple of the accuracy of guessing is at chance.
CHANCE_FACTOR = 1.5
# A network that is worse by less than this is not counted as worse.
TOLERANCE = 0.01
# Section of a claim that the paper does not make.
OURS = "ours"
# Largest relative deviation that rounding explains.
ROUNDING = {"float64": 1e-12, "float32": 1e-4}


class Judgement(NamedTuple):
    """Result of testing a claim.

    Attributes:
      measured: the measurement, Markdown, on one line.
      verdict: one of the verdicts in verdicts.py.
      note: facts about the runs that may explain why the claim does not hold; Markdown.
    """

    measured: str
    verdict: str
    note: str = ""


class Claim(NamedTuple):
    """A claim that runs can test.

    Attributes:
      section: section of the paper, "(implied)" if it makes the change without stating its effect;
        OURS for a control that the paper does not have.
      sentence: the claim in our words.
      test: function from the runs to the judgement; raises NotRunError if a run is missing.
    """

    section: str
    sentence: str
    test: Callable[[Results], Judgement]


def build_claims(results: Results) -> Section:
    """Tests the paper's claims on runs, and that of scale invariance on the layer itself.

    Args:
      results: runs of the five networks and of bn_keras/experiments/claim_runs.py. A claim whose
        runs are missing or unfinished is listed below the table of the others.
    """
    judgements = {claim: check_claim(claim, results) for claim in CLAIMS}
    rows = [
        (claim.section, claim.sentence, judgement.measured, f"**{judgement.verdict}**")
        for claim, judgement in judgements.items()
        if judgement.verdict != NOT_RUN
    ]
    plots = _draw_plots(results)
    longer = _compare_with_longer_inception(results)
    body = [
        *_describe_training(results),
        markdown_table(("section", "claim", "measured", "verdict"), rows, left=4),
        *_list_untested(judgements),
        *(f"![{p.description}]({name})\n\n{p.description}. {p.key}" for name, p in plots.items()),
        *_tabulate_ablations(results),
        *(f"### {section.title}\n\n{section.body}" for section in longer),
        "### Rules for the verdicts",
        _list_rules(results),
        *_list_notes(judgements),
        "### Scale invariance of BN",
        *scale_invariance.describe_deviations(),
    ]
    figures = {name: plot.figure for name, plot in plots.items()}
    for section in longer:
        figures |= section.plots
    return Section(
        "The paper's claims, one by one",
        "\n\n".join(body),
        figures,
        " ".join((_count_verdicts(judgements), *(section.summary for section in longer))),
    )


def check_claim(claim: Claim, results: Results) -> Judgement:
    """Tests one claim; the verdict is NOT_RUN if a run is missing."""
    try:
        return claim.test(results)
    except NotRunError as error:
        return Judgement(str(error), NOT_RUN)


def _count_verdicts(judgements: Mapping[Claim, Judgement]) -> str:
    """Counts the verdicts on the paper's claims, those of them on the layer alone, and controls."""
    kinds: dict[str, list[str]] = {
        "of the paper about training": [],
        "about scale invariance, tested on the layer": [],
        "in control experiments of ours": [],
    }
    about_training, about_layer, ours = kinds.values()
    for claim, judgement in judgements.items():
        kind = ours if claim.section == OURS else about_training
        (about_layer if claim in _ABOUT_THE_LAYER else kind).append(judgement.verdict)
    return " ".join(
        f"Of {counted(len(verdicts), 'claim')} {kind}, {count_verdicts(verdicts)}."
        for kind, verdicts in kinds.items()
    )


def _compare_with_longer_inception(results: Results) -> list[Section]:
    """Returns the section on Inception's longer run; none without that run."""
    try:
        return [build_longer_inception(select_with_longer_inception(results))]
    except NotRunError:
        return []


# --- Tests of whether networks train.


def _chance(run: Run) -> float:
    if not run.num_classes:
        raise NotRunError(f"{escape(run.title)}: the number of classes is unknown")
    return 1 / run.num_classes


def _is_at_chance(run: Run) -> bool:
    return run.best_accuracy < CHANCE_FACTOR * _chance(run)


def _fails_to_train(run: Run) -> bool:
    return run.diverged_at is not None or _is_at_chance(run)


def _describe_outcomes(runs: Sequence[Run]) -> str:
    """Describes how each seed of a network ended."""

    def describe(run: Run) -> str:
        if run.diverged_at is not None:
            return f"diverged at step {run.diverged_at:,}"
        return f"{run.best_accuracy:.1%}{' (at chance)' if _is_at_chance(run) else ''}"

    return f"{escape(runs[0].title)}: {', '.join(map(describe, runs))}"


def _diverges(title: str, results: Results) -> Judgement:
    """Tests whether every seed diverges."""
    runs = ended_runs(results, title)
    note = _describe_rate(runs[0])
    if all(_fails_to_train(run) for run in runs):
        note += f" The loss stays finite for {common_steps(*runs):,} steps, but nothing is learned."
    verdict = HOLDS if all(run.diverged_at is not None for run in runs) else FAILS
    return Judgement(_describe_outcomes(runs), verdict, note)


def _stays_at_chance(title: str, results: Results) -> Judgement:
    """Tests whether no seed exceeds chance, even if it diverges later."""
    runs = ended_runs(results, title)
    note = f"The paper has 1,000 classes, so chance is 0.1%; here it is {_chance(runs[0]):.1%}."
    verdict = HOLDS if all(map(_is_at_chance, runs)) else FAILS
    return Judgement(_describe_outcomes(runs), verdict, note)


def _trains(titles: Sequence[str], results: Results) -> Judgement:
    """Tests whether no seed diverges or stays at chance."""
    networks = [ended_runs(results, title) for title in titles]
    fails = any(_fails_to_train(run) for runs in networks for run in runs)
    return Judgement("; ".join(map(_describe_outcomes, networks)), FAILS if fails else HOLDS)


# --- Tests of which network is better.


def _is_better(title: str, other: str, results: Results) -> Judgement:
    difference = compare(results, title, other)
    return Judgement(difference.measured, difference.verdict, difference.resolution)


def _is_too_high(title: str, results: Results) -> Judgement:
    """Tests whether Inception is better at its own learning rate.

    A network that trains is better than one that does not, whatever the margin.
    """
    found = _is_better(INCEPTION, title, results)
    runs = ended_runs(results, title)
    found = found._replace(note=f"{_describe_rate(runs[0])} {found.note}")
    step = common_steps(*runs)
    trains = all(
        best_accuracy_by(run, step) >= CHANCE_FACTOR * _chance(run) for run in results[INCEPTION]
    )
    if trains and all(map(_fails_to_train, runs)):
        return found._replace(verdict=HOLDS)
    return found


def _outpaces_longer_inception(results: Results) -> Judgement:
    """Tests whether BN-x5 reaches the longer run's best accuracy in fewer steps."""
    networks = select_with_longer_inception(results)
    longer, runs = networks.results[INCEPTION][0], ended_runs(results, X5)
    first, second = map(networks.steps_to_target, (INCEPTION, X5))
    if first is None:
        raise NotRunError(f"{escape(longer.title)}: no evaluation")
    measured = (
        f"Inception is best at step {first:,} of {longer.config.train.steps:,},"
        f" {networks.target:.1%}; BN-x5"
        f" {'never reaches this' if second is None else f'reaches this at step {second:,}'}"
    )
    outcomes = [reaches_sooner(run, longer, networks.target) for run in runs]
    return Judgement(measured, judge(outcomes))


def _is_not_worse(title: str, other: str, results: Results) -> Judgement:
    difference = compare(results, title, other)
    verdict = difference.verdict_not_worse(TOLERANCE)
    return Judgement(difference.measured, verdict, difference.resolution)


def _helps(change: str, results: Results) -> Judgement:
    """Tests whether BN-x5 is better than without the change."""
    return _with_note(change, results, _is_better(X5, ABLATIONS[change], results))


def _does_not_hurt(change: str, results: Results) -> Judgement:
    """Tests whether BN-x5 is not worse than without the change."""
    return _with_note(change, results, _is_not_worse(X5, ABLATIONS[change], results))


def _with_note(change: str, results: Results, found: Judgement) -> Judgement:
    return found._replace(note=f"{_describe_change(change, results)}{found.note}")


# --- Notes on the runs.


def _describe_rate(run: Run) -> str:
    return (
        f"The learning rate of this run is {run.config.schedule.base_rate:g}; the paper's Inception"
        f" has {published.INCEPTION_RATE:g}."
    )


def _describe_change(change: str, results: Results) -> str:
    """Returns the note on a change, ending in a space; empty without one, or if a run diverged."""
    runs, other = ended_runs(results, X5), ended_runs(results, ABLATIONS[change])[0]
    if change not in _CHANGE_NOTES or any(r.diverged_at is not None for r in (*runs, other)):
        return ""
    return _CHANGE_NOTES[change](runs, other)


def _note_length(runs: Sequence[Run], other: Run) -> str:
    run = runs[0]
    if not run.num_train_examples:
        return ""
    examples = run.config.train.steps * run.config.train.global_batch_size
    return f"The runs last {examples / run.num_train_examples:.1f} epochs. "


def _note_decay(runs: Sequence[Run], other: Run) -> str:
    own, others = (f"{_remaining_rate(run):.2g}" for run in (runs[0], other))
    return (
        f"At the end, the learning rate is {own} times its initial value in BN-x5 and"
        f" {others} times in the run with Inception's decay. "
    )


def _note_shuffling(runs: Sequence[Run], other: Run) -> str:
    return f"{_note_length(runs, other)}The paper reports a gain of about 1 point. "


def _note_distortions(runs: Sequence[Run], other: Run) -> str:
    before, after = (run.config.data.distortion for run in (other, runs[0]))
    return (
        f"{_note_length(runs, other)}The strength of the distortions is {after:g} in BN-x5 and"
        f" {before:g} in the other run. "
    )


# Functions that write the note on a change, by change. Their arguments are the runs of BN-x5, and
# the run with the change undone.
_CHANGE_NOTES: Mapping[str, Callable[[Sequence[Run], Run], str]] = {
    "dropout": _note_length,
    "l2": _note_length,
    "decay": _note_decay,
    "shuffling": _note_shuffling,
    "distortions": _note_distortions,
}


def _remaining_rate(run: Run) -> float:
    rates = list(run.curve("train/learning_rate").values())
    return rates[-1] / rates[0]


# --- Initial weights.


def _tolerates_initial_weights(results: Results) -> Judgement:
    """Tests whether the factor on the initial weights affects BN-Baseline less than Inception."""
    networks = (INCEPTION, BASELINE)
    means = {title: [s.mean for s in _sweep(results, title).values()] for title in networks}
    step = _sweep_steps(results, INCEPTION)
    measured = f"by step {step:,}, factors {min(WEIGHT_FACTORS):g} to {max(WEIGHT_FACTORS):g}: "
    measured += ", ".join(
        f"{title} {min(values):.1%} to {max(values):.1%}" for title, values in means.items()
    )
    runs = {title: ended_runs(results, title) for title in networks}
    if max(means[INCEPTION]) < CHANCE_FACTOR * _chance(runs[INCEPTION][0]):
        note = "With every factor, Inception is still at chance at this step."
        return Judgement(measured, NO_VERDICT, note)
    inception_range, baseline_range = (max(values) - min(values) for values in means.values())
    variation = seed_variation(results, step, *(Group.of(seeds, step) for seeds in runs.values()))
    # The difference of two ranges consists of four accuracies, at most factors of single runs.
    margin = variation.margin(1, 1, 1, 1)
    difference = Difference(measured, inception_range - baseline_range, margin)
    return Judgement(difference.measured, difference.verdict, difference.resolution)


def _sweep(results: Results, title: str) -> dict[float, Spread]:
    """Returns the best accuracy by the end of the short runs, by factor on the initial weights."""
    step = _sweep_steps(results, title)
    runs = {
        factor: ended_runs(results, with_weight_factor(title, factor)) for factor in WEIGHT_FACTORS
    }
    runs[1.0] = ended_runs(results, title)
    return {
        factor: Spread.of(best_accuracy_by(run, step) for run in runs[factor])
        for factor in sorted(runs)
    }


def _sweep_steps(results: Results, title: str) -> int:
    titles = [with_weight_factor(title, factor) for factor in WEIGHT_FACTORS]
    return common_steps(*(run for each in titles for run in ended_runs(results, each)))


# --- Moving averages.


def _moving_averages_track(results: Results) -> Judgement:
    """Tests whether moving averages give about the accuracy of population statistics.

    Both are evaluated with the same weights and images, so seeds need no margin.
    """
    population = ended_runs(results, POPULATION)[0]
    moving = [run for run in ended_runs(results, X5) if run.config.seed == population.config.seed]
    if not moving:
        raise NotRunError(f"{X5}: no run of seed {population.config.seed}")
    # On ImageNet, BN-x5 itself has the long memory, so there is no separate run.
    others = [*moving, *(ended_runs(results, LONG_MEMORY) if results.get(LONG_MEMORY) else ())]
    expected = population.curve(ACCURACY)
    if not expected:
        raise NotRunError(f"{escape(population.title)}: no evaluation")
    gaps = [
        [abs(accuracy_at(run, step) - accuracy) for step, accuracy in expected.items()]
        for run in others
    ]
    measured = [
        f"{_name_moving_averages(run)} differ by up to {format_points(max(gap))}"
        f" ({100 * statistics.mean(gap):.1f} on average)"
        for run, gap in zip(others, gaps, strict=True)
    ]
    text = (
        f"BN-x5, compared with population statistics of {population.config.population.num_batches}"
        f" batches in {counted(len(expected), 'evaluation')} by step {max(expected):,}:"
        f" {join_words(measured)}"
    )
    if not all(_is_same_training(run, population) for run in others):
        text += "; not with the same weights, since the training losses differ"
    step, gap = max(zip(expected, gaps[0], strict=True), key=lambda item: item[1])
    note = (
        f"The difference is largest at step {step:,}: {accuracy_at(moving[0], step):.1%} with"
        f" {_name_moving_averages(moving[0])}, and {expected[step]:.1%} with population statistics."
        f" At step {max(expected):,}, the learning rate is still {_remaining_rate(population):.2g}"
        " times its initial value."
    )
    return Judgement(text, HOLDS if gap <= TOLERANCE else FAILS, note)


def _name_moving_averages(run: Run) -> str:
    momentum = run.config.batch_norm.momentum
    return f"moving averages of momentum {momentum:g} (about {1 / (1 - momentum):,.0f} steps)"


def _is_same_training(run: Run, other: Run) -> bool:
    """Returns whether the training losses are equal up to the end of the shorter run."""
    end = common_steps(run, other)
    first, second = (
        [point for point in each.curve(LOSS).items() if point[0] <= end] for each in (run, other)
    )
    return first == second


# --- Scale invariance.


def _is_invariant(part: str, results: Results) -> Judgement:
    """Tests whether only rounding errors remain with a negligible epsilon."""
    tiny, default = scale_invariance.EPSILONS
    factors = min(scale_invariance.FACTORS), max(scale_invariance.FACTORS)
    largest = {
        dtype: scale_invariance.largest_deviation(part, epsilon=tiny, dtype=dtype)
        for dtype in scale_invariance.DTYPES
    }
    at_smallest, at_largest = (
        scale_invariance.largest_deviation(part, epsilon=default, factor=factor)
        for factor in factors
    )
    measured = " and ".join(f"{deviation:.0e} in {dtype}" for dtype, deviation in largest.items())
    text = (
        f"a from {factors[0]:g} to {factors[1]:g}: largest deviation {measured}; with epsilon"
        f" {default:g}, {at_smallest:.0%} at the smallest a and {at_largest:.1%} at the largest"
    )
    holds = all(deviation <= ROUNDING[dtype] for dtype, deviation in largest.items())
    return Judgement(text, HOLDS if holds else FAILS)


# --- Claims.

# Scale invariance, tested without a run.
_ABOUT_THE_LAYER = (
    Claim("3.3", "Except for epsilon, BN((aW)u) = BN(Wu)", partial(_is_invariant, "output")),
    Claim(
        "3.3",
        "Except for epsilon, the gradient with respect to u does not depend on a",
        partial(_is_invariant, "to_input"),
    ),
    Claim(
        "3.3",
        "Except for epsilon, the gradient with respect to aW is 1/a times that with respect to W",
        partial(_is_invariant, "to_weights"),
    ),
)

CLAIMS = (
    Claim("3.1", "Moving averages track the accuracy during training", _moving_averages_track),
    *_ABOUT_THE_LAYER,
    Claim(
        "3.3",
        "With BN, networks train at 5 and 30 times Inception's learning rate",
        partial(_trains, (X5, X30)),
    ),
    Claim(
        "3.3",
        "Without BN, a learning rate of 5 times Inception's lowers the accuracy",
        partial(_is_too_high, INCEPTION_X5),
    ),
    Claim(
        "1",
        "With BN, the accuracy depends less on the scale of the initial weights",
        _tolerates_initial_weights,
    ),
    Claim(
        "4.2.1",
        "Adding BN alone does not take full advantage of the method: with the other changes, BN-x5"
        " is more accurate than BN-Baseline",
        partial(_is_better, X5, BASELINE),
    ),
    Claim(
        OURS,
        "Inception with the same changes, at its own learning rate, is less accurate than BN-x5",
        partial(_is_better, X5, CONTROL),
    ),
    Claim(
        "4.2.2",
        "BN-x5 reaches Inception's best accuracy in fewer steps, even if Inception trains as long"
        " as in the paper",
        _outpaces_longer_inception,
    ),
    Claim(
        "4.2.1",
        "With BN, a higher learning rate speeds up training",
        partial(_is_better, X5, X5_AT_RATE_1),
    ),
    Claim(
        OURS,
        "BN-x30's learning rate is not too high: at half of it, BN-x30 is not more accurate",
        partial(_is_not_worse, X30, X30_AT_HALF),
    ),
    Claim(
        "4.2.1",
        "Removing dropout makes BN-x5 more accurate after the same number of steps",
        partial(_helps, "dropout"),
    ),
    Claim("4.2.1", "Dividing the L2 weight by 5 improves the accuracy", partial(_helps, "l2")),
    Claim(
        "4.2.1 (implied)",
        "Decaying the learning rate 6 times faster does not hurt BN-x5",
        partial(_does_not_hurt, "decay"),
    ),
    Claim("4.2.1", "Local response normalization is not needed", partial(_does_not_hurt, "lrn")),
    Claim("4.2.1", "Within-shard shuffling improves the accuracy", partial(_helps, "shuffling")),
    Claim(
        "4.2.1 (implied)",
        "Weaker distortions do not hurt",
        partial(_does_not_hurt, "distortions"),
    ),
    Claim(
        "4.2.2",
        "Inception diverges at 5 times its learning rate",
        partial(_diverges, INCEPTION_X5),
    ),
    Claim(
        OURS,
        "Inception also diverges at 30 times its learning rate",
        partial(_diverges, INCEPTION_X30),
    ),
    Claim("4.2.2", "Inception with sigmoids stays at chance", partial(_stays_at_chance, SIGMOID)),
    Claim(
        OURS,
        "Inception with sigmoids also stays at chance at 5 times its learning rate",
        partial(_stays_at_chance, SIGMOID_X5),
    ),
    Claim("4.2.2", "With BN, a network with sigmoids trains", partial(_trains, (X5_SIGMOID,))),
)


# --- Training, rules and notes.


def _describe_training(results: Results) -> list[str]:
    """Returns a paragraph on data, networks and training; none without Inception and BN-x5."""
    run = next((results[title][0] for title in (INCEPTION, X5) if results.get(title)), None)
    return [] if run is None else [describe_setup(run)]


def _tabulate_ablations(results: Results) -> list[str]:
    """Returns a table of BN-x5 and its ablations, explained; none without ablations."""
    titles = [title for title in ABLATIONS.values() if results.get(title)]
    networks = [results.get(title, ()) for title in (X5, *titles)]
    if not titles or not all(run.curve(ACCURACY) for runs in networks for run in runs):
        return []
    rows = [
        (
            escape(runs[0].title),
            f"{Spread.of(run.best_accuracy for run in runs):.2%}",
            f"{Spread.of(list(run.curve(ACCURACY).values())[-1] for run in runs):.2%}",
            f"{Spread.of(map(_last_training_accuracy, runs)):.2%}",
        )
        for runs in networks
        if runs
    ]
    header = ("network", "best accuracy", "last accuracy", "last training accuracy")
    key = (
        "*Best accuracy*: the highest of all evaluations. It is selected on the validation images,"
        " as in the paper, which favours networks whose accuracy fluctuates. *Last training"
        " accuracy*: on the augmented training images between the last two evaluations, with"
        " dropout if the network has it."
    )
    return [markdown_table(header, rows), key]


def _last_training_accuracy(run: Run) -> float:
    """Returns the mean training accuracy between the last two evaluations."""
    *_, before, _ = (0, *run.curve(ACCURACY))
    values = [value for step, value in run.curve("train/accuracy").items() if step > before]
    return statistics.mean(values)


def _list_rules(results: Results) -> str:
    rules = [
        f"*{OURS.capitalize()}* in the section column marks a control experiment that the paper"
        " does not have. *Implied*: the paper makes the change without stating its effect.",
        "Accuracies are the best validation accuracies up to the stated step, the last step of the"
        " shorter run. A run that is planned shorter has the same schedule, so it equals the"
        f" beginning of a full run with the same settings. {_describe_seeds(results)}A point is a"
        " percentage point.",
        "One network is better than another if its mean accuracy is higher by more than the margin:"
        " half the width of the 95% confidence interval of the difference, due to the seeds"
        " (Student's t distribution) or to the number of validation images, whichever is wider. The"
        " standard deviation between seeds is taken to be equal for all networks, and is estimated"
        f" from those with several seeds. {_describe_variation(results)}A diverged run counts as"
        " 0%.",
        "If all networks do vary equally, the rule finds a difference between equally good ones in"
        " at most one of twenty comparisons. The comparisons are not independent: they share the"
        " runs of BN-x5 and the estimate of the variation. If that is too low, several are wrong"
        " together.",
        f"*{TOO_CLOSE.capitalize()}*: the difference is within the margin.",
        f"*{NO_VERDICT.capitalize()}*: no network has a second seed, or the notes below give"
        " another reason.",
        f"*Does not hurt*, *is not more accurate*: holds if the interval excludes a loss of"
        f" {format_points(TOLERANCE)} or more, the gain that the paper reports for shuffling; a"
        " smaller loss may remain. Does not hold if the network is worse by more than the margin"
        " and the interval includes such a loss.",
        "*Shuffling*: data in memory are a single shard, so a run that shuffles by shards only sees"
        " the examples in the same order in every epoch. The paper compares two ways of shuffling.",
        f"*At chance*: an accuracy below {CHANCE_FACTOR:g} times that of guessing. *Diverges*: the"
        " loss or a weight becomes non-finite, which ends the run. *Trains*: no seed diverges or"
        " stays at chance. A network that trains is better than one that does not.",
        "Dependence on the scale of the initial weights: a network's highest minus its lowest"
        " accuracy over all factors. Inception and BN-Baseline have the same learning rate and"
        " differ in BN alone; their ranges must differ by more than the margin of four single"
        " accuracies.",
        "Moving averages track the accuracy if, at every evaluation, they and population statistics"
        f" give the same weights accuracies that differ by at most {format_points(TOLERANCE)}. The"
        " momentum of BN-x5 counts.",
    ]
    return "\n".join(f"- {rule}" for rule in rules)


def _describe_seeds(results: Results) -> str:
    """Returns a sentence on the networks with several seeds; empty if there are none."""
    several = [
        f"{escape(title)} has {len(runs)} seeds" for title, runs in results.items() if len(runs) > 1
    ]
    if not several:
        return ""
    return f"{join_words(several)}, shown as mean (lowest to highest); the others have one. "


def _describe_variation(results: Results) -> str:
    """Returns sentences on the standard deviation between seeds, by step; empty if unknown."""
    runs = [run for title in results for run in results[title]]
    parts = []
    for step in sorted({run.config.train.steps for run in runs}, reverse=True):
        variation = seed_variation(results, step)
        if not variation.degrees_of_freedom:
            continue
        low, high = variation.stddev_interval
        parts.append(
            f"By step {step:,} it is {format_points(variation.stddev, 2)}, with"
            f" {counted(variation.degrees_of_freedom, 'degree')} of freedom (95% interval:"
            f" {100 * low:.2f} to {format_points(high, 2)}; t = {variation.quantile:.1f}). "
        )
    return "".join(parts)


def _list_untested(judgements: Mapping[Claim, Judgement]) -> list[str]:
    claims = [
        f"- {claim.sentence} ({judgement.measured})"
        for claim, judgement in judgements.items()
        if judgement.verdict == NOT_RUN
    ]
    if not claims:
        return []
    reason = "a run is missing or unfinished, or this scale does not have the change"
    return [f"{NOT_RUN.capitalize()}, because {reason}:", "\n".join(claims)]


def _list_notes(judgements: Mapping[Claim, Judgement]) -> list[str]:
    notes = [
        f"- *{claim.sentence}* ({judgement.verdict}): {judgement.note.strip()}"
        for claim, judgement in judgements.items()
        if judgement.verdict not in (HOLDS, NOT_RUN) and judgement.note.strip()
    ]
    if not notes:
        return []
    return [
        "### Claims that do not hold or are undecided",
        "These facts about the runs may explain the verdicts. Whether they do was not tested.",
        "\n".join(notes),
    ]


# --- Plots.


class _Plot(NamedTuple):
    """A plot with its caption.

    Attributes:
      description: content of the plot, without a full stop.
      key: sentences that explain its marks.
      figure: the plot.
    """

    description: str
    key: str
    figure: Figure


def _draw_plots(results: Results) -> dict[str, _Plot]:
    """Draws the plots for which there are runs; returns them by file name."""
    plots = {}
    for name, draw in (
        ("claims_initialization.svg", _draw_sweep),
        ("claims_ablations.svg", _draw_ablations),
    ):
        try:
            plots[name] = draw(results)
        except NotRunError:
            continue
    return plots


def _draw_sweep(results: Results) -> _Plot:
    figure = Figure(figsize=(FIGURE_WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for title, marker in ((INCEPTION, "o"), (BASELINE, "s")):
        sweep = _sweep(results, title)
        means = [spread.mean for spread in sweep.values()]
        bars = [
            [spread.mean - spread.low for spread in sweep.values()],
            [spread.high - spread.mean for spread in sweep.values()],
        ]
        style = STYLES[title]._asdict()
        axes.errorbar(list(sweep), means, bars, capsize=3, marker=marker, label=title, **style)
    factors = sorted((*WEIGHT_FACTORS, 1.0))
    axes.set(xlabel="factor on the initial weights", ylim=(0, None))
    axes.set_ylabel(f"accuracy by step {_sweep_steps(results, INCEPTION):,}")
    scale_logarithmically(axes, factors)
    format_percent(axes.yaxis)
    replace_frame_by_grid(axes)
    axes.legend(loc="best")
    description = (
        "Validation accuracy of Inception and BN-Baseline against the factor on the initial weights"
    )
    key = (
        "The points at factor 1 are means over seeds with their ranges; all others are single runs."
        " A point at 0 is a diverged run."
    )
    return _Plot(description, key, figure)


def _draw_ablations(results: Results) -> _Plot:
    titles = [title for title in ABLATIONS.values() if results.get(title)]
    if not titles:
        raise NotRunError("no ablations")
    networks = [ended_runs(results, title) for title in (X5, *titles)]
    groups = [Group.of(runs, common_steps(*runs)) for runs in networks]
    figure = Figure(figsize=(FIGURE_WIDTH, 0.9 + 0.36 * len(groups)), layout="constrained")
    axes = figure.subplots()
    color = STYLES[X5].color
    step = common_steps(*(run for runs in networks for run in runs))
    margin = seed_variation(results, step, *groups).margin(len(groups[0].accuracies), 1)
    axes.axvline(groups[0].mean, color=color, linewidth=1)
    if margin is not None:
        edges = groups[0].mean - margin, groups[0].mean + margin
        axes.axvspan(*edges, color=color, alpha=0.2, linewidth=0)
    for row, group in enumerate(groups):
        for accuracy in group.accuracies:
            marker = "o" if accuracy else "x"
            axes.plot(accuracy, row, marker, color=color if row == 0 else "black")
    axes.set_yticks(range(len(groups)), [group.title for group in groups])
    # The first network at the top.
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("best validation accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    format_percent(axes.xaxis)
    replace_frame_by_grid(axes)
    description = (
        "Validation accuracy of BN-x5, and of BN-x5 with one change of section 4.2.1 undone"
    )
    key = (
        "Each point is a run. The line is the mean of BN-x5. The band extends by one margin to"
        " either side; a network outside it differs from BN-x5. A cross at 0 is a diverged run."
    )
    return _Plot(description, key, figure)
