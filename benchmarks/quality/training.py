"""Training of needle models: Llamas that read source code as bytes and answer what was planted into it.

Shared by ``examples/needle/train.py`` and ``benchmarks/quality/train.py``, which differ in their recipes.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import versions
from benchmarks.quality.byte_tasks import plant_task
from benchmarks.quality.texts import read_text
from flexproxy.cli.needle import VOCAB_SIZE, NeedleBatch, exact_answers
from flexproxy.environment import processor
from flexproxy.files import replacing
from flexproxy.ops.compat import many_lengths

ANSWER_WEIGHT, SCAFFOLD_WEIGHT = 4.0, 0.05  # text weighs 1
WARMUP_STEPS, WEIGHT_DECAY = 200, 0.05
SYNC_STEPS = 25  # the clock is read, and the log written, so often

Log = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, on what.

    Attributes:
        shape: settings of LlamaConfig that differ from ``model_config``'s.
        lengths: tokens of a sequence: sequences in a step, and share of the training time.
        short: lengths up to this are the only ones in the first ``short_share`` of the time.
        tasks: names of ``byte_tasks``; every step draws one.
        evaluated: lengths at which the result is evaluated, all of ``lengths`` if empty.
        learning_rate: the highest; it rises linearly and falls as a cosine.
    """

    shape: Mapping[str, int]
    lengths: Mapping[int, tuple[int, float]]
    short: int = 2048
    short_share: float = 0.12
    tasks: Sequence[str] = ("single",)
    evaluated: Sequence[int] = ()
    learning_rate: float = 1.5e-3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a training ends: at whichever comes first; compilation and evaluation are not counted."""

    seconds: float = math.inf
    steps: float = math.inf

    def progress(self, seconds: float, steps: int) -> float:
        return max(seconds / self.seconds, steps / self.steps)


class Trained(NamedTuple):
    """A model and the record of its training."""

    model: Any
    record: dict[str, Any]


def model_config(recipe: Recipe) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 65536,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    return LlamaConfig(**(settings | dict(recipe.shape)))


class Corpus(NamedTuple):
    """Texts as bytes, uint8 ``[n]``: for training, and held out for calibration; numbers of files and bytes."""

    training: Tensor
    calibration: Tensor
    counts: dict[str, int]


def read_corpus(root: Path, device: torch.device) -> Corpus:
    """The Python files below a folder."""
    texts = {purpose: read_text(root, purpose, trained_on=True) for purpose in ("training", "calibration")}
    training, calibration = (
        torch.frombuffer(bytearray(text.content), dtype=torch.uint8).to(device) for text in texts.values()
    )
    counts = {f"{purpose}_files": text.pieces for purpose, text in texts.items()}
    counts |= {f"{purpose}_bytes": len(text.content) for purpose, text in texts.items()}
    return Corpus(training, calibration, counts)


def sample(corpus: Tensor, batch: int, length: int, task: str, generator: torch.Generator) -> NeedleBatch:
    """Pieces of the corpus ``[batch, length]`` with a task planted."""
    start = torch.randint(len(corpus) - length, (batch, 1), generator=generator, device=corpus.device)
    text = corpus[start + torch.arange(length, device=corpus.device)]
    return plant_task(task, text, generator)


def loss_of(model: Any, data: NeedleBatch) -> tuple[Tensor, Tensor]:
    """Weighted loss, and the plain mean over the answer bytes."""
    with torch.autocast(data.tokens.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=data.tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), data.tokens[:, 1:].flatten(), reduction="none")
    answers, planted = data.answers[:, 1:].flatten(), data.planted[:, 1:].flatten()
    weight = torch.where(answers, ANSWER_WEIGHT, torch.where(planted, SCAFFOLD_WEIGHT, 1.0))
    return (loss * weight).sum() / weight.sum(), (loss * answers).sum() / answers.sum()


@torch.no_grad()
def evaluate(model: Any, corpus: Tensor, recipe: Recipe, sequences: int) -> dict[str, dict[str, dict[str, float]]]:
    """Exact answers, and bits per byte of the text around what was planted, of every task at every length."""
    generator = torch.Generator(corpus.device).manual_seed(20260101)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for task in dict.fromkeys(recipe.tasks):
        result[task] = {}
        for length in recipe.evaluated or recipe.lengths:
            exact, nats, count = [], 0.0, 0
            for _ in range(sequences):
                data = sample(corpus, max(1, 8192 // length), length, task, generator)
                with torch.autocast(corpus.device.type, dtype=torch.bfloat16):
                    logits = model(input_ids=data.tokens, use_cache=False).logits
                exact.append(exact_answers(logits.argmax(-1), data))
                targets = data.tokens[:, 1:].flatten()
                loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="none")
                text = ~data.planted[:, 1:].flatten()
                nats, count = nats + float(loss[text].sum()), count + int(text.sum())
            answered = torch.cat(exact).float()
            result[task][str(length)] = {
                "exact": round(float(answered.mean()), 4),
                "queries": len(answered),
                "bits_per_byte": round(nats / count / math.log(2), 4),
            }
    return result


class Trainer:
    """Steps of one model. The learning rate is the caller's."""

    def __init__(self, model: Any, corpus: Tensor, recipe: Recipe, seed: int) -> None:
        self.model, self.corpus, self.recipe, self.random = model, corpus, recipe, random.Random(seed)
        self.generator = torch.Generator(corpus.device).manual_seed(seed + 1)
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=corpus.is_cuda)

    def step(self, length: int, learning_rate: float) -> Tensor:
        """One step; gives the loss and that of the answers, and does not wait for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        task = self.random.choice(self.recipe.tasks)  # in turns, a task could meet always the same lengths
        data = sample(self.corpus, self.recipe.lengths[length][0], length, task, self.generator)
        loss, answer_loss = loss_of(self.model, data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), answer_loss.detach()])

    def seconds_per_step(self) -> dict[int, float]:
        """Of every length; compiles it first. The learning rate is zero."""
        seconds = {}
        for length in self.recipe.lengths:
            self.step(length, 0.0).tolist()
            begin = time.perf_counter()
            for _ in range(3):
                self.step(length, 0.0).tolist()
            seconds[length] = (time.perf_counter() - begin) / 3
        return seconds


def train(model: Any, corpus: Tensor, recipe: Recipe, limits: Limits, seed: int) -> Log:
    """Train until a limit: every length takes its share of the time, every step draws a task."""
    trainer = Trainer(model, corpus, recipe, seed)
    step_seconds = trainer.seconds_per_step()
    print("seconds per step", {length: round(seconds, 3) for length, seconds in step_seconds.items()}, flush=True)
    spent = dict.fromkeys(recipe.lengths, 0.0)
    log: Log = []
    begin, steps, progress, last_print = time.perf_counter(), 0, 0.0, -math.inf
    while progress < 1.0:
        is_open = [n for n in recipe.lengths if n <= recipe.short or progress >= recipe.short_share]
        total = sum(spent.values()) + 1e-9
        length = max(is_open, key=lambda n: recipe.lengths[n][1] - spent[n] / total)
        warm = min(1.0, (steps + 1) / WARMUP_STEPS)
        rate = recipe.learning_rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        losses = trainer.step(length, rate)
        spent[length] += step_seconds[length]
        steps += 1
        if steps % SYNC_STEPS == 0 or steps >= limits.steps:
            loss, answer_loss = losses.tolist()  # waits for the device, so the clock below is true
            elapsed = time.perf_counter() - begin
            progress = limits.progress(elapsed, steps)
            log.append({"step": steps, "seconds": round(elapsed, 1), "length": length})
            log[-1] |= {"loss": round(loss, 4), "answer_loss": round(answer_loss, 4)}
            if elapsed - last_print > 10:
                print(log[-1], flush=True)
                last_print = elapsed
    return log


def run(corpus: Corpus, recipe: Recipe, limits: Limits, seed: int, sequences: int) -> Trained:
    """Train one model and evaluate it; what is evaluated has the weights rounded to bfloat16, as they are saved.

    Args:
        sequences: batches of calibration text for each task and length.

    Raises:
        ValueError: there is too little text.
    """
    device, longest = corpus.training.device, max(*recipe.lengths, *recipe.evaluated)
    for name, text in {"training": corpus.training, "calibration": corpus.calibration}.items():
        if len(text) <= longest:
            raise ValueError(f"text: expected more than {longest} bytes for {name}, got {len(text)}; use more files")
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model: Any = LlamaForCausalLM(model_config(recipe))  # transformers types .to() as something else
    model.to(device)
    with many_lengths():  # every length, with gradients and without, is a variant of a layer
        if device.type == "cuda":
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        log = train(model, corpus.training, recipe, limits, seed)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        evaluated = evaluate(model.eval(), corpus.calibration, recipe, sequences)
    print(json.dumps(evaluated, indent=1), flush=True)
    record = {
        "environment": {"device": processor(device)} | versions(),
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "limits": {name: limit for name, limit in asdict(limits).items() if limit != math.inf},
        "steps": log[-1]["step"],
        "corpus": corpus.counts,
        "calibration": evaluated,
        "log": log,
    }
    return Trained(model, record)


def save(trained: Trained, folder: Path) -> None:
    """Write model.safetensors (bfloat16), config.json and training_log.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model = trained.model
    state = {k: v.bfloat16().contiguous().cpu() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    with replacing(folder / "model.safetensors") as unfinished:
        save_file(state, unfinished, metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    with replacing(folder / "training_log.json") as unfinished:
        unfinished.write_text(json.dumps(trained.record, indent=1) + "\n")
