"""Examples and the picture of a benchmark, as far as they run on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

import transformers

from tests.accuracy import skip_unless_flex_compiles
from tests.tiny_model import HEADS, LAYERS, save_tiny_model

prefill = pytest.importorskip("examples.prefill")  # not part of a source distribution


@pytest.mark.slow
def test_prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    skip_unless_flex_compiles("cpu")
    if not hasattr(transformers.PreTrainedModel, "set_attn_implementation"):
        pytest.skip("this transformers cannot switch the attention of a model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--model", str(save_tiny_model(tmp_path)), "--length", "512", "--min-budget", "128"]
    settings = ["--num-proxies", "2", "--compare", "64", "--json", str(tmp_path / "result.json")]
    prefill.main([*arguments, *settings, "--gamma", "0.5"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["tokens"], result["compared"], result["device"]) == (512, 64, "CPU")
    assert [len(heads) for heads in result["density"].values()] == [HEADS] * LAYERS
    assert 0 < min(map(min, result["density"].values())) < 1
    assert min(result["seconds"].values()) > 0
    assert 0 <= result["same_next_token"] <= 1
    assert result["divergence"] > 1e-6  # what is compared are two ways, not one twice
    printed = capsys.readouterr().out
    assert "512 tokens, CPU; time to first token" in printed
    assert "same next token" in printed

    with pytest.raises(SystemExit, match=r"--length: expected at most .*, got 9999999; use a longer"):
        prefill.main([*arguments, "--length", "9999999"])


def test_picture_of_the_prefill_benchmark(tmp_path: Path) -> None:
    """Drawn from the result file alone; a contender that failed or was left out at a length has no point there."""
    pytest.importorskip("matplotlib")
    from benchmarks.bench_prefill import draw, model_config

    def cell(milliseconds: float) -> dict[str, Any]:
        return {"median": milliseconds, "peak_mib": 10 * milliseconds}

    rows = [
        {"length": 32768, "sdpa_cudnn": cell(100.0), "sdpa_flash": cell(150.0), "flexproxy_0.10": cell(50.0)},
        {"length": 65536, "sdpa_cudnn": cell(400.0), "flexproxy_0.10": {"error": "OutOfMemoryError: too much"}},
    ]
    draw({"environment": {"gpu": "a GPU"}, "time_to_first_token": rows}, tmp_path / "prefill.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefill.png"]
    assert (tmp_path / "prefill.png").read_bytes().startswith(b"\x89PNG")
    config = model_config(4096)
    heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    assert heads == (4096, 32, 8, 32)
