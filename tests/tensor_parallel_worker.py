"""One of the processes that tests/test_transformers_parallel.py starts with torchrun: logits of a sharded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import flexproxy
from flexproxy.integrations.transformers import configure
from tests.transformers_models import interpreted, make_tokens


def main(folder: Path) -> None:
    """Reads a model and ``cases.json``, the settings to try; writes ``rank<n>.json``: logits, or an error, of each."""
    torch.set_num_threads(1)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", attn_implementation="flexproxy"
    )
    results = []
    for settings in json.loads((folder / "cases.json").read_text()):
        configure(model, flexproxy.ProxyConfig(**settings))
        try:
            with torch.no_grad(), interpreted("cpu"):
                results.append(model(input_ids=make_tokens(1, 300), use_cache=False).logits.tolist())
        except ValueError as error:
            results.append(str(error))
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
