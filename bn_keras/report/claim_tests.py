"""Tests of the paper's claims on runs: each returns the measurement and a verdict."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bn_keras.experiments.titles import (
    ABLATIONS,
    BASELINE,
    INCEPTION,
    LONG_MEMORY,
    POPULATION,
    WEIGHT_FACTORS,
    X5,
    with_weight_factor,
)
from bn_keras.models.bn_inception import VARIANTS
from bn_keras.report import published, scale_invariance
from bn_keras.report.longer_inception import select_with_longer_inception
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
from bn_keras.report.sections import escape, join_words
from bn_keras.report.verdicts import (
    FAILS,
    HOLDS,
    NO_VERDICT,
    judge,
)
from bn_keras.runs.history import LOSS, Results, Run, Spread
from bn_keras.runs.metrics_log import ACCURACY
from bn_keras.text import counted

# An accuracy below this multiple of the accuracy of guessing is at chance.
CHANCE_FACTOR = 1.5
# A network that is worse by less than this is not counted as worse.
TOLERANCE = 0.01
# Networks with BN are not compared at a step at which one has a learning rate of more than this
# multiple of the other's, relative to their initial ones.
MAX_RATE_RATIO = 10
# Largest relative deviation that rounding explains.
ROUNDING = {"float64": 1e-12, "float32": 1e-4}


class Judgement(NamedTuple):
    """Result of testing a claim.

    Attributes:
      measured: the measurement, Markdown, on one line.
      verdict: one of the verdicts in verdicts.py.
      notes: facts about the runs that may explain why the claim does not hold, in sentences of
        Markdown; empty ones are left out.
    """

    measured: str
    verdict: str
    notes: tuple[str, ...] = ()


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

    length = counted(common_steps(*runs), "step")
    return f"{escape(runs[0].title)}, {length}: {', '.join(map(describe, runs))}"


def diverges(title: str, results: Results) -> Judgement:
    """Tests whether every seed diverges."""
    runs = ended_runs(results, title)
    notes = [_describe_rate(runs[0])]
    if all(_fails_to_train(run) for run in runs):
        steps = common_steps(*runs)
        notes.append(
            f"The loss stays finite for {steps:,} steps, but all evaluations are at chance."
        )
    verdict = HOLDS if all(run.diverged_at is not None for run in runs) else FAILS
    return Judgement(_describe_outcomes(runs), verdict, tuple(notes))


def stays_at_chance(title: str, results: Results) -> Judgement:
    """Tests whether no seed exceeds chance, even if it diverges later."""
    runs = ended_runs(results, title)
    note = f"The paper has 1,000 classes, so chance is 0.1%; here it is {_chance(runs[0]):.1%}."
    verdict = HOLDS if all(map(_is_at_chance, runs)) else FAILS
    return Judgement(_describe_outcomes(runs), verdict, (note,))


def trains(titles: Sequence[str], results: Results) -> Judgement:
    """Tests whether no seed diverges or stays at chance."""
    networks = [ended_runs(results, title) for title in titles]
    fails = any(_fails_to_train(run) for runs in networks for run in runs)
    return Judgement("; ".join(map(_describe_outcomes, networks)), FAILS if fails else HOLDS)


# --- Tests of which network is better.


def is_better(title: str, other: str, results: Results) -> Judgement:
    """Tests whether a network is better than another."""
    difference = compare(results, title, other)
    found = Judgement(difference.measured, difference.verdict, (difference.resolution,))
    return _unless_rates_differ(title, other, results, found)


def is_too_high(title: str, results: Results) -> Judgement:
    """Tests whether Inception is better at its own learning rate.

    A network that trains is better than one that does not, whatever the margin.
    """
    found = is_better(INCEPTION, title, results)
    runs = ended_runs(results, title)
    found = found._replace(notes=(_describe_rate(runs[0]), *found.notes))
    step = common_steps(*runs)
    inception_trains = all(
        best_accuracy_by(run, step) >= CHANCE_FACTOR * _chance(run) for run in results[INCEPTION]
    )
    if inception_trains and all(map(_fails_to_train, runs)):
        return found._replace(verdict=HOLDS)
    return found


def outpaces_longer_inception(results: Results) -> Judgement:
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


def is_not_worse(title: str, other: str, results: Results) -> Judgement:
    """Tests whether a network is worse than another by no more than the tolerance."""
    difference = compare(results, title, other)
    verdict = difference.verdict_not_worse(TOLERANCE)
    found = Judgement(difference.measured, verdict, (difference.resolution,))
    return _unless_rates_differ(title, other, results, found)


def helps(change: str, results: Results) -> Judgement:
    """Tests whether BN-x5 is better than without the change."""
    return _with_notes(change, results, is_better(X5, ABLATIONS[change], results))


def does_not_hurt(change: str, results: Results) -> Judgement:
    """Tests whether BN-x5 is not worse than without the change."""
    return _with_notes(change, results, is_not_worse(X5, ABLATIONS[change], results))


def _unless_rates_differ(title: str, other: str, results: Results, found: Judgement) -> Judgement:
    """Returns a judgement on two networks; without a verdict if one has a much higher rate."""
    runs = [*ended_runs(results, title), *ended_runs(results, other)]
    if not all(_is_converging_with_bn(run) for run in runs):
        return found
    step = common_steps(*runs)
    rates = [_remaining_rate(run, step) for run in runs]
    if max(rates) <= MAX_RATE_RATIO * min(rates):
        return found
    note = (
        "At a high learning rate, moving averages give accuracies that are too low, and accuracies"
        " fluctuate by more than seeds vary, so the accuracies are not comparable."
    )
    return found._replace(verdict=NO_VERDICT, notes=(*found.notes, note))


def _is_converging_with_bn(run: Run) -> bool:
    return VARIANTS[run.config.model.variant].batch_norm and run.diverged_at is None


def _with_notes(change: str, results: Results, found: Judgement) -> Judgement:
    return found._replace(notes=(*_describe_change(change, results), *found.notes))


# --- Notes on the runs.


def _describe_rate(run: Run) -> str:
    return (
        f"The learning rate of this run is {run.config.schedule.base_rate:g}; the paper's Inception"
        f" has {published.INCEPTION_RATE:g}."
    )


def _describe_change(change: str, results: Results) -> Sequence[str]:
    """Returns the notes on a change; none if a run diverged."""
    runs, other = ended_runs(results, X5), ended_runs(results, ABLATIONS[change])[0]
    if change not in _CHANGE_NOTES or any(r.diverged_at is not None for r in (*runs, other)):
        return ()
    return [note(runs[0], other) for note in _CHANGE_NOTES[change]]


def _note_length(run: Run, other: Run) -> str:
    if not run.num_train_examples:
        return ""
    examples = run.config.train.steps * run.config.train.global_batch_size
    return f"The runs last {examples / run.num_train_examples:.1f} epochs."


def _note_decay(run: Run, other: Run) -> str:
    own, others = (f"{_remaining_rate(each):.2g}" for each in (run, other))
    return (
        f"At the end, the learning rate is {own} times its initial value in BN-x5 and"
        f" {others} times in the run with Inception's decay."
    )


def _note_shuffling(run: Run, other: Run) -> str:
    return "The paper reports a gain of about 1 point."


def _note_distortions(run: Run, other: Run) -> str:
    after, before = (each.config.data.distortion for each in (run, other))
    return f"The strength of the distortions is {after:g} in BN-x5 and {before:g} in the other run."


# Functions that write the notes on a change, by change. Their arguments are a run of BN-x5, and the
# run with the change undone.
_CHANGE_NOTES: Mapping[str, Sequence[Callable[[Run, Run], str]]] = {
    "dropout": (_note_length,),
    "l2": (_note_length,),
    "decay": (_note_decay,),
    "shuffling": (_note_length, _note_shuffling),
    "distortions": (_note_length, _note_distortions),
}


def _remaining_rate(run: Run, step: float = math.inf) -> float:
    """Returns the learning rate at a step, by default the last one, relative to the initial one."""
    rates = [rate for at, rate in run.curve("train/learning_rate").items() if at <= step]
    return rates[-1] / rates[0]


# --- Initial weights.


def tolerates_initial_weights(results: Results) -> Judgement:
    """Tests whether the factor on the initial weights affects BN-Baseline less than Inception."""
    networks = (INCEPTION, BASELINE)
    means = {
        title: [s.mean for s in accuracies_by_factor(results, title).values()] for title in networks
    }
    step = steps_by_factor(results, INCEPTION)
    measured = f"by step {step:,}, factors {min(WEIGHT_FACTORS):g} to {max(WEIGHT_FACTORS):g}: "
    measured += ", ".join(
        f"{title} {min(values):.1%} to {max(values):.1%}" for title, values in means.items()
    )
    runs = {title: ended_runs(results, title) for title in networks}
    if max(means[INCEPTION]) < CHANCE_FACTOR * _chance(runs[INCEPTION][0]):
        note = "With every factor, Inception is still at chance at this step."
        return Judgement(measured, NO_VERDICT, (note,))
    inception_range, baseline_range = (max(values) - min(values) for values in means.values())
    variation = seed_variation(results, step, *(Group.of(seeds, step) for seeds in runs.values()))
    # The difference of two ranges consists of four accuracies, at most factors of single runs.
    margin = variation.margin(1, 1, 1, 1)
    difference = Difference(measured, inception_range - baseline_range, margin)
    return Judgement(difference.measured, difference.verdict, (difference.resolution,))


def accuracies_by_factor(results: Results, title: str) -> dict[float, Spread]:
    """Returns the best accuracy by the end of the short runs, by factor on the initial weights."""
    step = steps_by_factor(results, title)
    runs = {
        factor: ended_runs(results, with_weight_factor(title, factor)) for factor in WEIGHT_FACTORS
    }
    runs[1.0] = ended_runs(results, title)
    return {
        factor: Spread.of(best_accuracy_by(run, step) for run in runs[factor])
        for factor in sorted(runs)
    }


def steps_by_factor(results: Results, title: str) -> int:
    """Returns the number of steps of the short runs of a network."""
    titles = [with_weight_factor(title, factor) for factor in WEIGHT_FACTORS]
    return common_steps(*(run for each in titles for run in ended_runs(results, each)))


# --- Moving averages.


def moving_averages_track(results: Results) -> Judgement:
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
    return Judgement(text, HOLDS if gap <= TOLERANCE else FAILS, (note,))


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


def is_invariant(part: str, results: Results) -> Judgement:
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
