"""Figure 4 of the paper: single networks and an ensemble, evaluated with one crop and with many."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from bn_keras.data.multi_crop import SINGLE_CROP, Crops
from bn_keras.inference.evaluation import EvaluationRow, evaluate_networks
from bn_keras.models.bn_inception import ENSEMBLE
from bn_keras.report import published
from bn_keras.report.sections import Section, markdown_table
from bn_keras.runs.history import Spread
from bn_keras.runs.workdir import Workdir
from bn_keras.storage import make_folder, read, write_atomically, writing

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
    workdirs: Sequence[str | os.PathLike], folder: str | os.PathLike, crops: Crops | None = None
) -> list[EnsembleRow]:
    """Evaluates the members of an ensemble with one crop and with many.

    The result is saved in figure_4.json, and read from there until a run or the crops change.

    Args:
      workdirs: folders of the members' runs; unfinished runs are left out.
      folder: folder of figure_4.json.
      crops: the many crops; None is `suitable_crops`.

    Returns:
      The rows of `evaluate_networks`, extended; none if no run has finished.

    Raises:
      StorageError: figure_4.json cannot be written.
      UsageError: see `evaluate_networks`.
    """
    finished = [path for path in workdirs if Workdir(path).is_finished()]
    if not finished:
        return []
    crops = crops or suitable_crops(finished[0])
    cut = list(dataclasses.astuple(crops))
    made_of = {"runs": [Workdir(path).read_metrics()[-1] for path in finished], "cut": cut}
    file = epath.Path(folder) / "figure_4.json"
    saved = _read(file)
    if saved.get("made_of") == made_of:
        return saved["rows"]
    evaluated = evaluate_networks(finished, crops=[SINGLE_CROP, crops])
    crop = Workdir(finished[0]).read_config().data.crop
    rows: list[EnsembleRow] = [{**row, "cut": cut, "trained_on": crop} for row in evaluated]
    with writing(f"{file}"):
        make_folder(file.parent)
        text = json.dumps({"made_of": made_of, "rows": rows}, indent=2) + "\n"
        write_atomically(file, text)
    return rows


def _read(file: epath.Path) -> dict[str, Any]:
    try:
        saved = json.loads(read(file) or b"")
    except ValueError:
        return {}
    return saved if isinstance(saved, dict) and "rows" in saved else {}


def suitable_crops(workdir: str | os.PathLike) -> Crops:
    """Returns the paper's 144 crops, without those that do not suit a run's network.

    The three squares along the longer side are identical for square images of a fixed size, so only
    one is used. Mirrored crops are left out if the training does not mirror.
    """
    run = Workdir(workdir)
    config, (input_shape, _) = run.read_config(), run.read_interface()
    is_square = not config.data.image_size and input_shape[0] == input_shape[1]
    return Crops(scales=4, squares=1 if is_square else 3, windows=6, mirrors=1 + config.data.mirror)


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
        _summarize(rows),
        _compare_errors(rows),
        _explain_terms(rows),
        f"*Paper*: {published.CITATION}, Figure 4 and section 4.2.3, on 50,000 validation images of"
        f" ImageNet. On the test images, its ensemble has a top-5 error of"
        f" {published.ENSEMBLE_TOP5_ON_TEST:.2%}. On the validation images, the"
        f" {googlenet.model} of {googlenet.models} networks has {googlenet.top5:.2%}.",
    ]
    return Section(title, "\n\n".join(body))


def _summarize(rows: Sequence[EnsembleRow]) -> str:
    many = max(row["crops"] for row in rows)
    single_crop, multi_crop = (
        {row["model"]: row["top1_error"] for row in rows if row["crops"] == crops}
        for crops in (1, many)
    )
    ensemble = next((row["model"] for row in rows if row["models"] > 1), None)
    members = [model for model in single_crop if model != ensemble]
    helped = sum(multi_crop[model] < single_crop[model] for model in members)
    text = (
        f"**{many} crops instead of one lower the top-1 error of {helped} of the {len(members)}"
        " networks"
    )
    if ensemble:
        beaten = sum(multi_crop[ensemble] < multi_crop[model] for model in members)
        text += (
            f"; with {many} crops, the error of the ensemble is lower than that of {beaten} of its"
            f" {len(members)} members"
        )
    return f"{text}.** In the paper, the crops lower the error and the ensemble lowers it further."


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
    scales, squares, windows, mirrors = members[0]["cut"]
    text = (
        f"The {len(members)} networks are BN-x30 with the changes of section 4.2.3. They are"
        " evaluated after their last training step; the command of this report saves their errors"
        " in `figure_4.json`. *Single network*: mean over the networks, with the lowest and"
        " the highest error in parentheses. Class probabilities are averaged over crops and"
        f" networks. Each of the {members[0]['examples']:,} validation images counts once. The"
        " paper's 144 crops are 4 scales x 3 squares x 6 windows x 2 (with mirror images); here"
        f" they are {scales} x {squares} x {windows} x {mirrors}"
    )
    reasons = []
    if squares == 1:
        reasons.append("the three squares of a square image are identical, so one is enough")
    if mirrors == 1:
        reasons.append("the networks were trained without mirror images")
    text += f" ({'; '.join(reasons)})." if reasons else "."
    if shown := _WHOLE_IMAGES.get(members[0]["trained_on"]):
        text += f" The networks were trained on {shown}, never on enlarged parts like these crops."
    if len(members) < len(ENSEMBLE):
        unfinished = len(ENSEMBLE) - len(members)
        text += f" Training is unfinished for {unfinished} of the {len(ENSEMBLE)} networks."
    return text
