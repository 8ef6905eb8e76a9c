"""The reports in docs/results follow from the records of the runs beside them."""

import pathlib
import re
import shlex
import shutil

import pytest
from commands import launch

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "docs" / "results"
# The line that shows the report's command.
COMMAND = re.compile(r"^    .*\breproduce (.+)$", re.M)


@pytest.mark.parametrize("name", ["figure1", "cifar10"])
def test_a_report_follows_from_the_records_of_its_runs(name, tmp_path):
    kept = RESULTS / name
    report = (kept / "report.md").read_text()
    *arguments, workdir = shlex.split(COMMAND.search(report)[1])
    assert workdir.startswith("--workdir=")
    records = [config.parent for config in kept.glob("*/config.json")]
    for record in records:
        shutil.copytree(record, tmp_path / record.name)
    for evaluation in kept.glob("*.json"):
        shutil.copy(evaluation, tmp_path)

    again = launch("reproduce", *arguments, f"--workdir={tmp_path}", "--report_only")

    assert again.returncode == 0, again.stderr
    assert f"reporting {len(records)} of " in again.stderr
    assert comparable((tmp_path / "report.md").read_text()) == comparable(report)
    plots = sorted(path.name for path in kept.glob("*.svg"))
    assert plots == sorted(path.name for path in tmp_path.glob("*.svg"))
    for plot in plots:
        assert labels(tmp_path / plot) == labels(kept / plot), plot


def comparable(report):
    """Returns a report without its command and the rounding errors that it measures anew."""
    return re.sub(r"\de-\d\d", "rounding", COMMAND.sub("", report))


def labels(plot):
    """Returns the texts of a plot, which do not depend on matplotlib's version."""
    return re.findall(r"<!-- (.*?) -->", plot.read_text())
