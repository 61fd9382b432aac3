"""What the selections of benchmarks/baselines should be: one head at a time, in double precision, in loops.

``mistake`` plants an error that the comparison with the selection must see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

SIZE, DIM = 16, 32
LENGTHS = (1, 15, 16, 100, 127, 160)


def inputs(length: int, seed: int = 0, batch: int = 2, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    q = torch.randn(batch, heads, length, DIM, generator=generator)
    return 2 * q, 2 * torch.randn(batch, kv_heads, length, DIM, generator=generator)


def heads_of(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            yield b, h, q[b, h].double(), k[b, h * k.shape[1] // q.shape[1]].double()


def greedy(mass: list[float], fraction: float, forced: set[int]) -> set[int]:
    """The fewest entries that hold a fraction of the mass; forced ones first, equals by index."""
    if fraction >= 1:
        return set(range(len(mass)))
    order = sorted(range(len(mass)), key=lambda j: (j not in forced, -mass[j], j))
    kept, total = set(forced), sum(mass)
    for n, j in enumerate(order):
        if sum(mass[i] for i in order[:n]) < fraction * total:
            kept.add(j)
    return kept


def xattention_spec(q: Tensor, k: Tensor, threshold: float, stride: int, mistake: bool) -> Tensor:
    length = q.shape[0]
    windows, num_blocks, cell = -(-length // stride), -(-length // SIZE), SIZE // stride
    score = torch.full((windows, windows), -math.inf, dtype=torch.float64)
    for i in range(windows):
        for j in range(i + 1):
            total = 0.0
            for t in range(stride):
                row, column = i * stride + (t if mistake else stride - 1 - t), j * stride + t
                if row < length and column < length:
                    total += float(q[row] @ k[column])
            score[i, j] = total / (math.sqrt(DIM) * stride)
    probability = score.softmax(-1)
    kept = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for i in range(num_blocks):
        rows = probability[i * cell : (i + 1) * cell]
        mass = [float(rows[:, j * cell : (j + 1) * cell].sum()) for j in range(num_blocks)]
        kept[i, sorted(greedy(mass, threshold, {0, i}))] = True
    return kept.tril()


def flashprefill_spec(q: Tensor, k: Tensor, alpha: float, sink: int, local: int, last: int, mistake: bool) -> Tensor:
    length = q.shape[0]
    num_blocks = -(-length // SIZE)
    mean = [k[j * SIZE : (j + 1) * SIZE].mean(0) for j in range(num_blocks)]
    kept = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for i in range(num_blocks):
        score = [0.0] * num_blocks
        for position in range(i * SIZE, min((i + 1) * SIZE, length)):
            for j in range(num_blocks):
                if (j + (0 if mistake else 1)) * SIZE - 1 <= position:
                    score[j] += math.exp(float(q[position] @ mean[j]) / math.sqrt(DIM))
        score = [x / (sum(score) or 1.0) for x in score]  # equation 2
        for j in range(i + 1):
            always = j < sink or i - j < local or i >= num_blocks - last
            kept[i, j] = always or score[j] >= alpha * max(score)
    return kept


def flashprefill_v2_spec(q: Tensor, k: Tensor, alpha: float, mistake: bool) -> Tensor:
    """q ``[G, S, D]``, the heads of a group; nothing but the diagonal is kept regardless of scores."""
    num_blocks = -(-q.shape[1] // SIZE)
    mean = torch.stack([block.mean(0) for block in k.split(SIZE)])
    kept = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for i in range(num_blocks):
        queries = q[:, i * SIZE : (i + 1) * SIZE].flatten(0, 1)
        score = (queries @ mean[: i if mistake else i + 1].T / math.sqrt(DIM)).exp().sum(0)
        kept[i, : len(score)] = score >= alpha * score.max() if len(score) else True
        kept[i, i] = True
    return kept


def mean_correction_spec(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, mistake: bool) -> Tensor:
    out = torch.zeros_like(q)
    for position in range(q.shape[0]):
        row = position // SIZE
        weight, value = [], []
        for j in range(row + 1):
            tokens = slice(j * SIZE, min((j + 1) * SIZE, position + 1))
            if kept[row, j]:
                weight += (k[tokens] @ q[position] / math.sqrt(DIM)).exp().tolist()
                value += list(v[tokens])
            else:
                mean = float(k[tokens].mean(0) @ q[position]) / math.sqrt(DIM)
                weight.append((1 if mistake else SIZE) * math.exp(mean))
                value.append(v[tokens].mean(0))
        share = torch.tensor(weight, dtype=torch.float64)
        out[position] = share / share.sum() @ torch.stack(value)
    return out


def flexprefill_spec(q: Tensor, k: Tensor, gamma: float, tau: float, min_blocks: int, mistake: bool) -> Tensor:
    length = q.shape[0]
    num_blocks, rows = -(-length // SIZE), min(SIZE, length)
    columns, bands = [0.0] * num_blocks, [0.0] * num_blocks
    for position in range(length - rows, length):
        probability = (k[: position + 1] @ q[position] / math.sqrt(DIM)).softmax(0)
        for key in range(position + 1):
            columns[key // SIZE] += float(probability[key]) / rows
            bands[(position - key) // SIZE] += float(probability[key]) / rows
    mean_q = [q[i * SIZE : (i + 1) * SIZE].mean(0) for i in range(num_blocks)]
    mean_k = torch.stack([k[j * SIZE : (j + 1) * SIZE].mean(0) for j in range(num_blocks)])
    estimate = (mean_k @ q[-rows:].mean(0) / math.sqrt(DIM)).softmax(0).tolist()
    divergence = sum(
        0.5 * x * math.log(x / ((x + y) / 2)) + 0.5 * (y * math.log(y / ((x + y) / 2)) if y else 0.0)
        for x, y in zip(estimate, columns, strict=True)
    )
    query_aware = math.sqrt(max(divergence, 0.0)) < tau

    def lines(mass: list[float]) -> set[int]:
        lifted = [math.inf if j == 0 else mass[j] for j in range(num_blocks)]
        heaviest = sorted(range(num_blocks), key=lambda j: (-lifted[j], j))[:min_blocks]
        return greedy(mass, 0.0 if query_aware else gamma, {0}) | set(heaviest)

    vertical, band = lines(columns), lines(bands)
    kept = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for position in range(length):
        for key in range(position + 1):
            distance = (position - key) // SIZE if not mistake else position // SIZE - key // SIZE
            kept[position // SIZE, key // SIZE] |= key // SIZE in vertical or distance in band
    if query_aware:
        pairs = [(i, j) for i in range(num_blocks) for j in range(num_blocks)]
        mass = []
        for i in range(num_blocks):
            row = (mean_k[: i + 1] @ mean_q[i] / math.sqrt(DIM)).softmax(0).tolist()
            mass += row + [0.0] * (num_blocks - i - 1)
        forced = {n for n, (i, j) in enumerate(pairs) if j in (0, i)}
        for n in greedy(mass, gamma, forced):
            kept[pairs[n]] = True
    return kept.tril()


def prism_spec(q: Tensor, k: Tensor, p: float, high: int, low: int, mistake: bool) -> Tensor:
    num_blocks = -(-q.shape[0] // SIZE)
    pooled_q, pooled_k = (torch.stack([block.mean(0) for block in x.split(SIZE)]) for x in (q, k))
    by_frequency = [i for pair in range(DIM // 2) for i in (pair, pair + DIM // 2)]
    if mistake:
        by_frequency = list(range(DIM))  # as if neighbours were turned together

    def rms(x: Tensor) -> float:
        return math.sqrt(float((x**2).sum(1).mean()) / x.shape[1])

    kept = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for band in (by_frequency[:high], by_frequency[-low:]):
        band_q, band_k = pooled_q[:, band], pooled_k[:, band]
        tau = math.sqrt(len(band) / DIM) * (rms(band_q) / rms(pooled_q)) * (rms(band_k) / rms(pooled_k))
        for i in range(num_blocks):
            probability = (band_k[: i + 1] @ band_q[i] / (tau * math.sqrt(len(band)))).softmax(0)
            kept[i, sorted(greedy(probability.tolist(), p, set()) | {0, i})] = True
    return kept


def budget_spec(q: Tensor, k: Tensor, gamma: float, min_blocks: int) -> int:
    """The fewest blocks that hold gamma of the attention of the last queries, and at least some."""
    length, rows = q.shape[0], min(SIZE, q.shape[0])
    mass = [0.0] * -(-length // SIZE)
    for position in range(length - rows, length):
        probability = (k[: position + 1] @ q[position] / math.sqrt(DIM)).softmax(0)
        for key in range(position + 1):
            mass[key // SIZE] += float(probability[key]) / rows
    return min(len(mass), max(len(greedy(mass, gamma, set())), min_blocks, 1))


def ranked_spec(score: Tensor, count: int) -> Tensor:
    """The best blocks of every row, its diagonal first, equals by index."""
    kept = torch.zeros(score.shape, dtype=torch.bool)
    for i in range(score.shape[0]):
        order = sorted(range(i + 1), key=lambda j: (j != i, -float(score[i, j]), j))
        kept[i, order[:count]] = True
    return kept


def block_mass_spec(q: Tensor, k: Tensor, mistake: bool) -> Tensor:
    num_blocks = -(-q.shape[0] // SIZE)
    mass = torch.zeros(num_blocks, num_blocks, dtype=torch.float64)
    for position in range(q.shape[0]):
        probability = (k[: position + 1] @ q[position] / math.sqrt(DIM)).softmax(0)
        for j, block in enumerate(probability.split(SIZE)):
            row = mass[position // SIZE]
            row[j] = max(row[j], block.max()) if mistake else row[j] + block.sum()
    return mass


def per_row_spec(q: Tensor, k: Tensor, coverage: float, min_blocks: int, mistake: bool) -> Tensor:
    mass = block_mass_spec(q, k, mistake=False)
    kept = torch.zeros(mass.shape, dtype=torch.bool)
    for i in range(mass.shape[0]):
        chosen = greedy(mass[i].tolist(), coverage, set() if mistake else {i})
        chosen |= set(ranked_spec(mass, min_blocks)[i].nonzero().flatten().tolist()) | {i}
        kept[i, sorted(chosen)] = True
    return kept.tril()


def mean_pooled_spec(q: Tensor, k: Tensor, mistake: bool) -> Tensor:
    def pool(x: Tensor) -> Tensor:
        return torch.stack([block.amax(0) if mistake else block.mean(0) for block in x.split(SIZE)])

    return pool(q) @ pool(k).T


def sink_recent_spec(q: Tensor, mistake: bool) -> Tensor:
    num_blocks = -(-q.shape[0] // SIZE)
    row = [float(j) for j in range(num_blocks)]
    row[0] = 0.0 if mistake else float(num_blocks)
    return torch.tensor(row).expand(num_blocks, num_blocks)
