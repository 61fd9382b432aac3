"""Train the needle model: a small Llama that reads Python source as bytes and answers key-value queries.

    python examples/needle/train.py --minutes 7.5 --out examples/needle

One GPU, about ten minutes with compilation and evaluation. The text is every Python file below --text (by default the
site-packages of the running interpreter); one file in twenty is held out, chosen by a hash of its path, and all
evaluation uses those. Writes model.safetensors (bfloat16), config.json and training_log.json to --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flexproxy.needle import VOCAB_SIZE, NeedleBatch, exact_answers, plant

# length: (batch size, share of the training time)
LENGTHS = {512: (128, 0.28), 2048: (32, 0.25), 8192: (8, 0.22), 32768: (2, 0.25)}
SHORT_ONLY_UNTIL = 0.12  # the first part of the time has only the two short lengths
TOKENS_PER_NEEDLE = 128
ANSWER_WEIGHT, SCAFFOLD_WEIGHT = 4.0, 0.05  # text weighs 1
PEAK_LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 1.5e-3, 200, 0.05
HELD_OUT_SHARE = 0.05


def model_config() -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 65536,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    return LlamaConfig(**settings)


def read_corpus(root: Path) -> tuple[Tensor, Tensor, dict[str, int]]:
    """All Python files below ``root`` as two byte strings (uint8): for training, and held out."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        held_out = int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32
        parts[held_out].append(path.read_bytes())
    train, held_out_text = (torch.frombuffer(bytearray(b"".join(parts[k])), dtype=torch.uint8) for k in (False, True))
    counts = {"train_files": len(parts[False]), "held_out_files": len(parts[True])}
    return train, held_out_text, counts | {"train_bytes": len(train), "held_out_bytes": len(held_out_text)}


def sample(corpus: Tensor, batch: int, length: int, generator: torch.Generator) -> NeedleBatch:
    start = torch.randint(len(corpus) - length, (batch, 1), generator=generator, device=corpus.device)
    text = corpus[start + torch.arange(length, device=corpus.device)]
    return plant(text, length // TOKENS_PER_NEEDLE, generator)


def loss_of(model: LlamaForCausalLM, data: NeedleBatch) -> tuple[Tensor, Tensor]:
    """Weighted loss, and the plain mean over the answer bytes."""
    with torch.autocast(data.tokens.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=data.tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), data.tokens[:, 1:].flatten(), reduction="none")
    answers, planted = data.answers[:, 1:].flatten(), data.planted[:, 1:].flatten()
    weight = torch.where(answers, ANSWER_WEIGHT, torch.where(planted, SCAFFOLD_WEIGHT, 1.0))
    return (loss * weight).sum() / weight.sum(), (loss * answers).sum() / answers.sum()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, corpus: Tensor, sequences: int) -> dict[str, dict[str, float]]:
    """Exact answers and bits per byte of text at every length, on held-out text."""
    generator = torch.Generator(corpus.device).manual_seed(20260101)
    result = {}
    for length in LENGTHS:
        exact, nats, count = [], 0.0, 0
        for _ in range(sequences):
            data = sample(corpus, max(1, 8192 // length), length, generator)
            with torch.autocast(corpus.device.type, dtype=torch.bfloat16):
                logits = model(input_ids=data.tokens, use_cache=False).logits
            exact.append(exact_answers(logits.argmax(-1), data))
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), data.tokens[:, 1:].flatten(), reduction="none")
            text = ~data.planted[:, 1:].flatten()
            nats, count = nats + float(loss[text].sum()), count + int(text.sum())
        answered = torch.cat(exact).float()
        result[str(length)] = {
            "exact": round(float(answered.mean()), 4),
            "queries": len(answered),
            "bits_per_byte": round(nats / count / math.log(2), 4),
        }
    return result


def train(model: LlamaForCausalLM, corpus: Tensor, seconds: float, log: list[dict[str, float]]) -> None:
    device = corpus.device
    generator = torch.Generator(device).manual_seed(1)
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")

    def step(length: int, learning_rate: float) -> tuple[Tensor, Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss, answer_loss = loss_of(model, sample(corpus, LENGTHS[length][0], length, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), answer_loss.detach()

    step_seconds = {}
    for length in LENGTHS:  # compile, then time one step; the learning rate is zero
        step(length, 0.0).__str__()
        begin = time.perf_counter()
        for _ in range(3):
            float(step(length, 0.0)[0])
        step_seconds[length] = (time.perf_counter() - begin) / 3
    print("seconds per step", step_seconds, flush=True)

    spent = dict.fromkeys(LENGTHS, 0.0)
    begin, steps, progress, last_print = time.perf_counter(), 0, 0.0, 0.0
    while progress < 1.0:
        open_lengths = [n for n in LENGTHS if n <= 2048 or progress >= SHORT_ONLY_UNTIL]
        total = sum(spent.values()) + 1e-9
        length = max(open_lengths, key=lambda n: LENGTHS[n][1] - spent[n] / total)
        warm = min(1.0, (steps + 1) / WARMUP_STEPS)
        loss, answer_loss = step(
            length, PEAK_LEARNING_RATE * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        )
        spent[length] += step_seconds[length]
        steps += 1
        if steps % 25 == 0:
            values = torch.stack([loss, answer_loss]).tolist()  # waits for the device, so the clock below is true
            elapsed = time.perf_counter() - begin
            progress = elapsed / seconds
            log.append(
                {
                    "step": steps,
                    "seconds": round(elapsed, 1),
                    "length": length,
                    "loss": round(values[0], 4),
                    "answer_loss": round(values[1], 4),
                }
            )
            if elapsed - last_print > 10:
                print(log[-1], flush=True)
                last_print = elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5, help="training time, compilation and evaluation left out")
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("purelib")), help="folder of Python files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the checkpoint and the log")
    parser.add_argument("--eval-sequences", type=int, default=16, help="batches of held-out text for each length")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    corpus, held_out, counts = read_corpus(args.text)
    print("corpus", counts, flush=True)
    corpus, held_out = corpus.to(device), held_out.to(device)
    model: Any = LlamaForCausalLM(model_config())  # transformers types .to() as something else
    model.to(device)
    for layer in model.model.layers:
        layer.compile(dynamic=False)

    log: list[dict[str, float]] = []
    train(model, corpus, args.minutes * 60, log)

    # What is evaluated is what is saved: the weights rounded to bfloat16.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    result = evaluate(model.eval(), held_out, args.eval_sequences)
    print(json.dumps(result, indent=1), flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    state = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, args.out / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(args.out)
    environment = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    parameters = sum(p.numel() for p in model.parameters())
    record = {
        "environment": environment,
        "parameters": parameters,
        "minutes": args.minutes,
        "corpus": counts,
        "held_out": result,
        "log": log,
    }
    (args.out / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
