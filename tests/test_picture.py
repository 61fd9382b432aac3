"""The picture of a selection: what it shows, and that a file is written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexproxy._picture import draw_block_map, picture_problem

pytest.importorskip("matplotlib")

KEPT, DROPPED, INADMISSIBLE = (0x1F, 0x3B, 0x73), (0xF0, 0xB4, 0x4C), (0xE8, 0xE8, 0xE8)
CAUSAL = torch.ones(8, 8, dtype=torch.bool).tril()


def draw(path: Path, kept: torch.Tensor) -> None:
    draw_block_map(path, kept, CAUSAL, [0.5] * len(kept), "title")


def pixels(path: Path) -> dict[tuple[int, int, int], int]:
    """How many pixels of the picture have each of the three colours."""
    from matplotlib.image import imread

    rgb = torch.tensor(imread(path))[..., :3].mul(255).round().int()
    return {colour: int((rgb == torch.tensor(colour)).all(-1).sum()) for colour in (KEPT, DROPPED, INADMISSIBLE)}


@pytest.mark.parametrize("heads", [1, 3, 8, 17])
def test_the_three_kinds_of_blocks_are_drawn_in_proportion(tmp_path: Path, heads: int) -> None:
    draw(tmp_path / "map.png", torch.eye(8, dtype=torch.bool).repeat(heads, 1, 1))
    found = pixels(tmp_path / "map.png")
    kept = found[KEPT]
    assert kept > 0
    # Of 64 blocks 8 are kept, 28 dropped and 28 inadmissible; the legend adds a little to each.
    assert found[DROPPED] == pytest.approx(kept * 28 / 8, rel=0.2)
    assert found[INADMISSIBLE] == pytest.approx(kept * 28 / 8, rel=0.2)
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_kept_but_inadmissible_blocks_are_not_shown_as_kept(tmp_path: Path) -> None:
    draw(tmp_path / "all.png", torch.ones(1, 8, 8, dtype=torch.bool))
    draw(tmp_path / "causal.png", CAUSAL[None])
    assert pixels(tmp_path / "all.png") == pixels(tmp_path / "causal.png")


@pytest.mark.parametrize("existing", [None, b"precious"])
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bytes | None
) -> None:
    from matplotlib.figure import Figure

    def half(self: Figure, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    target = tmp_path / "map.png"
    if existing is not None:
        target.write_bytes(existing)
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space left"):
        draw(target, CAUSAL[None])
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([existing] if existing else [])


def test_what_is_wrong_with_a_path(tmp_path: Path) -> None:
    (tmp_path / "old.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    assert picture_problem(tmp_path / "new.png", overwrite=False) is None
    assert picture_problem(tmp_path / "new.PDF", overwrite=False) is None
    assert picture_problem(tmp_path / "old.png", overwrite=True) is None
    for name, overwrite, problem in (
        ("old.png", False, "exists already"),
        ("dangling.png", False, "exists already"),
        ("folder.png", True, "is a folder"),
        ("new.txt", False, "no picture format ends in '.txt'"),
        ("new", False, "no picture format ends in ''"),
        ("nowhere/new.png", False, f"the folder {tmp_path / 'nowhere'} does not exist"),
    ):
        assert str(picture_problem(tmp_path / name, overwrite)).startswith(problem), name
