"""Calibration: planted structure is found, densities go where they help, targets hold on texts kept aside."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig, Selection, masks, stats
from flexproxy.calibration import _raise, choose, texts
from flexproxy.calibration.choose import CalibrationError, Point, Target
from flexproxy.calibration.collect import Layer
from flexproxy.calibration.heads import Grouping, groupings_of, merge, proxy_indices
from flexproxy.calibration.measure import Rows, evaluate, levels_of
from flexproxy.calibration.result import Calibration
from flexproxy.pipeline import dense_block_mask

BLOCK, LENGTH = 16, 512
CONFIG = ProxyConfig.paper(block_size=BLOCK, min_budget=BLOCK, stride=2)


def make_layer(q: Tensor, k: Tensor) -> Layer:
    return Layer(q, k, dense_block_mask(q, k, masks.causal, BLOCK, False), None)


def planted_layer(patterns: list[int], strength: float = 24.0, batch: int = 1, seed: int = 0) -> Layer:
    """Heads of one pattern look at the same blocks, and those of two patterns at different ones. Keys are shared.

    seed: of the noise; the patterns are always the same.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    directions = torch.nn.functional.normalize(normal(max(patterns) + 1, 32), dim=-1)
    hot = [torch.randperm(LENGTH // BLOCK, generator=generator)[:4].tolist() for _ in directions]
    generator.manual_seed(1 + seed)
    k = 0.1 * normal(batch, 1, LENGTH, 32)
    for direction, blocks in zip(directions, hot, strict=True):
        for block in blocks:
            k[:, 0, block * BLOCK + 2 : block * BLOCK + 6] += direction
    q = strength * 32**0.5 / 2 * directions[patterns][None, :, None] + 0.3 * normal(batch, len(patterns), LENGTH, 32)
    return make_layer(q, k.expand(-1, 2, -1, -1))


@pytest.fixture(autouse=True)
def few_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "NUM_LEVELS", 12)


# ------------------------------------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("patterns", [[0, 1, 0, 1], [0, 0, 1, 2, 1, 2, 0, 1]])
def test_planted_groups_are_found(patterns: list[int], device: str) -> None:
    """Heads that look alike, and do not lie side by side, share a proxy; and no more proxies are taken than that."""
    planted = planted_layer(patterns)
    layer = make_layer(planted.q.to(device), planted.k.to(device))
    groupings = groupings_of(layer, CONFIG, Target.of(0.2, None), len(patterns), 64)
    number = max(patterns) + 1
    (found,) = [g for g in groupings if len(g.groups) == number and g.config.groups is not None]
    assert found.config.groups == tuple(patterns)
    level = choose.nearest_levels([found.curve], Target.of(0.2, None))[0]
    kept = [grouping.peaks[:, level].tolist() for grouping in groupings]
    chosen = groupings[choose.fewest(kept, 0.03)]
    assert chosen.config.groups == tuple(patterns)
    (one,) = [grouping for grouping in groupings if len(grouping.groups) == 1]
    assert found.curve[level].recovered > one.curve[level].recovered + 0.05


def test_what_is_measured_of_a_grouping_is_what_the_estimate_does_with_it() -> None:
    layer = planted_layer([0, 1, 0, 1], batch=2, seed=3)
    config = replace(CONFIG, sink_blocks=1, local_blocks=2)
    rows = Rows(layer, config, 50)
    settings: list[dict[str, Any]] = [{"gamma": 0.6}, {"density": 0.3}]
    levels = levels_of(layer, config, settings)
    for groups in ([0, 1, 2, 0], [0, 0, 0, 0]):
        heads = [tuple(h for h, g in enumerate(groups) if g == proxy) for proxy in range(max(groups) + 1)]
        mass, peaks = rows.kept(replace(config, groups=groups), levels.counts)
        for level, setting in enumerate(settings):
            chosen, counts = replace(config, groups=groups, **setting), levels.counts[..., level]
            selection = flexproxy.select(layer.q, layer.k, block_mask=layer.block_mask, config=chosen)
            assert torch.equal(selection.count.long(), counts)
            torch.testing.assert_close(float(selection.density().mean()), float(levels.density[level]))
            want = stats.recovered_mass(layer.q, layer.k, selection, rows=rows.index).mean(0)
            torch.testing.assert_close(mass[:, level].float(), want)
            kept = evaluate(layer, chosen, 50)
            torch.testing.assert_close(torch.tensor(kept.recovered), want)
            torch.testing.assert_close(torch.tensor(kept.density), selection.density().mean(0))
            torch.testing.assert_close(peaks[:, level].float(), peaks_of(layer, selection, rows.index, 1, 2))
            for members, got in zip(heads, rows.peaks_kept(heads, counts), strict=True):
                torch.testing.assert_close(got[list(members)], peaks[list(members), level].float())


def peaks_of(layer: Layer, selection: Selection, index: Tensor, sink: int, local: int) -> Tensor:
    """Share of squared block masses that a selection keeps, without sinks and what is local, by a dense softmax."""
    probability = torch.einsum("bhqd,bhkd->bhqk", layer.q, layer.k.repeat_interleave(2, 1)) / 32**0.5
    probability.masked_fill_(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    squares = probability.softmax(-1)[:, :, index].unflatten(-1, (-1, BLOCK)).sum(-1).square()
    row, block = index // BLOCK, torch.arange(LENGTH // BLOCK)
    squares *= ((block >= sink) & (block <= row[:, None] - local)).float()
    kept = selection.block_map()[:, :, row]
    share: Tensor = (squares * kept).sum((0, 2, 3)) / squares.sum((0, 2, 3)).clamp(min=0.01 * 2 * len(index))
    return share


def test_merging_ends_with_one_group() -> None:
    layer = planted_layer([0, 1, 1, 0])
    rows = Rows(layer, CONFIG, 32)
    merged = merge(rows, torch.full((1, 4, LENGTH // BLOCK), 6))
    assert sorted(merged) == [1, 2, 3, 4]
    for number, groups in merged.items():
        assert len(groups) == number
        assert sorted(head for heads in groups for head in heads) == [0, 1, 2, 3]
        ProxyConfig(groups=proxy_indices(groups))
    assert merged[2] == ((0, 3), (1, 2))


# ----------------------------------------------------------------------------------------------------------- choosing


def measured_of(layers: list[Layer], target: Target) -> dict[int, list[Grouping]]:
    return {index: groupings_of(layer, CONFIG, target, 1, 64) for index, layer in enumerate(layers)}


def test_density_goes_where_it_helps() -> None:
    """One layer looks at few blocks, another everywhere: the second gets more, and together they recover more."""
    target = Target.of(0.4, None)
    narrow, wide = planted_layer([0, 0]), planted_layer([0, 0], 0.0)
    measured = measured_of([narrow, wide], target)
    curves = [measured[index][0].curve for index in (0, 1)]
    shares = choose.levels_for(curves, target)
    assert sum(shares) / 2 == pytest.approx(0.4, abs=1e-4)
    assert shares[0] < 0.35 < 0.45 < shares[1]
    for seed in (0, 9):  # the layers that decided, and others of their kind
        pair = planted_layer([0, 0], seed=seed), planted_layer([0, 0], 0.0, seed=seed)
        ours, same = (
            [evaluate(layer, replace(CONFIG, density=d), 64) for layer, d in zip(pair, densities, strict=True)]
            for densities in (shares, [0.4, 0.4])
        )
        assert sum(sum(kept.density) for kept in ours) <= sum(sum(kept.density) for kept in same) + 0.02
        assert sum(sum(kept.recovered) for kept in ours) > sum(sum(kept.recovered) for kept in same) + 0.05


def test_shares_recover_the_most() -> None:
    """Against all ways to share out, on concave curves."""
    grid = [step / 20 for step in range(1, 21)]
    powers = (0.2, 0.5, 0.9)
    curves = [[Point(x, x**power) for x in grid] for power in powers]
    shares = choose.share_density(curves, 0.3)
    best = max(
        sum(x**p for x, p in zip((a, b, 0.9 - a - b), powers, strict=True))
        for a in grid
        for b in grid
        if 0.9 - a - b >= 0.05 - 1e-9
    )
    assert sum(shares) == pytest.approx(0.9, abs=1e-3)
    assert sum(x**p for x, p in zip(shares, powers, strict=True)) == pytest.approx(best, abs=2e-3)
    assert choose.share_density(curves, 1.0) == [1.0, 1.0, 1.0]
    with pytest.raises(
        CalibrationError, match=r"density: expected at least 0\.0500, which min_budget and .* got 0\.04"
    ):
        choose.share_density(curves, 0.04)


def test_a_dent_in_a_curve_is_climbed_over() -> None:
    """A part that recovers little before one that recovers much is worth what the two are worth together."""
    dented = [Point(0.1, 0.5), Point(0.2, 0.5), Point(0.3, 0.9), Point(1.0, 1.0)]
    plain = [Point(0.1, 0.8), Point(1.0, 1.0)]
    assert choose.share_density([dented, plain], 0.2) == [0.3, 0.1]


def test_the_fewest_proxies_within_the_tolerance() -> None:
    heads = [[0.99, 0.60], [0.97, 0.70], [0.985, 0.69], [0.99, 0.695]]
    assert [choose.fewest(heads, tolerance) for tolerance in (0.2, 0.025, 0.015, 0.007)] == [0, 1, 2, 3]
    assert choose.fewest(heads, 0.001) == 3  # none is within


def test_levels_of_a_quality() -> None:
    target = Target.of(None, 0.98)
    levels = target.levels()
    assert levels == sorted(set(levels))
    assert levels[-1] == 1.0
    assert levels[target.reference()] == pytest.approx(0.98, abs=0.005)
    curve = [Point(level / 2, level - 0.02) for level in levels]
    found = choose.levels_for([curve], target)[0]
    assert found == min(level for level in levels if level - 0.02 >= 0.98)


def test_min_budget_does_not_hide_a_gamma_that_is_too_low() -> None:
    """Of the levels that keep no more than min_budget, the highest is taken: longer prompts will need it."""
    target = Target.of(None, 0.9)
    levels = target.levels()
    curve = [Point(max(0.3, level / 2), max(0.95, level)) for level in levels]
    assert choose.levels_for([curve], target) == [max(level for level in levels if level <= 0.6)]


def test_texts_kept_aside_raise_a_gamma_that_does_not_reach_the_quality_on_them() -> None:
    target = Target.of(None, 0.9)
    layer = planted_layer([0, 0, 0, 0], 8.0)

    def recovered(gamma: float) -> float:
        return fmean(evaluate(layer, replace(CONFIG, gamma=gamma), 64).recovered)

    reaching = [level for level in target.levels() if recovered(level) >= 0.9]
    assert target.levels()[1] < reaching[0] < reaching[-1] == 1.0
    for gamma, raised in ((target.levels()[0], reaching[0]), (reaching[0], reaching[0]), (reaching[-2], reaching[-2])):
        assert _raise(layer, replace(CONFIG, gamma=gamma), 0.9, target, 64) == replace(CONFIG, gamma=raised)


@pytest.mark.parametrize(
    ("density", "quality", "message"),
    [
        (None, None, "density, quality: expected one of the two"),
        (0.2, 0.9, "density, quality: expected one of the two"),
        (0, None, r"density: expected a number in \(0, 1\], got 0"),
        (None, 1.5, r"quality: expected a number in \(0, 1\], got 1\.5"),
        (float("nan"), None, r"density: expected a number in \(0, 1\], got nan"),
        (True, None, r"density: expected a number in \(0, 1\], got True"),
    ],
)
def test_a_wrong_target(density: Any, quality: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Target.of(density, quality)


# -------------------------------------------------------------------------------------------------------------- texts


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(0, 50000, (length,), generator=torch.Generator().manual_seed(seed))


def test_sequences_that_decide_are_not_those_that_confirm() -> None:
    one, two = ids(1000, 0), ids(1100, 1)
    decide, confirm = texts.split([one, two[None]], None, 32768, 4, 16)
    assert torch.equal(decide, one[None, :992])
    assert torch.equal(confirm, two[None, :992])
    decide, confirm = texts.split([one.tolist()], 200, 32768, 4, 16)
    assert torch.equal(decide, torch.stack([one[:200], one[200:400]]))
    assert torch.equal(confirm, torch.stack([one[400:600], one[600:800]]))
    assert texts.split([ids(10**5, 0)], None, 4096, 2, 16)[0].shape == (1, 4096)


@pytest.mark.parametrize(
    ("given", "length", "error", "message"),
    [
        (
            [],
            None,
            CalibrationError,
            r"texts: expected two sequences of 16 tokens at least, .* got texts of \[\] tokens",
        ),
        (
            [ids(31, 0)],
            None,
            CalibrationError,
            r"texts: expected two sequences of 16 .* got texts of \[31\] tokens; use",
        ),
        (
            [ids(300, 0)],
            200,
            CalibrationError,
            r"texts: expected two sequences of 200 .* use longer texts or a lower len",
        ),
        (["words"], None, TypeError, r"texts: expected token ids of each text, \[S\], got str; use tokenizer"),
        ([ids(300, 0).float()], None, TypeError, r"texts: expected token ids .* got torch\.float32 of shape \[300\]"),
        ([ids(300, 0).view(2, 150)], None, TypeError, r"got torch\.int64 of shape \[2, 150\]"),
    ],
)
def test_texts_that_are_too_short(given: Any, length: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        texts.split(given, length, 32768, 4, 16)


def test_calibration_needs_no_transformers_until_it_runs() -> None:
    assert flexproxy.calibrate.__module__ == "flexproxy.calibration"
    with pytest.raises(AttributeError, match="module 'flexproxy' has no attribute 'calibrat'"):
        flexproxy.calibrat  # type: ignore[attr-defined]  # noqa: B018


def test_a_file_is_read_without_a_model(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"flexproxy": 1, "model": {}, "layers": {"3": {"density": 0.2, "groups": [0, 1, 0]}}}))
    assert ProxyConfig.load_layers(path) == {3: ProxyConfig(density=0.2, groups=(0, 1, 0))}
    with pytest.raises(ValueError, match=r"path: cannot read .*: No such file or directory; pass the path of a JSON"):
        ProxyConfig.load_layers(tmp_path / "nothing.json")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r'path: expected \{"flexproxy": 1, '):
        ProxyConfig.load_layers(str(path))


@pytest.mark.parametrize(("num_layers", "num_heads"), [(1, 1), (5, 8), (80, 64)])
def test_the_picture_of_a_large_model_can_be_read(num_layers: int, num_heads: int) -> None:
    """Markers do not touch, and nothing is cut off."""
    pytest.importorskip("matplotlib")
    part = {"density": [0.3] * num_heads, "recovered": [0.9] * num_heads}
    mean = {"recovered": 0.9, "density": 0.3}
    evidence = {
        "layers": {str(index): {"uniform": part, "confirmed_on": part} for index in range(num_layers)},
        "target": {"density": 0.3},
        "length": 4096,
        "mean": {"confirmed_on": mean, "uniform": mean},
    }
    settings = {index: ProxyConfig(num_proxies=2) for index in range(num_layers)}
    figure = flexproxy.plot.calibration(Calibration(settings, {}, evidence, {}))
    figure.draw_without_rendering()
    for axis in figure.axes[1:]:
        lines: list[Any] = [container[0] for container in axis.containers]
        at = sorted(axis.transData.transform((x, 0.3))[0] for line in lines for x in line.get_xdata())
        assert len(at) == 2 * num_layers
        assert min(b - a for a, b in pairwise(at)) * 72 / figure.dpi > lines[0].get_markersize()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert max(-box.x0, -box.y0, box.x1 - width, box.y1 - height) <= 0
