"""What mkdocs changes in the HTML of the pages (see mkdocs.yml).

Formulas become MathML, which browsers draw by themselves: the site needs no script for them, and no other host. Long
names in tables get places to break, so that a phone shows all columns.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of a formula, in a line or on its own.
_FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL)
_CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
_CODE = re.compile(r"<code>[^<]*</code>")
_JOINT = re.compile(r'(?<=\w)(?:[_.(](?=[A-Za-z"])|=(?="))')


def _as_mathml(match: re.Match[str]) -> str:
    display = "block" if match[1] == "[" else "inline"
    return str(convert(html.unescape(match[2]), display=display))


def _breaking(cell: re.Match[str]) -> str:
    return _CODE.sub(lambda code: _JOINT.sub(r"\g<0><wbr>", code[0]), cell[0])


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas of a page's HTML, and let code in its tables break after ``_``, ``.``, ``=`` and ``(``."""
    return _CELL.sub(_breaking, _FORMULA.sub(_as_mathml, content))
