"""Prefill a long text with any decoder of transformers, by sdpa and by flexproxy, and compare.

    python examples/prefill.py                                             # the needle model, on Python source
    python examples/prefill.py --model meta-llama/Llama-3.1-8B --text book.txt --length 131072 --min-budget 2048
    torchrun --nproc-per-node 4 examples/prefill.py --model ... --tensor-parallel   # every GPU has some of the heads

Prints the time to the first token, how often both predict the same next token at the end of the text, and the density
of every layer, kept blocks / admissible blocks (of the first process's heads). Models are read from safetensors; a name
is looked up on the Hugging Face hub, a folder is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexproxy
from flexproxy import ProxyConfig
from flexproxy.cli.needle import VOCAB_SIZE
from flexproxy.integrations.transformers import configure

NEEDLE_MODEL = Path(__file__).resolve().parent / "needle"
REPEATS = 3


def load_model(name: str, tensor_parallel: bool) -> Any:
    """The model, on one device, or with its heads on all of torchrun's; in float32 on a CPU, 16 bits on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    placement: dict[str, Any] = {"tp_plan": "auto"} if tensor_parallel else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="sdpa", use_safetensors=True, **placement
    ).eval()
    if device == "cpu" or model.dtype == torch.float32:
        model = model.to(torch.float32 if device == "cpu" else torch.bfloat16)
    return model if tensor_parallel else model.to(device)


def read_tokens(path: Path, length: int, model: str, vocab_size: int) -> Tensor:
    """The first tokens of a text, ``[1, length]``. The needle model reads bytes."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SystemExit(f"--text: expected a file to read, got {path}: {error.strerror}; name a text") from error
    if vocab_size == VOCAB_SIZE:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]
    else:
        tokens = AutoTokenizer.from_pretrained(model)(text.decode(errors="replace"), return_tensors="pt").input_ids
    if tokens.shape[1] < length:
        raise SystemExit(
            f"--length: expected at most {tokens.shape[1]}, the tokens of {path}, got {length}; use a longer text"
        )
    return tokens[:, :length]


class Prefills:
    """Runs prefills, and shows how far the layers are."""

    def __init__(self, model: Any, tokens: Tensor, compare: int, progress: Progress) -> None:
        self.model, self.tokens, self.compare, self.progress = model, tokens.to(model.device), compare, progress

    @contextmanager
    def _shown(self, stage: str) -> Iterator[None]:
        layers = [m for m in self.model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        task = self.progress.add_task(stage, total=len(layers))
        hooks = [layer.register_forward_hook(lambda *_: self.progress.advance(task)) for layer in layers]
        yield
        for hook in hooks:
            hook.remove()
        self.progress.remove_task(task)

    @torch.no_grad()
    def run(self, stage: str) -> tuple[Tensor, float]:
        """Logits of the last ``compare`` tokens, and the seconds that it took."""
        with self._shown(stage):
            self._wait()
            begin = time.perf_counter()
            logits = self.model(input_ids=self.tokens, use_cache=True, logits_to_keep=self.compare).logits
            self._wait()
            return logits[0].float(), time.perf_counter() - begin

    def timed(self, name: str) -> tuple[Tensor, float, float]:
        """Logits, the median of the seconds, and the seconds of the first prefill, which compiles kernels."""
        self.model.set_attn_implementation(name)
        _, first = self.run(f"{name}, first")
        runs = [self.run(f"{name}, timed {i + 1} of {REPEATS}") for i in range(REPEATS)]
        return runs[0][0], statistics.median(seconds for _, seconds in runs), first

    def _wait(self) -> None:
        if self.tokens.is_cuda:
            torch.cuda.synchronize(self.tokens.device)


def compare(model: Any, tokens: Tensor, last: int, progress: Progress) -> dict[str, Any]:
    """Both ways, timed; then once more to look at what every layer keeps."""
    prefills = Prefills(model, tokens, last, progress)
    dense, dense_seconds, _ = prefills.timed("sdpa")
    sparse, sparse_seconds, first_seconds = prefills.timed("flexproxy")
    with flexproxy.record(model) as record:
        prefills.run("flexproxy, looking at the selections")
    divergence = F.kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return {
        "tokens": tokens.shape[1],
        "compared": last,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU",
        "seconds": {"sdpa": dense_seconds, "flexproxy": sparse_seconds, "flexproxy_first": first_seconds},
        "same_next_token": (sparse.argmax(-1) == dense.argmax(-1)).float().mean().item(),
        "divergence": divergence.mean().item(),  # Kullback-Leibler, nats
        "density": {layer: passes[0].density and passes[0].density[0] for layer, passes in record.layers.items()},
    }


def show(result: dict[str, Any], console: Console) -> None:
    seconds = result["seconds"]
    console.print(f"{result['tokens']} tokens, {result['device']}; time to first token")
    console.print(f"  sdpa       {seconds['sdpa']:8.3f} s")
    console.print(f"  flexproxy  {seconds['flexproxy']:8.3f} s   (the first time {seconds['flexproxy_first']:.1f} s)")
    share, divergence = result["same_next_token"], result["divergence"]
    console.print(f"same next token at {share:.1%} of the last {result['compared']}; divergence {divergence:.4f} nats")
    table = Table("layer", "density", "least and most of a head", box=None)
    for layer, heads in result["density"].items():
        row = (
            ("dense", "") if heads is None else (f"{statistics.mean(heads):.3f}", f"{min(heads):.3f}  {max(heads):.3f}")
        )
        table.add_row(str(layer), *row)
    console.print(table)


def main(
    *,
    model: Annotated[str, typer.Option(help="Name or folder of a model.")] = str(NEEDLE_MODEL),
    text: Annotated[Path, typer.Option(help="Text file; by default the source of argparse.")] = Path(argparse.__file__),
    length: Annotated[int, typer.Option(min=1, help="Tokens of the text to prefill.")] = 8192,
    last: Annotated[int, typer.Option("--compare", min=1, help="Last tokens whose predictions are compared.")] = 1024,
    gamma: Annotated[float, typer.Option(help="Attention mass that every budget must reach.")] = 0.95,
    density: Annotated[float | None, typer.Option(help="Mean density to reach, instead of --gamma.")] = None,
    min_budget: Annotated[int, typer.Option(help="Tokens that a row keeps at least.")] = 512,
    num_proxies: Annotated[
        int | None, typer.Option(help="Proxy heads; by default one for each key/value head.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Every how many tokens one is sampled; by default 4.")] = None,
    outliers: Annotated[bool, typer.Option("--outliers", help="Every key, the outlier of every 8 queries.")] = False,
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="Under torchrun: divide the heads of each layer.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Prefill a long text with any decoder of transformers, by sdpa and by flexproxy, and compare."""
    loaded = load_model(model, tensor_parallel)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not distributed or torch.distributed.get_rank() == 0
    settings: dict[str, Any] = {"gamma": gamma, "density": density, "min_budget": min_budget}
    settings |= {"num_proxies": num_proxies} | ({} if stride is None else {"stride": stride})
    configure(loaded, ProxyConfig.outliers(**settings) if outliers else ProxyConfig(**settings))
    tokens = read_tokens(text, length, model, loaded.config.get_text_config().vocab_size)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not first) as progress:
        result = compare(loaded, tokens, min(last, length), progress)
    if first:
        show(result, Console(highlight=False))
        if json_file is not None:
            json_file.write_text(json.dumps(result, indent=1) + "\n")
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
