"""Calibration: densities go where they save most, targets are checked, sequences are kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig
from flexproxy.calibration import CalibrationError, check_target, choose, texts
from flexproxy.calibration.choose import Point
from flexproxy.calibration.reader import divergence_of
from flexproxy.calibration.result import Calibration


def test_shares_lose_the_least() -> None:
    """Against all ways to share out, on convex curves."""
    grid = [step / 20 for step in range(1, 21)]
    powers = (0.2, 0.5, 0.9)
    curves = [[Point(x, 1 - x**power) for x in grid] for power in powers]
    shares = choose.share_density(curves, 0.3)
    best = min(
        sum(1 - x**p for x, p in zip((a, b, 0.9 - a - b), powers, strict=True))
        for a in grid
        for b in grid
        if 0.9 - a - b >= 0.05 - 1e-9
    )
    assert sum(shares) == pytest.approx(0.9, abs=1e-3)
    assert sum(1 - x**p for x, p in zip(shares, powers, strict=True)) == pytest.approx(best, abs=2e-3)
    assert choose.share_density(curves, 1.0) == [1.0, 1.0, 1.0]
    with pytest.raises(
        CalibrationError, match=r"density: expected at least 0\.0500, which min_budget and .* got 0\.04"
    ):
        choose.share_density(curves, 0.04)


def test_tokens_that_a_model_rules_out_lose_nothing() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    logits[..., 2] = -torch.inf
    dense, own = logits.log_softmax(-1)
    wanted = torch.nn.functional.kl_div(own[:, [0, 1, 3, 4]], dense[:, [0, 1, 3, 4]], log_target=True, reduction="sum")
    assert divergence_of(dense, own) == pytest.approx(float(wanted) / 3, rel=1e-5)


def test_a_dent_in_a_curve_is_climbed_over() -> None:
    """A part that saves little before one that saves much is worth what the two are worth together."""
    dented = [Point(0.1, 0.5), Point(0.2, 0.5), Point(0.3, 0.1), Point(1.0, 0.0)]
    plain = [Point(0.1, 0.2), Point(1.0, 0.0)]
    assert choose.share_density([dented, plain], 0.2) == [0.3, 0.1]


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
        check_target(density, quality)


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
    assert torch.equal(confirm, torch.stack([one[600:800], one[800:]]))
    assert texts.split([ids(10**5, 0)], None, 4096, 2, 16)[0].shape == (1, 4096)


def test_every_text_decides_and_confirms() -> None:
    """Of two kinds of text, one must not decide alone."""
    prose, code = ids(800, 0), ids(800, 1)
    decide, confirm = texts.split([prose, code], 200, 32768, 4, 16)
    assert torch.equal(decide, torch.stack([prose[:200], code[:200]]))
    assert torch.equal(confirm, torch.stack([prose[400:600], code[400:600]]))


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


@pytest.mark.parametrize("num_layers", [1, 5, 80])
def test_the_picture_of_a_large_model_can_be_read(num_layers: int) -> None:
    """Nothing is cut off."""
    pytest.importorskip("matplotlib")
    layer = {"density": [0.15, 0.3, 0.6, 1.0], "divergence": [0.3, 0.1, 0.02, 0.0], "shared": 0.3}
    mean = {"density": 0.3, "divergence": 0.1, "agreement": 0.9}
    evidence = {
        "layers": {str(index): layer for index in range(num_layers)},
        "target": {"density": 0.3},
        "length": 4096,
        "mean": {"confirmed_on": mean, "uniform": mean},
    }
    settings = {index: ProxyConfig(density=0.3) for index in range(num_layers)}
    figure = flexproxy.plot.calibration(Calibration(settings, {}, evidence, {}))
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert max(-box.x0, -box.y0, box.x1 - width, box.y1 - height) <= 0
