"""MkDocs' hooks: the generated parts of pages, and formulas.

A page contains `<!-- generate: NAME -->` in place of a part that one of the functions below
returns. Generated parts are never files, so that they cannot be out of date.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import diagrams
import formulas
import reference_pages

GENERATORS: dict[str, Callable[[], str]] = {
    "figure_5": diagrams.figure_5,
    "layer": diagrams.layer,
    "replicas": diagrams.replicas,
    "modules": diagrams.modules,
    "training": diagrams.training,
    "configs": reference_pages.configs,
    "settings": reference_pages.settings,
    "commands": reference_pages.commands,
    "exit_statuses": reference_pages.exit_statuses,
    "changelog": reference_pages.changelog,
}

_FLAG = re.compile(r"<code>(--[^ <]{1,34})</code>")
_MARKER = re.compile(r"<!-- generate: (\w+) -->")


def on_config(config: Any) -> Any:
    """Lets ```math blocks be formulas."""
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": "math", "class": "formula", "format": formulas.format_math}]
    }
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Renders the formulas of a page and fills in its generated parts."""
    markdown = formulas.replace_inline(markdown)
    return _MARKER.sub(lambda match: generate(match[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keeps the dashes and the name of a flag on one line."""
    return _FLAG.sub(r'<code class="flag">\1</code>', html)


@functools.cache
def generate(name: str) -> str:
    """Returns a generated part; a KeyError names an unknown one."""
    return GENERATORS[name]()
