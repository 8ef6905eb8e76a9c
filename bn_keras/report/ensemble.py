"""The paper's Figure 4: one network and six, shown each image once and in many crops."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from bn_keras.data.multi_crop import SINGLE_CROP, Crops
from bn_keras.inference.evaluation import evaluate_networks
from bn_keras.report import published
from bn_keras.report.page import Section, table
from bn_keras.runs.atomic_files import write_atomically, writing
from bn_keras.runs.history import Spread
from bn_keras.runs.workdir import Workdir

# Members of the paper's ensemble.
_NUM_MEMBERS = 6

# By the config's crop; that of ImageNet is GoogLeNet's, as the 144 crops are.
_SHOWN_IN_TRAINING = {"none": "whole images", "shift": "whole images, only shifted"}


def evaluate_figure_4(
    workdirs: Sequence[str | os.PathLike], folder: str | os.PathLike, crops: Crops | None = None
) -> list[dict[str, object]]:
    """Evaluates the members of an ensemble, by a single crop and by many, and keeps the result.

    It lies in figure_4.json, and is taken from there until a run goes on or is another one.

    Args:
      workdirs: of the members' runs; those that didn't get to their end are left out.
      folder: of figure_4.json.
      crops: the many; None is `paper_crops`.

    Returns:
      The rows of `bn_keras.inference.evaluation.evaluate_networks`, which also say in "cut" how many scales,
      squares, windows and mirrors the many crops are, and in "trained_on" the crop of the config;
      none where no run got to its end.

    Raises:
      UsageError: as from there.
    """
    finished = [path for path in workdirs if Workdir(path).is_finished()]
    if not finished:
        return []
    crops = crops or paper_crops(finished[0])
    made_of = {
        "runs": [Workdir(path).read_metrics()[-1] for path in finished],
        "cut": list(dataclasses.astuple(crops)),
    }
    file = epath.Path(folder) / "figure_4.json"
    kept = _read(file)
    if kept.get("made_of") != made_of:
        rows = evaluate_networks(finished, crops=[SINGLE_CROP, crops])
        crop = Workdir(finished[0]).read_config().data.crop
        rows = [row | {"cut": made_of["cut"], "trained_on": crop} for row in rows]
        kept = {"made_of": made_of, "rows": rows}
        with writing(f"{file}"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(kept, indent=2) + "\n")
    return kept["rows"]


def _read(file: epath.Path) -> dict:
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) and "rows" in kept else {}


def paper_crops(workdir: str | os.PathLike) -> Crops:
    """Gives those of the paper's 144 crops that differ for a run's images and suit them.

    Images that are taken in the size of their data, as small ones are, are squares: the three
    squares that GoogLeNet cuts out of the longer side are the same one. Where training doesn't
    mirror, a mirror image is no image of the kind.
    """
    run = Workdir(workdir)
    config, (input_shape, _) = run.read_config(), run.read_interface()
    is_square = not config.data.image_size and input_shape[0] == input_shape[1]
    return Crops(scales=4, squares=1 if is_square else 3, windows=6, mirrors=1 + config.data.mirror)


def figure_4(rows: Sequence[Mapping[str, object]]) -> Section:
    """Makes the table of errors, one network and the ensemble, a single crop and many.

    Args:
      rows: as from `evaluate_figure_4`.
    """
    title = "Figure 4: many crops and an ensemble"
    members = [row for row in rows if row["models"] == 1]
    if not members:
        return Section(title, "No member of the ensemble got to the end of its training.")
    others = published.FIGURE_4[0]
    body = [
        _tell_result(rows),
        _compare_errors(rows),
        _tell_terms(rows),
        f"*In the paper*: {published.CITATION}, Figure 4 and section 4.2.3, of ImageNet's 50,000"
        " validation images. There, too: its ensemble's top-5 error on the test images,"
        f" {published.ENSEMBLE_TOP5_ON_TEST:.2%}, and that of the {others.models} networks of the"
        f" {others.model} on the validation images, {others.top5:.2%}.",
    ]
    return Section(title, "\n\n".join(body))


def _tell_result(rows: Sequence[Mapping[str, object]]) -> str:
    many = max(row["crops"] for row in rows)
    single_crop, many_crops = (
        {row["model"]: row["top1_error"] for row in rows if row["crops"] == crops}
        for crops in (1, many)
    )
    ensemble = next((row["model"] for row in rows if row["models"] > 1), None)
    members = [model for model in single_crop if model != ensemble]
    helped = sum(many_crops[model] < single_crop[model] for model in members)
    text = (
        f"**{many} crops in place of one lower the top-1 error of {helped} of the {len(members)}"
        " networks"
    )
    if ensemble:
        beaten = sum(many_crops[ensemble] < many_crops[model] for model in members)
        text += f"; the ensemble's is lower than that of {beaten} of its {len(members)} members"
    return f"{text}.** In the paper the crops lower the error, and the ensemble lowers it again."


def _compare_errors(rows: Sequence[Mapping[str, object]]) -> str:
    header = ("evaluated", "networks", "crops", "top-1 error", "in the paper")
    header += ("top-5 error", "in the paper")
    lines = []
    for is_ensemble in (False, True):
        for crops in sorted({row["crops"] for row in rows}):
            chosen = [r for r in rows if (r["models"] > 1, r["crops"]) == (is_ensemble, crops)]
            if not chosen:
                continue
            in_the_paper = _published(is_ensemble, is_single_crop=crops == 1)
            lines.append(
                (
                    "the ensemble" if is_ensemble else "one network",
                    f"{chosen[0]['models']}",
                    f"{crops}",
                    f"{Spread.of(row['top1_error'] for row in chosen):.2%}",
                    f"{in_the_paper.top1:.2%}" if in_the_paper else "-",
                    f"{Spread.of(row['top5_error'] for row in chosen):.2%}",
                    f"{in_the_paper.top5:.2%}" if in_the_paper else "-",
                )
            )
    return table(header, lines)


def _published(is_ensemble: bool, is_single_crop: bool) -> published.Errors | None:
    wanted = (_NUM_MEMBERS if is_ensemble else 1, is_single_crop)
    return next((e for e in published.FIGURE_4 if (e.models, e.crops == 1) == wanted), None)


def _tell_terms(rows: Iterable[Mapping[str, object]]) -> str:
    """Says what was averaged over what, and what became of the paper's 144 crops."""
    members = [row for row in rows if row["models"] == 1 and row["crops"] == 1]
    scales, squares, windows, mirrors = members[0]["cut"]
    text = (
        f"The {len(members)} networks are BN-x30 with the changes of section 4.2.3, evaluated as"
        " they were at the end of their training, when this report was made; *one network*"
        " is the mean over them, with the fewest and the most errors in brackets. The"
        " probabilities that crops and networks give are averaged."
        f" There are {members[0]['examples']:,} validation images, each counted once."
        " The paper's 144 crops are 4 scales, of each 3 squares, of each 6 windows, and the mirror"
        f" images of all; here it was {scales}, {squares}, {windows} and"
        f" {'the mirror images' if mirrors == 2 else 'no mirror images'}"
    )
    reasons = []
    if squares == 1:
        reasons.append("of a square image the three squares are one, so that the mean is the same")
    if mirrors == 1:
        reasons.append("without mirror images, since the training has none")
    text += f" ({'; '.join(reasons)})." if reasons else "."
    if shown := _SHOWN_IN_TRAINING.get(members[0]["trained_on"]):
        text += (
            f" In training the networks are shown {shown}, and never enlarged parts of images such"
            " as the crops are."
        )
    if len(members) < _NUM_MEMBERS:
        text += f" The other networks of the {_NUM_MEMBERS} did not get to the end of training."
    return text
