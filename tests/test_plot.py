"""The pictures: the data that they draw, their labels, and that a file is written whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask

import flexproxy
from flexproxy import ProxyConfig, Selection, masks, plot, stats
from flexproxy.inspect.record import Pass, Record
from flexproxy.plot.figures import save_problem

matplotlib = pytest.importorskip("matplotlib")


def drawn(axis: Any) -> Tensor:
    (image,) = axis.images
    return torch.tensor(image.get_array().filled(torch.nan).tolist())


def line_points(line: Any) -> Tensor:
    return torch.tensor(line.get_xydata().tolist())


def selection_of(heads: int, num_queries: int = 250, num_keys: int = 250) -> tuple[Selection, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads)
    q = 2 * torch.randn(2, heads, num_queries, 16, generator=generator)
    k = 2 * torch.randn(2, 1, num_keys, 16, generator=generator)
    config = ProxyConfig(block_size=16, min_budget=32, gamma=0.4)
    real = torch.ones(2, num_keys, dtype=torch.int64)
    real[1, :70] = 0
    mask_mod = masks.shift(masks.causal, num_keys - num_queries)
    mask_mod = and_masks(mask_mod, masks.padding(real))
    return flexproxy.select(q, k, mask_mod=mask_mod, config=config), q, k


@pytest.mark.parametrize("heads", [1, 3, 8, 17, 64])
def test_block_map_of_a_selection(heads: int) -> None:
    """Every head's map, class by class: 2 kept, 1 admissible and dropped, 0 not admissible."""
    selection, _, _ = selection_of(heads)
    kept, density = selection.block_map()[1], selection.density()[1]
    figure = plot.block_map(selection, batch=1)
    axes = [axis for axis in figure.axes if axis.images]
    assert len(axes) == heads
    admissible = selection.admissible[1, 0]
    for head, axis in enumerate(axes):
        assert torch.equal(drawn(axis), (2 * kept[head] + (admissible & ~kept[head])).float())
        assert axis.get_title() == f"head {head}: density {density[head]:.3f}"
    assert [axis.get_xlabel() for axis in axes][-1] == "key block (16 tokens each)"
    assert axes[0].get_ylabel() == "query block (16 tokens each)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "kept",
        "admissible, dropped",
        "not admissible",
    ]
    assert "sequence 1" in figure.get_suptitle()


def test_block_map_of_some_heads_of_another_mask() -> None:
    """A BlockMask that flexproxy did not make: 2 full, 1 partial, 0 not listed."""
    window = torch.tensor([20, 200, 60, 130])
    mask = create_block_mask(
        lambda b, h, q, kv: (q >= kv) & (q - kv < window[h]), None, 4, 512, 512, device="cpu", BLOCK_SIZE=128
    )
    assert mask.full_kv_num_blocks is not None
    figure = plot.block_map(mask, heads=[3, 0], title="mine")
    axes = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title().partition(":")[0] for axis in axes] == ["head 3", "head 0"]
    assert figure.get_suptitle() == "mine"
    distance = torch.arange(512)[:, None] - torch.arange(512)
    for head, axis in zip((3, 0), axes, strict=True):
        allowed = (distance >= 0) & (distance < window[head])
        by_block = allowed.unflatten(1, (4, 128)).unflatten(0, (4, 128))
        want = by_block.any(3).any(1).int() + by_block.all(3).all(1).int()
        assert torch.equal(drawn(axis), want.float())
        assert axis.get_title().endswith(f": {int((want > 0).sum())} blocks")


def test_density_shows_layers_and_heads() -> None:
    selections = {7: selection_of(4)[0], 2: selection_of(4, 100)[0]}
    figure = plot.density(selections, batch=1)
    axis = figure.axes[0]
    want = torch.stack([selections[2].density()[1], selections[7].density()[1]])
    assert torch.equal(drawn(axis), want)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["2", "7"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("query head", "layer")
    assert figure.axes[1].get_ylabel() == "kept blocks / admissible blocks"
    assert f"mean {want.mean():.3f}" in figure.get_suptitle()
    assert torch.equal(drawn(plot.density(want).axes[0]), want)
    assert torch.equal(drawn(plot.density([selections[2], selections[7]], batch=1).axes[0]), want)
    assert torch.equal(drawn(plot.density(selections[2], batch=1).axes[0]), want[:1])


def test_density_of_another_mask() -> None:
    """The remedy that the error names."""
    q, k = torch.randn(1, 4, 512, 16), torch.randn(1, 1, 512, 16)
    window = create_block_mask(
        lambda b, h, q, kv: (q >= kv) & (q - kv < 100), None, None, 512, 512, device="cpu", BLOCK_SIZE=128
    )
    figure = plot.density(torch.stack([stats.density(q, k, window)[0]] * 2))
    assert torch.equal(drawn(figure.axes[0]), torch.full((2, 4), 0.7))  # 7 of 10 blocks


def test_ranking_beside_the_true_mass() -> None:
    selection, q, k = selection_of(3, 100, 250)
    figure = plot.ranking(selection, q, k, head=2, batch=1)
    left, middle, right = figure.axes[:3]
    admissible = selection.admissible[1, 0]
    rank = selection.rank[1, 0].float().masked_fill(~admissible, torch.nan)
    torch.testing.assert_close(drawn(left), rank, equal_nan=True)
    mass = stats.block_mass(q, k, selection, head=2, batch=1)
    shown = mass.masked_fill(~admissible, torch.nan).clamp(min=1e-6)
    torch.testing.assert_close(drawn(middle), shown, equal_nan=True)

    rows = admissible.any(-1)
    lines = {line.get_label(): line_points(line) for line in right.lines}
    count = int(selection.count[1, 2, 0])
    assert float(lines.pop(f"kept: {count} blocks a row")[0, 0]) == count
    ranked, best = (lines[name][:, 1] for name in ("as ranked", "best order there is"))
    for n in range(mass.shape[1]):
        first = selection.rank[1, 0] <= n
        assert float(ranked[n]) == pytest.approx(float((mass * first).sum(-1)[rows].mean()), abs=1e-5)
        assert float(best[n]) == pytest.approx(float(mass.topk(n + 1).values.sum(-1)[rows].mean()), abs=1e-5)
    assert bool((ranked <= best + 1e-6).all())
    assert float(ranked[0]) < float(best[0])


def pass_of(kept: tuple[int, ...], mass: tuple[float, ...] | None, times: tuple[float, float]) -> Pass:
    masses = None if mass is None else (mass,)
    return Pass(640, 640, None, ProxyConfig(), (kept,), ((10,) * len(kept),), masses, *times)


def dense_pass(milliseconds: float) -> Pass:
    return Pass(1, 641, "fewer than 128 new tokens", None, None, None, None, None, milliseconds)


def record_of(passes: dict[int, list[Pass]]) -> Record:
    record = Record({"class": "LlamaForCausalLM"}, {"device": "CPU"})
    for layer, some in passes.items():
        for one in some:
            record._add(layer, lambda one=one: one)  # type: ignore[misc]
    return record


def test_a_record_shows_density_mass_and_time() -> None:
    """Two chunks are taken together; a layer without a sparse pass is grey."""
    chunks = [pass_of((5, 2), (0.98, 0.96), (1.0, 3.0)), pass_of((7, 4), (0.96, 0.94), (2.0, 5.0))]
    figure = plot.record(record_of({0: [*chunks, dense_pass(0.5)], 3: [dense_pass(4.0)]}))
    density, mass, times, *_ = figure.axes
    nan = [torch.nan, torch.nan]
    torch.testing.assert_close(drawn(density), torch.tensor([[0.6, 0.3], nan]), equal_nan=True)
    torch.testing.assert_close(drawn(mass), torch.tensor([[0.97, 0.95], nan]), equal_nan=True)
    assert [axis.get_title() for axis in (density, mass)] == [
        "kept blocks / admissible blocks",
        "recovered attention mass",
    ]
    assert [label.get_text() for label in density.get_yticklabels()] == ["0", "3"]
    containers: list[Any] = list(times.containers)
    bars = {c.get_label(): [(bar.get_x(), bar.get_width()) for bar in c.patches] for c in containers}
    assert bars == {
        "building the mask": [(0.0, 3.0), (0.0, 0.0)],
        "sparse attention": [(3.0, 5.0), (0.0, 0.0)],
        "dense passes": [(8.0, 0.5), (0.0, 4.0)],
    }
    assert times.get_xlabel() == "time of attention, ms"
    assert figure.get_suptitle() == (
        "LlamaForCausalLM: attention of 2 layers in 12.5 ms, density 0.450, recovered mass 0.960"
    )


def test_a_record_without_mass_has_no_map_of_it() -> None:
    figure = plot.record(record_of({0: [pass_of((5, 2), None, (1.0, 3.0))]}), title="mine")
    assert [axis.get_title() for axis in figure.axes if axis.images] == ["kept blocks / admissible blocks"]
    assert figure.get_suptitle() == "mine"
    figure = plot.record(record_of({0: [dense_pass(1.0)]}))
    assert drawn(figure.axes[0]).isnan().all()


def sticks_out(figure: Any) -> float:
    """Inches by which something of a figure lies beyond its border, and would be cut off; 0 if nothing does."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return float(max(-box.x0, -box.y0, box.x1 - width, box.y1 - height, 0.0))


@pytest.mark.parametrize("heads", [8, 32, 64])
def test_nothing_is_cut_off(heads: int) -> None:
    layers = {layer: [pass_of((5,) * heads, (0.98,) * heads, (1.0, 3.0)), dense_pass(1.0)] for layer in range(heads)}
    figure = plot.record(record_of(layers))
    assert sticks_out(figure) == 0
    assert sticks_out(plot.block_map(selection_of(heads)[0])) == 0
    figure.text(0.99, 0.5, "cut off at the border")
    assert sticks_out(figure) > 0.5


@pytest.mark.parametrize("words", ["sixteen layers of WWW ", "folder/of/a-model/", "WORDS IN CAPITALS, MANY OF THEM "])
def test_long_titles_are_wrapped(words: str) -> None:
    """In every picture that takes one; without losing a letter."""
    title = words * (300 // len(words))
    selection, q, k = selection_of(2)
    shares = torch.rand(2, 2)
    for figure in (
        plot.block_map(selection, title=title),
        plot.ranking(selection, q, k, title=title),
        plot.density(shares, title=title),
        plot.record(record_of({0: [dense_pass(1.0)]}), title=title),
    ):
        assert sticks_out(figure) == 0
        assert "".join(figure.get_suptitle().split()) == "".join(title.split())
        assert "\n" in figure.get_suptitle()


def test_a_title_keeps_its_own_lines() -> None:
    assert plot.density(torch.rand(2, 2), title="one\n\ntwo").get_suptitle() == "one\n\ntwo"


def test_nothing_is_cut_off_with_a_thousand_blocks() -> None:
    """A picture has fewer pixels than the map has blocks; its labels are as many as before."""
    q, k = torch.randn(1, 2, 16384, 16), torch.randn(1, 1, 16384, 16)
    selection = flexproxy.select(q, k, config=ProxyConfig(block_size=16, stride=16, gamma=0.4))
    figure = plot.block_map(selection)
    axis = figure.axes[0]
    assert drawn(axis).shape == (1024, 1024)
    assert sticks_out(figure) == 0
    (low, high), ticks = axis.get_xlim(), axis.get_xticks()
    assert 2 <= sum(low <= tick <= high for tick in ticks) <= 6


@pytest.mark.parametrize("surroundings", ["default", "dark_background"])
def test_pictures_are_dark_on_white(surroundings: str, tmp_path: Path) -> None:
    from matplotlib import colors, style
    from matplotlib.image import imread

    with style.context(surroundings):
        figure = plot.block_map(selection_of(2)[0])
        plot.save(figure, tmp_path / "map.png")
        assert colors.to_hex(figure.axes[0].title.get_color()) == "#000000"
    corner = torch.tensor(imread(tmp_path / "map.png").tolist())[0, 0]
    assert corner.tolist() == [1.0, 1.0, 1.0, 1.0]


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
        plot.save(Figure(), target, force=True)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([existing] if existing else [])


def test_what_is_wrong_with_a_path(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    (tmp_path / "old.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    assert save_problem(tmp_path / "new.png", force=False) is None
    assert save_problem(tmp_path / "new.PDF", force=False) is None
    assert save_problem(tmp_path / "old.png", force=True) is None
    for name, force, problem in (
        ("old.png", False, "exists already"),
        ("dangling.png", False, "exists already"),
        ("folder.png", True, "is not a regular file"),
        ("new.txt", False, "no picture format ends in '.txt'"),
        ("new", False, "no picture format ends in ''"),
        ("nowhere/new.png", False, f"the folder {tmp_path / 'nowhere'} does not exist"),
    ):
        assert str(save_problem(tmp_path / name, force)).startswith(problem), name
    with pytest.raises(ValueError, match="exists already"):
        plot.save(Figure(), tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b""


def test_mistakes_are_named() -> None:
    selection, q, k = selection_of(2)
    other = create_block_mask(masks.causal, None, None, 256, 256, device="cpu")
    draw: Any
    for draw, message in (
        (lambda: plot.block_map(other, heads=3), r"heads: expected indices of heads, got int; pass a list of ints"),  # type: ignore[arg-type]
        (lambda: plot.block_map(other, heads="0"), "heads: expected indices of heads, got str"),  # type: ignore[arg-type]
        (lambda: plot.ranking(other, q, k), r"selection: expected a Selection, got BlockMask; pass flexproxy\.select"),  # type: ignore[arg-type]
        (lambda: plot.density([other]), r"got BlockMask; use .* for other masks torch\.stack\(\[stats\.density\("),  # type: ignore[list-item]
        (lambda: plot.density(5), r"densities: expected a Selection for each layer, .* got int; use"),  # type: ignore[arg-type]
        (lambda: plot.density(other), "densities: expected a Selection for each layer, .* got BlockMask; use"),  # type: ignore[arg-type]
        (lambda: plot.density(torch.ones([])), r"densities: expected a tensor \[layers, Hq\], got shape \[\]"),
        (lambda: plot.block_map(masks.causal), "mask: expected a Selection or a BlockMask, got function"),  # type: ignore[arg-type]
        (lambda: plot.block_map(selection, heads=[2]), "heads: expected an index from 0 to 1, got 2"),
        (lambda: plot.block_map(selection, heads=[]), "heads: expected indices of heads, got none"),
        (lambda: plot.block_map(selection, batch=2), "batch: expected an index from 0 to 1, got 2"),
        (lambda: plot.density(torch.ones(3)), r"densities: expected a tensor \[layers, Hq\]"),
        (lambda: plot.density([]), "densities: expected a Selection for each layer"),
        (lambda: plot.record(selection), "record: expected what flexproxy.record gives, got Selection"),  # type: ignore[arg-type]
        (lambda: plot.record(record_of({})), "record: expected at least one forward pass, got none"),
        (lambda: plot.ranking(selection, q, k, head=9), "head: expected an index from 0 to 1, got 9"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            draw()


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib is not installed, .*: pip install matplotlib"):
        plot.density(torch.ones(2, 2))
