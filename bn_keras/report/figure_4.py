"""Figure 4 of the paper: single networks and an ensemble, evaluated with one crop and with many."""

import dataclasses
import math
import os
from collections.abc import Sequence

from etils import epath

from bn_keras.data.multi_crop import SINGLE_CROP, Crops
from bn_keras.inference.evaluation import EvaluationRow, evaluate_networks
from bn_keras.models.bn_inception import ENSEMBLE
from bn_keras.report import published
from bn_keras.report.margins import format_points
from bn_keras.report.saved_evaluation import evaluate_once
from bn_keras.report.sections import Section, markdown_table
from bn_keras.runs.history import Spread
from bn_keras.runs.workdir import Workdir
from bn_keras.text import counted

# The training's crops that show whole images, unlike ImageNet's, by config.data.crop.
_WHOLE_IMAGES = {"none": "whole images", "shift": "whole images, at most shifted"}


class EnsembleRow(EvaluationRow):
    """An evaluation of one network, or of the ensemble.

    "cut" contains the numbers of scales, squares, windows and mirrors of the many crops;
    "trained_on" is config.data.crop of the training.
    """

    cut: list[int]
    trained_on: str


def evaluate_ensemble(
    workdirs: Sequence[str | os.PathLike], folder: str | os.PathLike
) -> list[EnsembleRow]:
    """Evaluates the members of an ensemble with one crop and with many, the `suitable_crops`.

    The result is saved in figure_4.json, and read from there until a run or the crops change.

    Args:
      workdirs: folders of the members' runs; unfinished runs are left out.
      folder: folder of figure_4.json.

    Returns:
      The rows of `evaluate_networks`, extended; none if no run has finished.

    Raises:
      StorageError: figure_4.json cannot be written.
      UsageError: see `evaluate_networks`.
    """
    finished = [path for path in workdirs if Workdir(path).read_metrics().is_finished]
    if not finished:
        return []
    crops = suitable_crops(finished[0])
    cut = list(dataclasses.astuple(crops))
    made_of = {"runs": [Workdir(path).read_metrics()[-1] for path in finished], "cut": cut}
    crop = Workdir(finished[0]).read_config().data.crop

    def evaluate() -> list[EnsembleRow]:
        evaluated = evaluate_networks(finished, crops=[SINGLE_CROP, crops])
        # The folder's place says nothing about the result.
        return [
            {**row, "model": epath.Path(row["model"]).name, "cut": cut, "trained_on": crop}
            for row in evaluated
        ]

    return evaluate_once(epath.Path(folder) / "figure_4.json", made_of, evaluate)


def suitable_crops(workdir: str | os.PathLike) -> Crops:
    """Returns the paper's 144 crops, without those that do not suit a run's network.

    The three squares along the longer side are identical for square images of a fixed size, so only
    one is used. Mirrored crops are left out if the training does not mirror, and all but the
    smallest scale if it shows whole images only.
    """
    run = Workdir(workdir)
    config, input_shape = run.read_config(), run.read_interface().input_shape
    is_square = not config.data.image_size and input_shape[0] == input_shape[1]
    return Crops(
        scales=1 if config.data.crop in _WHOLE_IMAGES else 4,
        squares=1 if is_square else 3,
        windows=6,
        mirrors=1 + config.data.mirror,
    )


def build_figure_4(rows: Sequence[EnsembleRow]) -> Section:
    """Builds the table of errors: single networks and the ensemble, with one crop and with many.

    Args:
      rows: the result of `evaluate_ensemble`.

    Source: Ioffe & Szegedy 2015, Figure 4.
    """
    title = "Figure 4: multi-crop and ensemble"
    if not rows:
        return Section(title, "No member of the ensemble has finished training.")
    googlenet = published.GOOGLENET_ENSEMBLE
    body = [
        _compare_errors(rows),
        _explain_terms(rows),
        f"*Paper*: {published.CITATION}, Figure 4 and section 4.2.3, on 50,000 validation images of"
        f" ImageNet. On the test images, its ensemble has a top-5 error of"
        f" {published.ENSEMBLE_TOP5_ON_TEST:.2%}. On the validation images, the"
        f" {googlenet.model} of {googlenet.models} networks has {googlenet.top5:.2%}.",
    ]
    return Section(title, "\n\n".join(body), summary=_summarize(rows))


def _summarize(rows: Sequence[EnsembleRow]) -> str:
    """Summarizes the effect of the crops and of the ensemble in a sentence."""
    many = max(row["crops"] for row in rows)
    single, multi = (
        [row["top1_error"] for row in rows if (row["models"], row["crops"]) == (1, crops)]
        for crops in (1, many)
    )
    has = "have a mean top-1 error" if len(single) > 1 else "has a top-1 error"
    text = (
        f"{counted(len(single), 'BN-x30 network')} {has} of {Spread.of(single).mean:.1%} with one"
        f" crop and {Spread.of(multi).mean:.1%} with {many}"
    )
    ensemble = [r["top1_error"] for r in rows if r["models"] > 1 and r["crops"] == many]
    if ensemble:
        lower = sum(error > ensemble[0] for error in multi)
        text += (
            f"; their ensemble has {ensemble[0]:.1%} with {many}, lower than {lower} of the"
            f" {len(multi)} alone"
        )
    _, one, crops, six = (rates.top1 for rates in published.FIGURE_4)
    return f"{text} (paper, on ImageNet: {one:.1%}, {crops:.1%} and {six:.1%})."


def _compare_errors(rows: Sequence[EnsembleRow]) -> str:
    header = (
        "evaluated",
        "networks",
        "crops",
        "top-1 error",
        "paper: top-1 error",
        "top-5 error",
        "paper: top-5 error",
    )
    lines = []
    for is_ensemble in (False, True):
        for crops in sorted({row["crops"] for row in rows}):
            chosen = [r for r in rows if (r["models"] > 1, r["crops"]) == (is_ensemble, crops)]
            if not chosen:
                continue
            paper = _find_published(is_ensemble, is_single_crop=crops == 1)
            lines.append(
                (
                    "ensemble" if is_ensemble else "single network",
                    f"{chosen[0]['models']}",
                    f"{crops}",
                    f"{Spread.of(row['top1_error'] for row in chosen):.2%}",
                    f"{paper.top1:.2%}" if paper else "-",
                    f"{Spread.of(row['top5_error'] for row in chosen):.2%}",
                    f"{paper.top5:.2%}" if paper else "-",
                )
            )
    return markdown_table(header, lines)


def _find_published(is_ensemble: bool, is_single_crop: bool) -> published.ErrorRates | None:
    wanted = (len(ENSEMBLE) if is_ensemble else 1, is_single_crop)
    return next((e for e in published.FIGURE_4 if (e.models, e.crops == 1) == wanted), None)


def _explain_terms(rows: Sequence[EnsembleRow]) -> str:
    """Explains the averages, and how the crops differ from the paper's 144."""
    members = [row for row in rows if row["models"] == 1 and row["crops"] == 1]
    first = members[0]
    scales, squares, windows, mirrors = first["cut"]
    error = Spread.of(row["top1_error"] for row in members).mean
    images = first["examples"]
    text = (
        f"Networks: {len(members)}, BN-x30 with the changes of section 4.2.3, in which they differ,"
        " as they do in their seeds. They are evaluated after their last training step,"
        f" {first['step']:,}; the command of this report saves their errors in `figure_4.json`."
        " *Single network*: mean over the networks, with the lowest and the highest error in"
        " parentheses. Class probabilities are averaged over crops and networks. Each of the"
        f" {images:,} validation images counts once; a top-1 error of {error:.1%} has a standard"
        f" error of {format_points(math.sqrt(error * (1 - error) / images))}."
    )
    if first["classes"] != published.NUM_CLASSES:
        text += (
            f" With {first['classes']} classes instead of {published.NUM_CLASSES:,}, the errors are"
            " not comparable with the paper's, least of all the top-5 errors: compare which are"
            " lower, not how low they are."
        )
    text += (
        " The paper's 144 crops are 4 scales x 3 squares x 6 windows x 2 (with mirror images); here"
        f" they are {scales} x {squares} x {windows} x {mirrors}"
    )
    reasons = []
    if squares == 1:
        reasons.append("the three squares of a square image are identical, so one is enough")
    if scales == 1:
        reasons.append(
            f"the networks were trained on {_WHOLE_IMAGES[first['trained_on']]}, so only the"
            " scale that enlarges least is used"
        )
    if mirrors == 1:
        reasons.append("the networks were trained without mirror images")
    text += f" ({'; '.join(reasons)})." if reasons else "."
    if len(members) < len(ENSEMBLE):
        unfinished = len(ENSEMBLE) - len(members)
        text += f" Training is unfinished for {unfinished} of the {len(ENSEMBLE)} networks."
    return text
