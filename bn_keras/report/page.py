"""Writes a report as Markdown and as one self-contained HTML file."""

import base64
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import markdown
import matplotlib
from etils import epath
from markdown.extensions.toc import slugify_unicode
from markdown.treeprocessors import Treeprocessor

from bn_keras.report.provenance import describe_provenance
from bn_keras.report.sections import Section, escape
from bn_keras.runs.history import Results
from bn_keras.storage import move, unfinished_folder, writing

# A plot's name is used in a link without escaping.
_PLOT_NAME = re.compile(r"\w[\w-]*\.svg", re.ASCII)

# A table with more columns than this does not fit on a phone.
_MAX_COLUMNS_ON_A_PHONE = 3

_PAPER = (
    "Our measurements beside the results of Ioffe & Szegedy, [*Batch Normalization: Accelerating"
    " Deep Network Training by Reducing Internal Covariate Shift*](https://arxiv.org/abs/1502.03167)."
)


def write_report(
    title: str,
    sections: Sequence[Section],
    results: Results,
    folder: str | os.PathLike,
    command: str,
    num_missing: int = 0,
) -> None:
    """Writes report.md with its plots, and report.html, which contains the plots.

    The summaries of the sections precede the sections.

    The whole report is composed before any file is written. If that fails, or if the disk is full,
    the previous report remains as it was.

    Args:
      title: title of the report, plain text.
      sections: sections in order; "How this report was made" is appended.
      results: runs that the sections are about.
      folder: folder of the files, created if missing.
      command: command that reproduces the report.
      num_missing: number of the command's runs that have not ended.

    Raises:
      StorageError: the folder cannot be written.
      ValueError: a section does not show exactly the plots that it has.
    """
    sections = [*sections, describe_provenance(results, command, num_missing)]
    plots = _render_plots(sections)
    contents = "\n".join(f"- [{escape(s.title)}](#{_anchor(s.title)})" for s in sections)
    summary = [s.summary for s in sections if s.summary]
    parts = [f"# {escape(title)}", _PAPER, *summary, contents]
    for section in sections:
        parts += [f"## {escape(section.title)}", section.body.strip("\n")]
    text = "\n\n".join(parts) + "\n"
    files = plots | {
        "report.md": text.encode(),
        "report.html": _to_html(title, text, plots, len(summary)).encode(),
    }
    _write(files, epath.Path(folder))


def _anchor(title: str) -> str:
    return slugify_unicode(title, "-")


def _render_plots(sections: Sequence[Section]) -> dict[str, bytes]:
    """Returns the plots as SVG files, by name."""
    plots: dict[str, bytes] = {}
    for section in sections:
        shown = sorted(re.findall(r"!\[[^]]*\]\(([^)]*)\)", section.body))
        valid = {name for name in section.plots if _PLOT_NAME.fullmatch(name)} - plots.keys()
        if not shown == sorted(valid) == sorted(section.plots):
            raise ValueError(
                f"section {section.title!r} shows the plots {shown} and has"
                f" {sorted(section.plots)}: expected each plot to be shown once, under a name such"
                " as a_b.svg that is unique in the report"
            )
        for name, plot in section.plots.items():
            image = io.BytesIO()
            # The same plot is always the same file, without version and date, and with a fixed salt
            # of the names inside. Text is drawn as shapes, which look the same everywhere.
            with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "bn_keras"}):
                plot.savefig(image, format="svg", metadata={"Creator": None, "Date": None})
            plots[name] = image.getvalue()
    return plots


class _Layout(Treeprocessor):
    """Embeds the plots in the page, frames the summary, and prepares wide tables for a phone.

    Args:
      images: plots by name.
      num_summaries: number of paragraphs of the summary, after the heading and a first paragraph.
    """

    def __init__(self, images: Mapping[str, bytes], num_summaries: int) -> None:
        super().__init__()
        self._images = images
        self._num_summaries = num_summaries

    def run(self, root: ElementTree.Element) -> None:
        for image in root.iter("img"):
            encoded = base64.b64encode(self._images[image.attrib["src"]]).decode()
            image.set("src", f"data:image/svg+xml;base64,{encoded}")
        for table in root.iter("table"):
            _label_cells(table)
        first = 2
        _wrap(root, first + self._num_summaries, 1, "nav", {})
        if self._num_summaries:
            _wrap(root, first, self._num_summaries, "div", {"class": "summary"})


def _wrap(
    root: ElementTree.Element, first: int, count: int, tag: str, attributes: dict[str, str]
) -> None:
    """Puts some children of the root into a new element."""
    box = ElementTree.Element(tag, attributes)
    box.extend(root[first : first + count])
    root[first : first + count] = [box]


def _label_cells(table: ElementTree.Element) -> None:
    """Adds the column's name to each cell of a wide table, whose rows a phone shows as blocks."""
    names = ["".join(cell.itertext()) for cell in table.iter("th")]
    if len(names) <= _MAX_COLUMNS_ON_A_PHONE:
        return
    table.set("class", "wide")
    for row in table.iterfind("tbody/tr"):
        for name, cell in zip(names, row, strict=True):
            cell.set("data-label", name)
            # One element, so that a line of the block has two parts: the name and the content.
            content = ElementTree.Element("span")
            content.text, cell.text = cell.text, None
            content.extend(list(cell))
            cell[:] = [content]


def _to_html(title: str, text: str, plots: Mapping[str, bytes], num_summaries: int) -> str:
    converter = markdown.Markdown(extensions=["tables", "toc", "sane_lists"])
    # HTML in the Markdown is shown as text.
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    # Priority below 20: runs after inline Markdown has been turned into elements.
    layout = _Layout(plots, num_summaries)
    converter.treeprocessors.register(layout, "layout", priority=10)
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=converter.convert(text))


def _write(files: Mapping[str, bytes], folder: epath.Path) -> None:
    """Writes all files before the first of them replaces that of an earlier report."""
    with writing(f"the report in {folder}"), unfinished_folder(folder) as unfinished:
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        for name in files:
            move(unfinished / name, folder / name)


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
* { box-sizing: border-box; }
body { max-width: 62rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem; background: #fff;
  color: #1a1a1a; font: 1.0625rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; }
h1 { font-size: 1.9rem; margin-bottom: .75rem; }
h2 { font-size: 1.4rem; margin-top: 3rem; padding-top: .75rem; border-top: 1px solid #ccc; }
h3 { font-size: 1.1rem; margin-top: 2rem; }
.summary { padding: .25rem 1.25rem; background: #f2f6fa; border-left: 4px solid #0072b2;
  font-size: 1.125rem; }
nav ul { margin: 1rem 0; padding: 0; list-style: none; font-size: .95rem; }
nav li { display: inline-block; margin: .15rem 1.25rem .15rem 0; }
li { margin: .25rem 0; }
a { color: #0b5394; }
img { display: block; width: 100%; max-width: 44rem; height: auto; margin: 1.25rem auto; }
table { width: 100%; margin: 1.25rem 0; border-collapse: collapse; font-size: .9rem;
  line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; overflow-wrap: normal; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; min-width: 8rem; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono",
  "DejaVu Sans Mono", monospace; font-size: .88em; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: .75rem 1rem; background: #f5f5f5; border-radius: 4px;
  line-height: 1.4; }
pre code { overflow-wrap: normal; white-space: pre-wrap; }
@media screen and (min-width: 60rem) { td[style*="right"] { white-space: nowrap; } }
@media screen and (max-width: 40rem) {
  body { margin-top: 1.25rem; font-size: 1rem; }
  h1 { font-size: 1.5rem; }
  .summary { padding: .1rem 1rem; font-size: 1rem; }
  nav li { display: block; }
  /* Each row of a wide table becomes a block, each cell a line with its column's name. */
  table.wide thead { display: none; }
  table.wide, table.wide tbody { display: block; }
  table.wide tr { display: block; padding: .5rem 0; border-bottom: 1px solid #bbb; }
  table.wide td { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0;
    border: 0; }
  table.wide td:not(:first-child)[style] { text-align: right !important; }
  table.wide td:first-child { font-weight: 600; }
  table.wide td:not(:first-child)::before { content: attr(data-label); flex: 0 0 auto;
    max-width: 50%; color: #555; text-align: left; }
  table.wide td > span { flex: 1 1 auto; min-width: 0; overflow-wrap: anywhere; }
}
@media print {
  @page { margin: 16mm; }
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  h2 { margin-top: 1.5rem; }
  h1, h2, h3 { break-after: avoid; }
  table { font-size: 8pt; }
  th, td { padding: .25rem .4rem; }
  th:first-child, td:first-child { min-width: 0; }
  .summary { font-size: 10.5pt; background: none; }
  tr, img { break-inside: avoid; }
  img { max-width: 32rem; }
  pre { background: none; border: 1px solid #ccc; }
  a { color: inherit; text-decoration: none; }
}
"""
