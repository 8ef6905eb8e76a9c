"""The paper's claims that runs can test, each with the measurement and a verdict."""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from bn_keras.experiments.titles import (
    ABLATIONS,
    BASELINE,
    CONTROL,
    INCEPTION,
    INCEPTION_X5,
    INCEPTION_X30,
    SIGMOID,
    SIGMOID_X5,
    X5,
    X5_AT_RATE_1,
    X5_SIGMOID,
    X30,
    X30_AT_HALF,
)
from bn_keras.report import scale_invariance
from bn_keras.report.claim_plots import draw_plots
from bn_keras.report.claim_tests import (
    CHANCE_FACTOR,
    MAX_RATE_RATIO,
    TOLERANCE,
    Judgement,
    diverges,
    does_not_hurt,
    helps,
    is_better,
    is_invariant,
    is_not_worse,
    is_too_high,
    moving_averages_track,
    outpaces_longer_inception,
    stays_at_chance,
    tolerates_initial_weights,
    trains,
)
from bn_keras.report.figure_2 import describe_setup
from bn_keras.report.longer_inception import build_longer_inception, select_with_longer_inception
from bn_keras.report.margins import (
    NotRunError,
    format_points,
    seed_variation,
)
from bn_keras.report.sections import Section, escape, join_words, markdown_table
from bn_keras.report.verdicts import (
    HOLDS,
    NO_VERDICT,
    NOT_RUN,
    TOO_CLOSE,
    count_verdicts,
)
from bn_keras.runs.history import Results, Run, Spread
from bn_keras.runs.metrics_log import ACCURACY
from bn_keras.text import counted

# Section of a claim that the paper does not make.
OURS = "ours"


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
    plots = draw_plots(results)
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
    """Counts the verdicts on claims about training, on scale invariance, and in our controls."""
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


# --- Claims.

# Scale invariance, tested without a run.
_ABOUT_THE_LAYER = (
    Claim("3.3", "Except for epsilon, BN((aW)u) = BN(Wu)", partial(is_invariant, "output")),
    Claim(
        "3.3",
        "Except for epsilon, the gradient with respect to u does not depend on a",
        partial(is_invariant, "to_input"),
    ),
    Claim(
        "3.3",
        "Except for epsilon, the gradient with respect to aW is 1/a times that with respect to W",
        partial(is_invariant, "to_weights"),
    ),
)

CLAIMS = (
    Claim(
        "3.1",
        "Moving averages track the accuracy during training within 1 point",
        moving_averages_track,
    ),
    *_ABOUT_THE_LAYER,
    Claim(
        "3.3",
        "With BN, networks train at 5 and 30 times Inception's learning rate",
        partial(trains, (X5, X30)),
    ),
    Claim(
        "3.3",
        "Without BN, a learning rate of 5 times Inception's lowers the accuracy",
        partial(is_too_high, INCEPTION_X5),
    ),
    Claim(
        "1",
        "With BN, the accuracy depends less on the scale of the initial weights",
        tolerates_initial_weights,
    ),
    Claim(
        "4.2.1",
        "Adding BN alone does not take full advantage of the method: with the other changes, BN-x5"
        " is more accurate than BN-Baseline",
        partial(is_better, X5, BASELINE),
    ),
    Claim(
        OURS,
        "Inception with the same changes, at its own learning rate, is less accurate than BN-x5",
        partial(is_better, X5, CONTROL),
    ),
    Claim(
        "4.2.2",
        "BN-x5 reaches Inception's best accuracy in fewer steps, even if Inception trains as long"
        " as in the paper",
        outpaces_longer_inception,
    ),
    Claim(
        "4.2.1",
        "With BN, a higher learning rate speeds up training",
        partial(is_better, X5, X5_AT_RATE_1),
    ),
    Claim(
        OURS,
        "BN-x30's learning rate is not too high: at half of it, BN-x30 is not more accurate",
        partial(is_not_worse, X30, X30_AT_HALF),
    ),
    Claim(
        "4.2.1",
        "Removing dropout makes BN-x5 more accurate after the same number of steps",
        partial(helps, "dropout"),
    ),
    Claim("4.2.1", "Dividing the L2 weight by 5 improves the accuracy", partial(helps, "l2")),
    Claim(
        "4.2.1 (implied)",
        "Decaying the learning rate 6 times faster does not hurt BN-x5",
        partial(does_not_hurt, "decay"),
    ),
    Claim("4.2.1", "Local response normalization is not needed", partial(does_not_hurt, "lrn")),
    Claim("4.2.1", "Within-shard shuffling improves the accuracy", partial(helps, "shuffling")),
    Claim(
        "4.2.1 (implied)",
        "Weaker distortions do not hurt",
        partial(does_not_hurt, "distortions"),
    ),
    Claim(
        "4.2.2",
        "Inception diverges at 5 times its learning rate",
        partial(diverges, INCEPTION_X5),
    ),
    Claim(
        OURS,
        "Inception also diverges at 30 times its learning rate",
        partial(diverges, INCEPTION_X30),
    ),
    Claim("4.2.2", "Inception with sigmoids stays at chance", partial(stays_at_chance, SIGMOID)),
    Claim(
        OURS,
        "Inception with sigmoids also stays at chance at 5 times its learning rate",
        partial(stays_at_chance, SIGMOID_X5),
    ),
    Claim("4.2.2", "With BN, a network with sigmoids trains", partial(trains, (X5_SIGMOID,))),
)


# --- Training, rules and notes.


def _describe_training(results: Results) -> list[str]:
    """Returns a paragraph on data, networks and training; none without Inception and BN-x5."""
    run = next((results[title][0] for title in (INCEPTION, X5) if results.get(title)), None)
    return [] if run is None else [describe_setup(run)]


def _tabulate_ablations(results: Results) -> list[str]:
    """Returns a table of BN-x5 and its ablations, explained; none without ablations.

    A network with a run that was never evaluated is left out.
    """
    given = [results[title] for title in (X5, *ABLATIONS.values()) if results.get(title)]
    networks = [runs for runs in given if all(run.curve(ACCURACY) for run in runs)]
    if all(runs[0].title == X5 for runs in networks):
        return []
    rows = [
        (
            escape(runs[0].title),
            f"{Spread.of(run.best_accuracy for run in runs):.2%}",
            f"{Spread.of(list(run.curve(ACCURACY).values())[-1] for run in runs):.2%}",
            f"{Spread.of(map(_last_training_accuracy, runs)):.2%}",
        )
        for runs in networks
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
    *_, before, last = (0, *run.curve(ACCURACY))
    accuracies = run.curve("train/accuracy")
    return statistics.mean(accuracies[step] for step in accuracies if before < step <= last)


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
        "If all networks do vary equally, the rule finds a difference between networks that are"
        " equally good on these images in at most one of twenty comparisons. The comparisons are"
        " not independent: they share the runs of BN-x5 and the estimate of the variation. If that"
        " is too low, several are wrong together. Networks that end at a high learning rate"
        " probably vary more.",
        f"*{TOO_CLOSE.capitalize()}*: the difference is within the margin.",
        f"*{NO_VERDICT.capitalize()}*: no network has a second seed, or the notes below give"
        " another reason, such as two networks with BN of which one has more than"
        f" {MAX_RATE_RATIO} times the other's learning rate, relative to their initial ones.",
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
        " momentum of BN-x5 counts. The paper states neither a tolerance nor a momentum.",
    ]
    return "\n".join(f"- {rule}" for rule in rules)


def _describe_seeds(results: Results) -> str:
    """Returns a sentence on the networks with several seeds; empty if there are none."""
    several = [
        f"{escape(title)} has {len(runs)} seeds" for title, runs in results.items() if len(runs) > 1
    ]
    if not several:
        return ""
    others = "; the others have one" if len(several) < len(results) else ""
    return f"{join_words(several)}, shown as mean (lowest to highest){others}. "


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
        f"- *{claim.sentence}* ({judgement.verdict}): {' '.join(filter(None, judgement.notes))}"
        for claim, judgement in judgements.items()
        if judgement.verdict not in (HOLDS, NOT_RUN) and any(judgement.notes)
    ]
    if not notes:
        return []
    return [
        "### Claims that do not hold or are undecided",
        "These facts about the runs may explain the verdicts. Whether they do was not tested.",
        "\n".join(notes),
    ]
