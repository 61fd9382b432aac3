"""What the workflows write into a release, and when they refuse a tag."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.release_address import LINK, version_problem, with_address

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "https://github.com/someone/flexproxy"


def test_links_of_the_readme_become_absolute() -> None:
    text = '<source srcset="docs/d.png"><img src="docs/a.png"> [b](docs/b.md#c) [d](https://e.org) [f](#g)'
    raw, blob = f"{ADDRESS}/raw/v1.0/docs", f"{ADDRESS}/blob/v1.0/docs/b.md#c"
    made = f'<source srcset="{raw}/d.png"><img src="{raw}/a.png"> [b]({blob}) [d](https://e.org) [f](#g)'
    assert with_address(text, ADDRESS, "v1.0") == made
    links = re.findall(LINK, with_address((ROOT / "README.md").read_text(), ADDRESS, "main"))
    assert sum("/raw/" in link for link in links) == 2
    assert all(link.startswith(("https://", "#")) for link in links)


@pytest.mark.parametrize("version", ["0.2.0", "0.3.0"])
def test_a_tag_of_another_version(version: str) -> None:
    package, changelog = '__version__ = "0.2.0"\n', "# Changelog\n\n## [0.2.0] - 2026-12-01\n"
    assert (version_problem(f"v{version}", package, changelog) is None) == (version == "0.2.0")
    assert version_problem("v0.2.0", package, "## [Unreleased]\n\n## [0.1.0]\n") is not None
