"""Formulas as MathML, which browsers draw by themselves: the site needs no script for them, and no other host.

A hook of mkdocs (see mkdocs.yml).
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of a formula, in a line or on its own.
_FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL)


def _as_mathml(match: re.Match[str]) -> str:
    display = "block" if match[1] == "[" else "inline"
    return str(convert(html.unescape(match[2]), display=display))


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas of a page's HTML."""
    return _FORMULA.sub(_as_mathml, content)
