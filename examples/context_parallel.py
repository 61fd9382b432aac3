"""Context parallelism: each process has a part of the sequence, and gathers the
keys and values of all.

    torchrun --nproc-per-node 2 examples/context_parallel.py

The ranking of a row of blocks needs all of its keys, and no other queries: each
rank makes it for the queries that it has. The budgets come from the last
queries of the sequence, so the rank that has them broadcasts its counts, one
number for each head. Then the result is that of one process. A causal mask
gives late queries more keys: of 2 W pieces of the sequence, rank r of W has the
r-th from the start and the r-th from the end. NCCL where there are GPUs, gloo
otherwise.
"""

import dataclasses
import os
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import flexproxy

# Eager flex_attention forms all scores, which will do for a few tokens on a
# CPU.
warnings.filterwarnings(
    "ignore", message="flex_attention called without torch.compile"
)
attend = (
    torch.compile(flex_attention)
    if torch.cuda.is_available()
    else flex_attention
)


def pieces_of(rank: int, world: int) -> tuple[int, int]:
    """The two pieces of the sequence that a rank has."""
    return rank, 2 * world - 1 - rank


def gathered(x: Tensor) -> Tensor:
    """The whole ``[B, H, S, D]``, from every rank's ``[B, H, S / W, D]``."""
    world = dist.get_world_size()
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    halves = [part.chunk(2, dim=2) for part in parts]
    return torch.cat(
        [head for head, _ in halves] + [tail for _, tail in reversed(halves)],
        dim=2,
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, config: flexproxy.ProxyConfig
) -> tuple[Tensor, int]:
    """Attention of this rank's queries to all keys.

    Args:
        q, k, v: the two pieces of this rank, one behind the other,
            ``[B, H, S / W, D]``. Pieces are whole blocks.

    Returns:
        The output ``[B, Hq, S / W, D]``, and how many blocks of it this rank
        computed, over all heads.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    all_k, all_v = gathered(k), gathered(v)
    size, last = q.shape[2] // 2, 2 * world - 1
    pieces, queries = pieces_of(rank, world), q.chunk(2, dim=2)
    selections = []
    for piece, own in zip(pieces, queries, strict=True):
        # Aligned at the end: a piece sees the keys up to its own last one, and
        # no mask is needed. The rows that attend to everything are those at the
        # end of the sequence, not of every piece.
        of_piece = (
            config
            if piece == last
            else dataclasses.replace(config, dense_last_blocks=0)
        )
        selections.append(
            flexproxy.select(
                own, all_k[:, :, : (piece + 1) * size], config=of_piece
            )
        )
    # Of the last piece, which is rank 0's; its first row is not dense.
    count = selections[1].count[:, :, :1].contiguous()
    dist.broadcast(count, src=0)
    outputs, blocks = [], 0
    for piece, own, selection in zip(pieces, queries, selections, strict=True):
        if piece != last:
            selection = dataclasses.replace(
                selection, count=count.expand_as(selection.count).contiguous()
            )
        keys, mask = slice(selection.lengths[1]), selection.block_mask()
        outputs.append(
            attend(
                own,
                all_k[:, :, keys],
                all_v[:, :, keys],
                block_mask=mask,
                enable_gqa=True,
            )
        )
        blocks += int(selection.block_map().sum())
    return torch.cat(outputs, dim=2), blocks


def main() -> None:
    if "RANK" not in os.environ:
        raise SystemExit(
            "start it with: "
            "torchrun --nproc-per-node 2 examples/context_parallel.py"
        )
    on_gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)

    # The same on all ranks, so that the result can be compared.
    torch.manual_seed(0)
    length, head_dim, block_size = (
        (65536, 128, 128) if on_gpus else (2048, 32, 64)
    )
    # near ones are alike
    tokens = F.normalize(torch.randn(1, 1, length, head_dim).cumsum(2), dim=-1)
    q = torch.tensor([8.0, 30.0, 100.0, 300.0]).view(1, 4, 1, 1) * tokens
    k, v = tokens.repeat(1, 2, 1, 1), torch.randn(1, 2, length, head_dim)
    dtype = torch.bfloat16 if on_gpus else torch.float32
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    config = flexproxy.ProxyConfig(
        gamma=0.9, block_size=block_size, min_budget=4 * block_size
    )

    own = [
        torch.cat(
            [
                x.chunk(2 * world, dim=2)[piece]
                for piece in pieces_of(rank, world)
            ],
            2,
        )
        for x in (q, k, v)
    ]
    out, blocks = attention(own[0], own[1], own[2], config)
    whole = gathered(out)

    counts = [
        torch.zeros((), dtype=torch.int64, device=device) for _ in range(world)
    ]
    dist.all_gather(counts, torch.tensor(blocks, device=device))
    selection = flexproxy.select(q, k, config=config)
    expected = attend(
        q, k, v, block_mask=selection.block_mask(), enable_gqa=True
    )
    tolerance = 2e-2 if on_gpus else 1e-4
    torch.testing.assert_close(whole, expected, rtol=tolerance, atol=tolerance)
    if rank == 0:
        print(
            f"{world} ranks, {length} tokens, "
            f"density {float(selection.density().mean()):.3f}"
        )
        print("blocks of each rank:", *(int(number) for number in counts))
        print(
            "largest difference from one process: "
            f"{float((whole - expected).abs().max()):.1e}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
