"""A report: sections in Markdown, written as such and as one HTML file that needs no other.

What the runs say of themselves, from their settings to the machine, is appended by itself.
"""

import base64
import contextlib
import dataclasses
import datetime
import html
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from xml.etree import ElementTree

import markdown
from etils import epath
from markdown.extensions.toc import slugify_unicode
from markdown.treeprocessors import Treeprocessor
from matplotlib.figure import Figure

from bn_keras.runs.atomic_files import move, writing
from bn_keras.runs.history import Results, Run
from bn_keras.runs.workdir import Workdir

# What a plot may be called: it stands in a link as it is.
_PLOT_NAME = re.compile(r"\w[\w-]*\.png", re.ASCII)
# Where a run's data lies says nothing about it; its seed stands in its name.
_NOT_SHOWN = ("data.data_dir", "seed")
# Of a network that is not Inception, settings of others that it doesn't have.
_OF_INCEPTION = tuple(
    f"model.{name}"
    for name in (
        "preset",
        "pool_projection",
        "width",
        "stem",
        "initializer_scale",
        "dropout",
        "local_response_normalization",
        "per_activation_bn",
        "auxiliary_weight",
    )
)
# How settings are shown that ask for nothing.
_NOTHING = ("0", "off", "-")


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
      title: heading, as plain text.
      body: Markdown; HTML in it is shown as text. A plot stands in it as an image,
        ![what it shows, in words](name.png). What others named goes through `escape`.
      plots: by the names that stand in the body.
    """

    title: str
    body: str
    plots: Mapping[str, Figure] = dataclasses.field(default_factory=dict)


def write_report(
    title: str,
    sections: Sequence[Section],
    results: Results,
    folder: str | os.PathLike,
    command: str,
) -> None:
    """Writes report.md, its plots, and report.html, into which the plots are copied.

    All of it is made before any of it is written: a report that can't be made or doesn't fit on
    the disk leaves what was there as it was.

    Args:
      title: of the report, as plain text.
      sections: in their order; "How this was made" comes after them.
      results: of the runs that the sections are about.
      folder: where the files go; it is made if need be.
      command: that made the runs, for the reader who wants to repeat them.

    Raises:
      UsageError: the folder can't be written.
      ValueError: a section shows a plot that it doesn't have, or the other way round.
    """
    sections = [*sections, _how_it_was_made(results, command)]
    plots = _draw(sections)
    contents = "\n".join(f"- [{escape(s.title)}](#{_anchor(s.title)})" for s in sections)
    parts = [f"# {escape(title)}", contents]
    for section in sections:
        parts += [f"## {escape(section.title)}", section.body.strip("\n")]
    text = "\n\n".join(parts) + "\n"
    files = plots | {
        "report.md": text.encode(),
        "report.html": _to_html(title, text, plots).encode(),
    }
    _write(files, epath.Path(folder))


def escape(text: str) -> str:
    """Makes Markdown that shows this text as it is, on one line, in a table's cell as well."""
    text = re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))
    return html.escape(text, quote=False)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Lays out a table in Markdown, in columns that stand below each other in a terminal too.

    Args:
      header: Markdown, a column each.
      rows: likewise.
      left: how many of the columns are text, to the left; those after them are numbers, to the
        right.
    """
    rows = [header, *rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    rows.insert(1, rule)
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    )


def format_seconds(seconds: float) -> str:
    """Says a length of time in the two units that matter, such as "3 min 20 s"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def tell_diverged(results: Results) -> list[str]:
    """Gives a paragraph on the runs that diverged; none if none did."""
    diverged = [
        f"{escape(run.name)} at step {run.diverged_at:,}"
        for runs in results.values()
        for run in runs
        if run.diverged_at is not None
    ]
    if not diverged:
        return []
    return [
        f"**Diverged:** {', '.join(diverged)}. What was before that counts; a mean over the seeds"
        " ends where the first of them does."
    ]


def _anchor(title: str) -> str:
    return slugify_unicode(title, "-")


def _draw(sections: Sequence[Section]) -> dict[str, bytes]:
    """Gives each plot as PNG, by its name."""
    plots = {}
    for section in sections:
        shown = set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", section.body))
        named = {name for name in section.plots if _PLOT_NAME.fullmatch(name)} - plots.keys()
        if not shown == named == section.plots.keys():
            raise ValueError(
                f"section {section.title!r} shows the plots {sorted(shown)} and has"
                f" {sorted(section.plots)}: each is to be shown once, under a name like a_b.png of"
                " its own in the report"
            )
        for name, plot in section.plots.items():
            image = io.BytesIO()
            # Without the version of matplotlib, the same plot is the same file.
            plot.savefig(image, format="png", dpi=160, metadata={"Software": None})
            plots[name] = image.getvalue()
    return plots


class _Layout(Treeprocessor):
    """Copies the plots into the page, and puts tables where they scroll if they are too wide."""

    def __init__(self, images: Mapping[str, bytes]) -> None:
        super().__init__()
        self._images = images

    def run(self, root: ElementTree.Element) -> None:
        for parent in list(root.iter()):
            for place, child in enumerate(parent):
                if child.tag == "img":
                    image = base64.b64encode(self._images[child.get("src")]).decode()
                    child.set("src", f"data:image/png;base64,{image}")
                elif child.tag == "table":
                    # With a tab stop, so that a keyboard scrolls it.
                    box = ElementTree.Element("div", {"class": "wide", "tabindex": "0"})
                    box.append(child)
                    box.tail, child.tail = child.tail, None
                    parent[place] = box


def _to_html(title: str, text: str, plots: Mapping[str, bytes]) -> str:
    converter = markdown.Markdown(extensions=["tables", "toc", "sane_lists"])
    # HTML in the text is text.
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    # After the Markdown inside of paragraphs and cells has become elements, at priority 20.
    converter.treeprocessors.register(_Layout(plots), "layout", priority=10)
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=converter.convert(text))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; }
body { max-width: 60rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem; background: #fff;
  color: #1a1a1a; font: 1.0625rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; max-width: 44rem; }
h1 { font-size: 1.9rem; }
h2 { font-size: 1.4rem; margin-top: 3rem; padding-top: .75rem; border-top: 1px solid #ccc; }
h3 { font-size: 1.1rem; margin-top: 2rem; }
p, ul, ol { max-width: 44rem; }
li { margin: .25rem 0; }
a { color: #0b5394; }
img { display: block; max-width: min(100%, 46rem); height: auto; margin: 1.25rem 0; }
.wide { overflow-x: auto; margin: 1.25rem 0; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; min-width: 8rem; }
td[style*="right"] { white-space: nowrap; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono",
  "DejaVu Sans Mono", monospace; font-size: .88em; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: .75rem 1rem; background: #f5f5f5; border-radius: 4px;
  line-height: 1.4; }
pre code { overflow-wrap: normal; }
@media (max-width: 40rem) { table:has(th:nth-child(4)) { min-width: 38rem; } }
@media print {
  @page { margin: 16mm; }
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  h2 { margin-top: 1.5rem; }
  h1, h2, h3 { break-after: avoid; }
  table { font-size: 8pt; }
  th, td { padding: .25rem .4rem; }
  tr, img { break-inside: avoid; }
  .wide { overflow: visible; }
  pre { background: none; border: 1px solid #ccc; white-space: pre-wrap; }
  a { color: inherit; text-decoration: none; }
}
"""


def _write(files: Mapping[str, bytes], folder: epath.Path) -> None:
    unfinished = {name: folder / f"{name}.unfinished" for name in files}
    with contextlib.ExitStack() as cleanup, writing(f"the report in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            cleanup.callback(unfinished[name].unlink, missing_ok=True)
            unfinished[name].write_bytes(content)
        for name in files:
            move(unfinished[name], folder / name)


def _how_it_was_made(results: Results, command: str) -> Section:
    runs = [run for seeds in results.values() for run in seeds]
    parts = ["\n".join(f"    {line}" for line in command.splitlines())]
    if runs:
        parts += [
            "Every number and curve of ours, but where it is said otherwise, is computed from what"
            " the runs wrote: the `config.json`, `metrics.jsonl` and `environment.json` in each"
            " one's folder.",
            "### The runs",
            _list_runs(runs),
            _tell_time(runs),
            "### Software and machine",
            *_tell_environment(runs),
            "### Settings",
            *_tell_settings(results),
        ]
    return Section("How this was made", "\n\n".join(parts))


def _list_runs(runs: Iterable[Run]) -> str:
    header = (
        "run",
        "end",
        "started (UTC)",
        "hash of the weights",
        "steps",
        "in training",
        "wall time",
    )
    rows = []
    for run in runs:
        started = [start["started"] for start in run.environment]
        final = run.metrics[-1] if run.metrics else {}
        rows.append(
            (
                escape(run.name),
                _end(run),
                _moment(started[0]) if started else "-",
                final.get(Workdir.FINISHED, "-")[:12],
                f"{final.get('step', 0):,}",
                format_seconds(run.seconds),
                _wall_time(run),
            )
        )
    return table(header, rows, left=4)


def _end(run: Run) -> str:
    """Says how a run ended, if it did."""
    if run.metrics and Workdir.FINISHED in run.metrics[-1]:
        return "finished"
    if run.diverged_at is not None:
        return f"diverged at step {run.diverged_at:,}"
    return "not finished"


def _wall_time(run: Run) -> str:
    """Says how long a run took; of a start that was killed nobody knows how long it went on."""
    if not run.wall_seconds:
        return "-"
    was_killed = any(not start["ended"] for start in run.environment)
    return f"{'over ' if was_killed else ''}{format_seconds(run.wall_seconds)}"


def _tell_time(runs: Sequence[Run]) -> str:
    text = f"The runs' training steps took {format_seconds(sum(run.seconds for run in runs))}"
    starts = [start for run in runs for start in run.environment]
    ends = [start["ended"] for start in starts if start["ended"]]
    if ends:
        wall = format_seconds(sum(run.wall_seconds for run in runs))
        text += (
            f"; with compilation, evaluations and checkpoints it was {wall}, runs side by side"
            f" counted one by one. The first was started"
            f" {_moment(min(start['started'] for start in starts))} UTC, the last ended"
            f" {_moment(max(ends))}"
        )
    return text + "."


def _moment(text: str) -> str:
    moment = datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M}"


def _tell_environment(runs: Sequence[Run]) -> list[str]:
    """Says what the runs were made with; where they differ, which was made with what."""
    paragraphs = []
    for what, describe in (("Software", _software), ("Source", _source), ("Machine", _machine)):
        names: dict[str, dict[str, None]] = {}
        for run in runs:
            for start in run.environment:
                names.setdefault(describe(start), {})[escape(run.name)] = None
        if len(names) == 1:
            paragraphs.append(f"{what}: {next(iter(names))}.")
        elif names:
            lines = [f"- {text}: {', '.join(of_text)}." for text, of_text in names.items()]
            paragraphs += [f"**{what}: not the same for all of the runs.**", "\n".join(lines)]
    silent = [escape(run.name) for run in runs if not run.environment]
    if silent:
        which = "The runs have" if len(silent) == len(runs) else ", ".join(silent) + " have"
        paragraphs.append(f"{which} no note of the software and machine that they were made with.")
    return paragraphs


def _software(start: Mapping) -> str:
    return escape(", ".join(f"{name} {version}" for name, version in start["versions"].items()))


def _source(start: Mapping) -> str:
    if not start["commit"]:
        return "not from a checkout, so of no known commit"
    changes = ", with changes that are in no commit" if start["modified"] else ""
    return f"commit {escape(start['commit'])}{changes}"


def _machine(start: Mapping) -> str:
    machine = start["machine"]
    cores = machine["cores"]
    return escape(
        f"{machine['processor']}, {cores} core{'s' if cores > 1 else ''} a run,"
        f" {machine['platform']}, trained on {', '.join(machine['devices'])}"
    )


def _tell_settings(results: Results) -> list[str]:
    """Says in which settings the runs differ and what the others are, for each kind of runs."""
    kinds: dict[str, dict[str, Sequence[Run]]] = {}
    for title, seeds in results.items():
        config = seeds[0].config
        kind = f"{escape(config.model.name)} on {escape(config.data.name)}"
        kinds.setdefault(kind, {})[title] = seeds
    paragraphs = []
    for kind, of_kind in kinds.items():
        if len(kinds) > 1:
            paragraphs.append(f"**{kind}**")
        paragraphs += _compare_settings(of_kind)
    return paragraphs


def _compare_settings(results: Results) -> list[str]:
    settings = {
        title: [dict(_flatten(run.config.to_dict())) for run in seeds]
        for title, seeds in results.items()
    }
    all_settings = [of_run for of_title in settings.values() for of_run in of_title]
    keys = dict.fromkeys(key for of_run in all_settings for key in of_run)
    not_shown = _not_shown(all_settings)
    values = {key: _values(all_settings, key) for key in keys if key not in not_shown}
    paragraphs = []
    differing = [key for key, different in values.items() if len(different) > 1]
    if differing:
        first = next(iter(settings.values()))
        rows = [(escape(title), _tell_values(s, differing, first)) for title, s in settings.items()]
        paragraphs += [
            "What differs between the runs: of the first all that does, of the others what is not"
            " as in the first.",
            table(("run", "settings"), rows, left=2),
        ]
    common: dict[str, list[str]] = {}
    for key, (value, *others) in values.items():
        section, _, name = key.rpartition(".")
        if not others and value not in _NOTHING:
            common.setdefault(section, []).append(f"`{name}` {value}")
    lines = [f"- {escape(section)}: {', '.join(texts)}" for section, texts in common.items()]
    paragraphs.append("What is the same for all of them, and not 0, off or empty:")
    return [*paragraphs, "\n".join(lines)]


_Settings = Sequence[Mapping[str, object]]


def _not_shown(settings: _Settings) -> tuple[str, ...]:
    is_inception = any(of_run["model.name"] == "inception" for of_run in settings)
    return _NOT_SHOWN if is_inception else _NOT_SHOWN + _OF_INCEPTION


def _tell_values(of_title: _Settings, keys: Iterable[str], first: _Settings) -> str:
    """Gives the settings of a title's runs; but for the first title, where they differ from it."""
    told = {key: _values(of_title, key) for key in keys}
    differing = [key for key in told if of_title is first or told[key] != _values(first, key)]
    return ", ".join(f"`{key}` {' or '.join(told[key])}" for key in differing) or "as the first"


def _flatten(config: Mapping, section: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def _values(settings: _Settings, key: str) -> list[str]:
    """Gives the different values of a setting, as they are shown."""
    return list(dict.fromkeys(_value(of_run.get(key)) for of_run in settings))


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value)) if value else "-"
