"""What the release check finds in a wheel."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.release_check import MAX_BYTES, missing_from, problems_of

GOOD = {
    "flexproxy/__init__.py": b"",
    "flexproxy/py.typed": b"",
    "flexproxy-0.1.0.dist-info/METADATA": b"Name: flexproxy",
}


def wheel_of(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "flexproxy.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_good_wheel(tmp_path: Path) -> None:
    assert problems_of(wheel_of(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("flexproxy/table.py", b"x" * (MAX_BYTES + 1), "flexproxy/table.py has 1,000,001 bytes, more than 1,000,000"),
        ("flexproxy/model.safetensors", b"", "flexproxy/model.safetensors is not code"),
        ("flexproxy/results/build.json", b"{}", "flexproxy/results/build.json is not code"),
        ("tests/test_masks.py", b"", "tests/test_masks.py is not part of the package"),
        ("benchmarks/plots.py", b"", "benchmarks/plots.py is not part of the package"),
    ],
)
def test_what_does_not_belong_in_it(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    assert problems_of(wheel_of(tmp_path, GOOD | {name: content})) == [problem]


def test_what_is_missing_from_it(tmp_path: Path) -> None:
    incomplete = {name: content for name, content in GOOD.items() if name != "flexproxy/py.typed"}
    assert problems_of(wheel_of(tmp_path, incomplete)) == ["flexproxy/py.typed is missing"]


def test_what_the_readme_names_and_the_sdist_lacks(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("")
    with tarfile.open(tmp_path / "flexproxy.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "LICENSE", "flexproxy-0.1.0/LICENSE")
    missing = missing_from(tmp_path / "flexproxy.tar.gz")
    assert "LICENSE" not in missing
    assert {"CHANGELOG.md", "examples"} <= set(missing)
