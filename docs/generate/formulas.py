"""Renders formulas as MathML, which browsers display without scripts or downloads."""

import re
from typing import Any

from latex2mathml.converter import convert

# As on GitHub, a formula within a line is between dollars without spaces beside them.
_INLINE = re.compile(r"(?<![\w$`])\$(?! )([^$`\n]+?)(?<! )\$(?![\w$`])")
_CODE = re.compile(r"(^ *```.*?^ *```|^ {4}.*?$|`[^`]*`)", re.DOTALL | re.MULTILINE)


def format_math(source: str, *_: Any, **__: Any) -> str:
    """Returns a displayed formula; a formatter of pymdownx.superfences.

    Args:
      source: LaTeX, as GitHub accepts it in a ```math block.
    """
    return f'<div class="formula">{convert(source.strip(), display="block")}</div>'


def replace_inline(markdown: str) -> str:
    """Replaces each `$formula$` outside of code."""
    parts = _CODE.split(markdown)
    parts[::2] = [_INLINE.sub(lambda match: convert(match[1]), part) for part in parts[::2]]
    return "".join(parts)
