"""Examples, as far as they run on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

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
