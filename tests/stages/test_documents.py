"""Packed documents: each keeps what it keeps alone, whatever it is packed with, and wherever it lies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig, masks, pipeline
from flexproxy.masks.structure import MaskMod, structure_of
from flexproxy.ops import implementations
from flexproxy.stages import documents
from tests.oracle import Case, check_count, expect, pooled

LENGTH, BLOCK = 150, 16
CONFIG = ProxyConfig(block_size=BLOCK, gamma=0.6, min_budget=0, sink_blocks=0, local_blocks=1, dense_last_blocks=0)


def qk(device: str, num_queries: int = LENGTH, num_keys: int = LENGTH, batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, 2, num_queries, 16), (batch, 1, num_keys, 16)
    q, k = (torch.randn(shape, generator=generator) for shape in shapes)
    q *= torch.linspace(0.5, 8, num_queries)[:, None]  # early documents need more
    return q.to(device), k.to(device)


def layouts() -> dict[str, Tensor]:
    """Ids of 150 tokens."""
    place, generator = torch.arange(LENGTH), torch.Generator().manual_seed(0)
    lengths = torch.tensor([70, 1, 1, 27, 51])
    ragged = torch.arange(5).repeat_interleave(lengths)
    return {
        "one": torch.zeros(LENGTH, dtype=torch.int64),
        "at borders": place // (3 * BLOCK),
        "ragged": ragged,
        "descending, with padding": torch.where((place < 9) | (place // 5 == 20), -1, 7 - ragged),
        "single tokens": place,
        "single tokens and one": torch.where((place > 60) & (place < 90), place, 0),
        "interleaved": place // BLOCK % 2,
        "scattered": torch.randint(3, (LENGTH,), generator=generator),
        "many scattered": torch.randint(60, (LENGTH,), generator=generator),
        "none": torch.full((LENGTH,), -1),
    }


def causal(ids: Tensor) -> MaskMod:
    return masks.and_masks(masks.causal, masks.document(ids))


def counts_alone(q: Tensor, k: Tensor, ids: Tensor, config: ProxyConfig) -> Tensor:
    """Of every row, the sum of what its documents keep, when all else is padding: ``[Hq, Nq]``."""
    offset, num_blocks = k.shape[2] - q.shape[2], -(-k.shape[2] // BLOCK)
    total = torch.zeros(q.shape[1], -(-q.shape[2] // BLOCK), dtype=torch.int32)
    for document in set(ids.tolist()) - {-1}:
        mine = (ids == document).to(q.device)
        mask_mod = masks.shift(masks.and_masks(masks.causal, masks.padding(mine[None])), offset)
        count = flexproxy.select(q, k, mask_mod=mask_mod, config=config).count[0, :, 0].cpu()
        places = (ids == document).nonzero().flatten()
        rows = (places[places >= offset] - offset).div(BLOCK, rounding_mode="floor").unique()
        number = len(places.div(BLOCK, rounding_mode="floor").unique())
        total[:, rows] += count.clamp(max=number)[:, None]
    return total.clamp(max=num_blocks)


@pytest.mark.parametrize("name", layouts())
def test_a_document_keeps_what_it_keeps_alone(name: str, implementation: str) -> None:
    ids, (q, k) = layouts()[name], qk(implementation)
    count = flexproxy.select(q, k, mask_mod=causal(ids.to(implementation)), config=CONFIG).count[0].cpu()
    with implementations.use("torch"):
        assert torch.equal(count, counts_alone(q, k, ids, CONFIG))
    if name in ("at borders", "ragged", "interleaved"):
        assert len(set(count[0].tolist())) > 1


@pytest.mark.parametrize("name", ["ragged", "interleaved", "scattered"])
def test_of_a_chunk(name: str, implementation: str) -> None:
    """The last queries alone: the probes of a document are among them, its keys are all."""
    ids, (q, k) = layouts()[name], qk(implementation, 70)
    mask_mod = masks.shift(causal(ids.to(implementation)), LENGTH - 70)
    count = flexproxy.select(q, k, mask_mod=mask_mod, config=CONFIG).count[0].cpu()
    with implementations.use("torch"):
        assert torch.equal(count, counts_alone(q, k, ids, CONFIG))


def test_a_short_document_behind_a_long_one(device: str) -> None:
    """3,968 and 128 tokens: the last document, which needs one block, says nothing of the first."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 4096, 32, generator=generator).to(device) for heads in (4, 2))
    config = ProxyConfig(gamma=0.95, min_budget=0, dense_last_blocks=0)
    ids = (torch.arange(4096) // 3968).to(device)
    count = flexproxy.select(q, k, mask_mod=causal(ids), config=config).count
    alone = flexproxy.select(q[:, :, :3968], k[:, :, :3968], config=config).count
    assert int(alone.min()) == 29
    assert torch.equal(count[..., :31], alone)
    assert count[..., 31].tolist() == [[1, 1, 1, 1]]


def test_a_batch_of_packings(device: str) -> None:
    ids, (q, k) = torch.stack([*layouts().values()][:8]).to(device), qk(device, batch=8)
    for settings in ({"gamma": 0.8}, {"density": 0.5}):
        config = ProxyConfig(block_size=BLOCK, min_budget=0, **settings)  # type: ignore[arg-type]
        count = flexproxy.select(q, k, mask_mod=causal(ids), config=config).count
        for b in range(len(ids)):
            own = slice(b, b + 1)
            alone = flexproxy.select(q[own], k[own], mask_mod=causal(ids[b]), config=config).count
            assert torch.equal(count[own], alone), b


@pytest.mark.parametrize("name", layouts())
def test_everything_is_dense(name: str, device: str) -> None:
    ids, (q, k) = layouts()[name], qk(device)
    for settings in ({"gamma": 1.0}, {"density": 1.0}):
        config = ProxyConfig(block_size=BLOCK, **settings)  # type: ignore[arg-type]
        selection = flexproxy.select(q, k, mask_mod=causal(ids.to(device)), config=config)
        assert torch.equal(selection.block_map(), selection.admissible.expand(1, 2, -1, -1))


def test_a_function_and_documents(implementation: str) -> None:
    """A mask that is evaluated keeps what the same mask keeps that is not."""
    (q, k), window = qk(implementation), masks.sliding_window(40)
    for name in ("ragged", "scattered"):
        document = masks.document(layouts()[name].to(implementation))
        parts: list[MaskMod] = [window, lambda b, h, q, kv: (q >= kv) & (q - kv < 40)]
        both = [flexproxy.select(q, k, mask_mod=masks.and_masks(part, document), config=CONFIG) for part in parts]
        assert torch.equal(both[0].count, both[1].count)


@pytest.mark.parametrize("seed", range(3))
def test_more_queries_than_keys_of_a_document(seed: int, implementation: str) -> None:
    """Queries at positions behind all keys, many of them in documents of a key or two, as the specification has it."""
    generator = torch.Generator().manual_seed(seed)
    q, k = qk(implementation, 80, 80)
    ids = torch.cat([torch.randperm(80, generator=generator) // 3, torch.randint(9, (80,), generator=generator)])[None]
    mask_mod = masks.shift(masks.document(ids.to(implementation)), 80)
    case = Case(q, k, k, CONFIG, "documents", mask_mod, [80], ids)
    count = flexproxy.select(q, k, mask_mod=mask_mod, config=CONFIG).count.cpu()
    check_count(count, expect(case, *pooled(case)), CONFIG)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_document(value: float, implementation: str) -> None:
    """Such a document keeps everything, and all others what they keep without."""
    ids, (q, k) = layouts()["ragged"], qk(implementation)
    mask_mod = causal(ids.to(implementation))
    want = flexproxy.select(q, k, mask_mod=mask_mod, config=CONFIG).count
    k[0, 0, 110, 3] = value  # of the last document, which begins in the seventh row, at token 99
    got = flexproxy.select(q, k, mask_mod=mask_mod, config=CONFIG).count
    assert torch.equal(got[..., :6], want[..., :6])
    assert bool((got[..., 7:] == 4).all())


@pytest.mark.parametrize("name", layouts())
def test_without_a_look(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch does on a GPU, where it may not read how many probes a tile needs: the same counts."""
    ids, (q, k) = layouts()[name], qk("cpu")
    want = flexproxy.select(q, k, mask_mod=causal(ids), config=CONFIG).count
    monkeypatch.setattr(documents, "may_look", lambda x: False)
    monkeypatch.setattr(documents, "CHUNK_ELEMENTS", 1)  # tiles of 16 keys
    assert torch.equal(flexproxy.select(q, k, mask_mod=causal(ids), config=CONFIG).count, want)


def test_padding_is_no_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding alone leaves one sequence, and one probe; with documents, and shifted, there may be several."""
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    padded, packed = masks.and_masks(masks.causal, masks.padding(ids == 0)), causal(ids)
    for mask_mod, several in (
        (masks.causal, False),
        (padded, False),
        (packed, True),
        (masks.shift(padded, 2), False),
        (masks.shift(masks.and_masks(padded, packed), 2), True),
        (masks.or_masks(packed, masks.causal), False),
    ):
        assert structure_of(mask_mod).packed is several

    def forbidden(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(pipeline, "order_documents", forbidden)
    flexproxy.select(*qk("cpu"), mask_mod=padded, config=CONFIG)
    with pytest.raises(AssertionError):
        flexproxy.select(*qk("cpu"), mask_mod=packed, config=CONFIG)
