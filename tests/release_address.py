"""Write the address of the repository into what leaves it: README's links, the metadata, the documentation.

    python tests/release_address.py https://github.com/OWNER/flexproxy [v0.2.0]

The workflows run it in their own checkout, before they build: a clone has relative links, and no address that a fork
would have to change. With a tag it also fails unless the package and the top of CHANGELOG.md have the tag's version.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = r'(?:\]\(|src="|srcset=")([^)"]+)'  # of README: a link, or a picture


def with_address(readme: str, address: str, ref: str) -> str:
    """README with absolute links; pictures, which are HTML there, are linked as files, not as pages."""
    blobs = re.sub(r"\]\((?!https?://|#)", f"]({address}/blob/{ref}/", readme)
    return re.sub(r'(src|srcset)="(?!https?://)', rf'\1="{address}/raw/{ref}/', blobs)


def version_problem(tag: str, package: str, changelog: str) -> str | None:
    """Why a tag is not that of the package and its changelog."""
    version = re.search(r'^__version__ = "([^"]+)"', package, re.MULTILINE)
    entry = re.search(r"^## \[(\d[^]]*)\]", changelog, re.MULTILINE)
    found = [match[1] if match else "none" for match in (version, entry)]
    if found == [tag.removeprefix("v")] * 2:
        return None
    return f"tag {tag}: expected this version in __init__.py and on top of CHANGELOG.md, got {' and '.join(found)}"


def main(address: str, tag: str | None = None) -> None:
    if tag is not None:
        problem = version_problem(
            tag, (ROOT / "flexproxy/__init__.py").read_text(), (ROOT / "CHANGELOG.md").read_text()
        )
        if problem:
            raise SystemExit(problem)
    ref = tag or "main"
    owner, name = address.rsplit("/", 2)[1:]
    site = f"https://{owner}.github.io/{name}/"
    edits: dict[str, Callable[[str], str]] = {
        "README.md": lambda text: with_address(text, address, ref),
        "pyproject.toml": lambda text: text.replace(
            "[project.urls]\n",
            f'[project.urls]\nRepository = "{address}"\nIssues = "{address}/issues"\n'
            f'Changelog = "{address}/blob/{ref}/CHANGELOG.md"\n',
        ),
        "mkdocs.yml": lambda text: f"repo_url: {address}\nsite_url: {site}\n{text}",
    }
    for name, edit in edits.items():
        path = ROOT / name
        path.write_text(edit(path.read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
