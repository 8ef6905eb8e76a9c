"""Writes a report as Markdown and as one self-contained HTML file."""

import base64
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import markdown
from etils import epath
from markdown.extensions.toc import slugify_unicode
from markdown.treeprocessors import Treeprocessor

from bn_keras.report.provenance import describe_provenance
from bn_keras.report.sections import Section, escape
from bn_keras.runs.history import Results
from bn_keras.storage import move, unfinished_folder, writing

# A plot's name is used in a link without escaping.
_PLOT_NAME = re.compile(r"\w[\w-]*\.png", re.ASCII)


def write_report(
    title: str,
    sections: Sequence[Section],
    results: Results,
    folder: str | os.PathLike,
    command: str,
) -> None:
    """Writes report.md with its plots, and report.html, which contains the plots.

    The whole report is composed before any file is written. If that fails, or if the disk is full,
    the previous report remains as it was.

    Args:
      title: title of the report, plain text.
      sections: sections in order; "How this report was made" is appended.
      results: runs that the sections are about.
      folder: folder of the files, created if missing.
      command: command that reproduces the report.

    Raises:
      StorageError: the folder cannot be written.
      ValueError: a section does not show exactly the plots that it has.
    """
    sections = [*sections, describe_provenance(results, command)]
    plots = _render_plots(sections)
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


def _anchor(title: str) -> str:
    return slugify_unicode(title, "-")


def _render_plots(sections: Sequence[Section]) -> dict[str, bytes]:
    """Returns the plots as PNG files, by name."""
    plots: dict[str, bytes] = {}
    for section in sections:
        shown = set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", section.body))
        valid = {name for name in section.plots if _PLOT_NAME.fullmatch(name)} - plots.keys()
        if not shown == valid == section.plots.keys():
            raise ValueError(
                f"section {section.title!r} shows the plots {sorted(shown)} and has"
                f" {sorted(section.plots)}: expected each plot to be shown once, under a name such"
                " as a_b.png that is unique in the report"
            )
        for name, plot in section.plots.items():
            image = io.BytesIO()
            # Without matplotlib's version, the same plot is always the same file.
            plot.savefig(image, format="png", dpi=160, metadata={"Software": None})
            plots[name] = image.getvalue()
    return plots


class _Layout(Treeprocessor):
    """Embeds the plots in the page, and makes wide tables scroll sideways."""

    def __init__(self, images: Mapping[str, bytes]) -> None:
        super().__init__()
        self._images = images

    def run(self, root: ElementTree.Element) -> None:
        for parent in list(root.iter()):
            for index, child in enumerate(parent):
                if child.tag == "img":
                    image = base64.b64encode(self._images[child.attrib["src"]]).decode()
                    child.set("src", f"data:image/png;base64,{image}")
                elif child.tag == "table":
                    # The tab stop makes the table scroll by keyboard.
                    box = ElementTree.Element("div", {"class": "wide", "tabindex": "0"})
                    box.append(child)
                    box.tail, child.tail = child.tail, None
                    parent[index] = box


def _to_html(title: str, text: str, plots: Mapping[str, bytes]) -> str:
    converter = markdown.Markdown(extensions=["tables", "toc", "sane_lists"])
    # HTML in the Markdown is shown as text.
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    # Priority below 20: runs after inline Markdown has been turned into elements.
    converter.treeprocessors.register(_Layout(plots), "layout", priority=10)
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
