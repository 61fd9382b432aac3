"""The specification itself, against values worked out by hand; each example fails once on a planted mistake."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from flexproxy import masks, reference

INF, LN2, LN5 = math.inf, math.log(2), math.log(5)
Example = Callable[[Any], None]


def near(got: Tensor, want: list[Any]) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def bools(rows: str) -> Tensor:
    """``"x.. xx."`` is [[True, False, False], [True, True, False]]."""
    return torch.tensor([[c == "x" for c in row] for row in rows.split()])


def column(*values: float) -> Tensor:
    """``[S, 1]``, fp64."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


# ------------------------------------------------------------------------------------------------- the examples


def token_mask(ref: Any) -> None:
    """Two queries at the end of three keys; every sequence and head has the mask."""
    got = ref.token_mask(masks.shift(masks.causal, 1), 2, 3, 2, 3, "cpu")
    assert torch.equal(got, bools("xx. xxx").expand(2, 3, 2, 3))
    first_head = ref.token_mask(lambda b, h, q, k: (h == 0) & (q == b), 2, 2, 2, 2, "cpu")
    assert torch.equal(first_head[0], torch.stack([bools("xx .."), bools(".. ..")]))
    assert torch.equal(first_head[1], torch.stack([bools(".. xx"), bools(".. ..")]))


def classify(ref: Any) -> None:
    """Blocks of 2, three queries, five keys; blocks at the ragged ends are not full, though all they have is there."""
    allowed = bools("xx.xx xxx.x ....x")[None, None]
    some, full = ref.classify(allowed, 2)
    # Queries 0 and 1, keys 0 and 1: all. Keys 2 and 3: two of four. Key 4: all that there is.
    # Query 2: nothing, nothing, all that there is.
    assert torch.equal(some, bools("xxx ..x")[None, None])
    assert torch.equal(full, bools("x.. ...")[None, None])


def listed(ref: Any) -> None:
    """Blocks of 2, three queries, five keys: what the lists leave out is not allowed."""
    allowed = bools("xx.xx xxx.x ....x")[None, None]
    got = ref.listed(allowed, bools("x.x .x.")[None, None], 2)
    assert torch.equal(got, bools("xx..x xx..x .....")[None, None])


def labels_of(ref: Any) -> None:
    """A mask of which nothing is known has the keys that some head sees."""
    allowed = torch.stack([torch.stack([bools(".x. .x."), bools("..x ...")]), torch.zeros(2, 2, 3).bool()])
    for known, want in ((True, [[0, 0, 0], [0, 0, 0]]), (False, [[-1, 0, 0], [-1, -1, -1]])):
        q_label, k_label = ref.labels_of(allowed, known)
        assert q_label.tolist() == [[0, 0], [0, 0]]
        assert k_label.tolist() == want


def sinks(ref: Any) -> None:
    """Blocks of 2. Padding at keys 0 to 2; the document 7 begins at key 3, the document 5 at key 5, in the third block.

    Row 1 has queries of both; the query 0 of row 0 is of none, and the queries of row 2 see nothing in the first head.
    """
    k_label = torch.tensor([[-1, -1, -1, 7, 7, 5, 5, 5]])
    q_label = torch.tensor([[-1, 7, 7, 5, 5, 5]])
    some = bools("x....... ..x..... ...x.... .....x.. ........ ........")
    allowed = torch.stack([some, some.roll(2, 0)])[None]
    assert ref.sinks(allowed, q_label, k_label, 2).tolist() == [[[1, 1, 4], [4, 1, 2]]]
    assert ref.sinks(allowed, q_label, torch.zeros(1, 8).long(), 2).tolist() == [[[4, 4, 4], [4, 4, 4]]]


def last_rows(ref: Any) -> None:
    """Blocks of 2. The documents 0 and 3 end in row 1, where 3 begins, and in row 3; query 7 sees nothing."""
    q_label = torch.tensor([[0, 0, 0, 3, 3, -1, 3, 3]])
    allowed = bools("x x x x x x x .")[None, None]
    assert torch.equal(ref.last_rows(allowed, q_label, 2, 1)[0, 0], bools(".x.x")[0])
    assert torch.equal(ref.last_rows(allowed, q_label, 2, 2)[0, 0], bools("xxxx")[0])
    assert torch.equal(ref.last_rows(allowed, q_label, 2, 0)[0, 0], bools("....")[0])
    q_label = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]])  # a document with a hole of a row
    assert torch.equal(ref.last_rows(allowed, q_label, 2, 3)[0, 0], bools(".xxx")[0])
    both = torch.stack([bools("x x x x . . . ."), bools("x x x x x x x x")])[:, None]
    got = ref.last_rows(both, torch.zeros(2, 8).long(), 2, 1)[:, 0]
    assert torch.equal(got, bools(".x.. ...x"))


def row_counts(ref: Any) -> None:
    """Blocks of 2. Rows of document 0, of 0 and 1, of 1, of none; the last is dense.

    Head 1 has other counts, and in the second row no valid query of 0.
    """
    q_label = torch.tensor([0, 0, 0, 1, 1, 1, -1, -1, 1, 1]).expand(1, 2, -1).clone()
    q_label[0, 1, 2] = -1  # not valid
    dense = torch.zeros(1, 2, 5, dtype=torch.bool)
    dense[0, 0, 4] = True
    got = ref.row_counts({0: torch.tensor([[3, 1]]), 1: torch.tensor([[4, 2]])}, q_label, dense, 6, 2)
    assert got.dtype == torch.int32
    assert got.tolist() == [[[3, 6, 4, 0, 6], [1, 2, 2, 0, 2]]]


def groups_of(ref: Any) -> None:
    assert ref.groups_of(2, 6) == [[0, 1, 2], [3, 4, 5]]
    assert ref.groups_of(1, 3) == [[0, 1, 2]]


def key_groups(ref: Any) -> None:
    """Six query heads, three key heads, two query heads for each: heads 0, 1 -> 0; 2, 3 -> 1; 4, 5 -> 2."""
    assert ref.key_groups([[0, 1, 2], [3, 4, 5]], 6, 3) == [[0, 1], [1, 2]]
    assert ref.key_groups([[5, 0], [4, 1, 2, 3]], 6, 3) == [[0, 2], [0, 1, 2]]


def pool_heads(ref: Any) -> None:
    """Tokens 0, 2 and 4 of five. Heads 0 and 2: (1 + 5) / 2, (3 + 9) / 2, (5 + 1) / 2; head 1 alone."""
    x = torch.tensor([[1.0, 2, 3, 4, 5], [10, 20, 30, 40, 50], [5, 7, 9, 0, 1]])[None, :, :, None]
    got = ref.pool_heads(x, [[0, 2], [1]], 2)
    assert got.dtype == torch.float32
    assert got[0, :, :, 0].tolist() == [[3.0, 6.0, 3.0], [10.0, 30.0, 50.0]]
    # 1 + 2**-7 is the next number after 1 in bfloat16; their mean is half a step, which rounds to even, once.
    near_one = torch.tensor([[1.0], [1 + 2**-7]], dtype=torch.bfloat16)[None, :, :, None]
    assert ref.pool_heads(near_one, [[0, 1]], 1).tolist() == [[[[1.0]]]]
    assert ref.pool_heads(near_one, [[0, 1, 1]], 1).tolist() == [[[[1 + 2**-7]]]]


def outlying_queries(ref: Any) -> None:
    """Six queries of one dimension, 2, 0, 5, 1 | 9, 9, among four neighbours: means 2 and 9."""
    q = torch.tensor([2.0, 0, 5, 1, 9, 9])[None, None, :, None]
    valid = torch.ones(1, 1, 6, dtype=torch.bool)
    assert ref.outlying_queries(q, valid, 2, 4).tolist() == [[[1, 2, 4]]]  # distances 0, 2 | 3, 1 | 0, 0
    assert ref.outlying_queries(q, valid, 4, 4).tolist() == [[[2, 4]]]
    # Only what is valid counts: without query 0 the mean is 7 instead of 5.25; of nothing valid, the first.
    q = torch.tensor([0.0, 10, 4, 7])[None, None, :, None]
    assert ref.outlying_queries(q, valid[..., :4], 2, 4).tolist() == [[[0, 3]]]
    valid = torch.tensor([False, True, True, True])[None, None]
    assert ref.outlying_queries(q, valid, 2, 4).tolist() == [[[1, 2]]]
    assert ref.outlying_queries(q, torch.zeros(1, 1, 4).bool(), 2, 4).tolist() == [[[0, 2]]]
    # Squares of the whole vector, each sequence and each proxy by itself; an infinite query is at no distance.
    q = torch.tensor([[[3.0, 0], [-1, -4], [-2, 4]], [[math.inf, 0], [0, 0], [1, 0]]])[:, None]
    assert ref.outlying_queries(q, torch.ones(2, 1, 3).bool(), 4, 4).tolist() == [[[2]], [[1]]]
    assert ref.outlying_queries(q.transpose(0, 1), torch.ones(1, 2, 3).bool(), 4, 4).tolist() == [[[2], [1]]]
    q = torch.full((1, 1, 2, 1), math.nan)
    assert ref.outlying_queries(q, torch.tensor([[[False, True]]]), 2, 2).tolist() == [[[1]]]


def block_scores(ref: Any) -> None:
    """Three sampled queries and keys, two to a block, keys ln 1, ln 2, ln 5.

    Query 0 (1): key 0 alone, probability 1. Query 1 (1): weights 1, 2, so 1/3, 2/3. Query 2 (2): 1, 4, 25, so 1/30,
    4/30, 25/30. Block (0, 0) is the largest of 1, 1/3, 2/3; (0, 1) has no pair; (1, 0) is 4/30; (1, 1) is 25/30.
    In the second sequence query 0 sees key 2, and query 2 nothing.
    """
    q = column(2, 2, 4).expand(2, 1, 3, 1)  # with scale 1/2
    k = column(0, LN2, LN5).expand(2, 1, 3, 1)
    allowed = torch.stack([bools("x.. xx. xxx"), bools("..x xx. ...")])[:, None]
    got = ref.block_scores(q, k, allowed, (2, 2), 0.5)
    near(got[0, 0], [[0.0, -INF], [math.log(4 / 30), math.log(25 / 30)]])
    near(got[1, 0], [[math.log(2 / 3), 0.0], [-INF, -INF]])
    got = ref.block_scores(q, k, allowed, (1, 2), 0.5)  # two keys to a block, and one query
    near(got[0, 0], [[0.0, -INF], [math.log(2 / 3), -INF], [math.log(4 / 30), math.log(25 / 30)]])


def probe_masses(ref: Any) -> None:
    """Blocks of 2, three queries and keys, four query heads on two key heads. The last two valid queries are probed.

    First sequence, causal: queries 1 and 2. Head 0 (q = 1, weights 1, 2, 5): 1/3 2/3, then 1/8 2/8 5/8; blocks
    (1 + 3/8) / 2, (0 + 5/8) / 2. Head 1 (q = 0): 1/2 1/2, then thirds; (1 + 2/3) / 2, 1/6. The other key head has the
    weights 1, 1, 2. Head 2 (q = 1): 1/2 1/2, then 1/4 1/4 2/4; (1 + 1/2) / 2, 1/4. Head 3 (q = 2): 1/2 1/2, then
    1/6 1/6 4/6; 2/3, 1/3.
    Second: query 2 sees nothing, so queries 0 (key 2 alone) and 1: halves. Third: nothing at all.
    """
    q = torch.stack([column(x, x, x) for x in (2, 0, 2, 4)]).expand(3, 4, 3, 1)  # with scale 1/2
    k = torch.stack([column(0, LN2, LN5), column(0, 0, LN2)]).expand(3, 2, 3, 1)
    allowed = torch.stack([bools("x.. xx. xxx"), bools("..x xx. ..."), bools("... ... ...")])
    got = ref.probe_masses(q, k, allowed[:, None].expand(3, 4, 3, 3), 2, 0.5)
    near(got[0], [[11 / 16, 5 / 16], [5 / 6, 1 / 6], [3 / 4, 1 / 4], [2 / 3, 1 / 3]])
    near(got[1], [[0.5, 0.5]] * 4)
    near(got[2], [[0.0, 0.0]] * 4)


def budgets(ref: Any) -> None:
    """Masses 1/2, 1/4, 1/8, 1/8 in any order, and a head with none; blocks of 16 tokens."""
    masses = torch.tensor([[[0.125, 0.5, 0.125, 0.25], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]]])
    none = torch.zeros(1, 3, dtype=torch.int64)

    def counts(gamma: float, low: int = 0, high: int | None = None, forced: Tensor = none) -> list[int]:
        got: list[int] = ref.budgets(masses.double(), gamma, low, high, 16, forced)[0].tolist()
        return got

    assert counts(0.75) == [2, 3, 4]  # reached exactly by two; by three quarters; never
    assert counts(0.76) == [3, 4, 4]
    assert counts(0.5) == [1, 2, 4]
    assert counts(1.0) == [4, 4, 4]  # all, whatever the masses are
    assert counts(0.1, low=17) == [2, 2, 4]  # 17 tokens are two blocks
    assert counts(0.1, low=65) == [4, 4, 4]  # there are four
    assert counts(0.9, high=47) == [2, 2, 2]  # 47 tokens hold two
    assert counts(1.0, high=48) == [3, 3, 3]
    assert counts(0.1, forced=torch.tensor([[3, 1, 0]])) == [3, 1, 4]
    assert counts(0.1, high=32, forced=torch.tensor([[3, 1, 9]])) == [3, 1, 4]  # forced above max, below Nk


def all_mass_early(ref: Any) -> None:
    """gamma 1.0 keeps every block, also where one holds the whole mass."""
    one = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    assert ref.budgets(one, 1.0, 0, None, 16, torch.zeros(1, 1)).tolist() == [[3]]
    assert ref.budgets(one, 0.99, 0, None, 16, torch.zeros(1, 1)).tolist() == [[1]]


def forced(ref: Any) -> None:
    """Blocks of 2, six keys. Queries 0 .. 3 stand at 2 .. 5, or (second sequence) at 1 .. 4."""
    causal = torch.stack([bools("xx. xxx"), bools("xx. xxx")])[:, None]
    begin = torch.tensor([[[0, 0]], [[0, 1]]])
    got = ref.forced([2, 1], causal, begin, 4, 2, 0, 1)[:, 0]
    assert torch.equal(got[0], bools(".x. ..x"))  # positions 2, 3; 4, 5
    assert torch.equal(got[1], bools("xx. .xx"))  # positions 1, 2; 3, 4: each straddles two blocks
    got = ref.forced([2, 1], causal, begin, 4, 2, 0, 2)[:, 0]  # and the block before the first of them
    assert torch.equal(got[0], bools("xx. .xx"))
    assert torch.equal(got[1], bools("xx. xxx"))
    got = ref.forced([2, 2], causal, begin, 4, 2, 1, 1)[:, 0]  # and the first of the row's sequence
    assert torch.equal(got[0], bools("xx. x.x"))
    assert torch.equal(got[1], bools("xx. .xx"))
    assert torch.equal(ref.forced([2], causal[:1], begin + 3, 4, 2, 1, 1)[0, 0], bools(".x. ..x"))  # which has none
    assert torch.equal(ref.forced([2], causal[:1], begin, 4, 2, 2, 1)[0, 0], bools("xx. xxx"))
    assert torch.equal(
        ref.forced([1], causal[:1], begin, 3, 2, 0, 1)[0, 0], bools("xx. .x.")
    )  # query 2 at 3 is the last
    # Only what is admissible. Past the end of what a row may see: its last two blocks, or before.
    holes = torch.stack([bools("x.x ..."), bools("xx. x..")])[None]
    begin = begin[:1].expand(1, 2, 2)
    got = ref.forced([2], holes, begin, 4, 2, 0, 1)
    assert torch.equal(got[0, 0], bools("... ..."))
    assert torch.equal(got[0, 1], bools(".x. x.."))
    assert torch.equal(ref.forced([4], holes, begin, 4, 2, 0, 1)[0, 1], bools("xx. x.."))


def rank_blocks(ref: Any) -> None:
    """Row 0: block 4 is forced; then -0.5 twice, lower index first; -1; 1 has no score; 5 is not admissible.

    Row 1: forced blocks stand by index, not by score; a forced block that is not admissible is last.
    """
    scores = torch.tensor([[-1.0, -INF, -0.5, -0.5, -2.0, 0.0], [-1.0, -3.0, -0.1, -0.2, -2.0, -INF]])
    admissible = bools("xxxxx. .xxxxx")
    force = bools("....x. xx..x.")
    got = ref.rank_blocks(scores[None, None], admissible[None, None], force[None, None])
    assert got.dtype == torch.int32
    assert got[0, 0].tolist() == [[3, 4, 1, 2, 0, 5], [5, 0, 2, 3, 1, 4]]
    # Two inadmissible blocks stand by index, too, with or without a score.
    got = ref.rank_blocks(torch.tensor([[[[-3.0, -INF, -1.0]]]]), bools("..x")[None, None], bools("...")[None, None])
    assert got[0, 0].tolist() == [[1, 2, 0]]


def select(ref: Any) -> None:
    """Heads 0, 2 and 3 follow proxy 0, head 1 proxy 1; counts 1, 2, 2, 1, then 3. Key block 1 is closed to head 2.

    What head 2 may not see takes no place in its count. Block 2 is forced to head 3.
    """
    rank = torch.tensor([[[2, 0, 1]] * 2, [[0, 2, 1]] * 2])[None]
    admissible = torch.stack([bools("xxx xxx"), bools("xxx xxx"), bools("x.x x.x"), bools("xxx xxx")])[None]
    force = torch.stack([bools("... ..."), bools("... ..."), bools("... ..."), bools("..x ..x")])[None]
    count = torch.tensor([[[1, 3], [2, 3], [2, 1], [1, 2]]])
    got = ref.select(rank, count, [[0, 2, 3], [1]], admissible, force)
    assert torch.equal(got[0, 0], bools(".x. xxx"))
    assert torch.equal(got[0, 1], bools("x.x xxx"))
    assert torch.equal(got[0, 2], bools("x.x ..x"))
    assert torch.equal(got[0, 3], bools("..x .xx"))
    two = [x.expand(2, *x.shape[1:])[:, :2] for x in (rank, count, admissible, force)]
    got = ref.select(two[0], two[1], [[0], [1]], two[2], two[3])
    assert torch.equal(got[1, 1], bools("x.x xxx"))


def walk(ref: Any) -> None:
    """Block 3 is forced and goes first, block 1 is closed; then by rank."""
    assert ref.walk(torch.tensor([2, 0, 1, 3]), bools("x.xx")[0], bools("...x")[0]) == [3, 2, 0]


def share(ref: Any) -> None:
    """Head 1 follows proxy 0, head 0 proxy 1; four blocks. Blocks 0 and 2 are forced to row 0 of head 0.

    Row 1 of head 0 is dense, and has three blocks; row 0 of head 1, too. In any case are kept 2 and 3 blocks of head 0,
    and 1 and 1 of head 1: 7. The rest, by the step from which it is kept: of head 0, blocks 3 and 1 of row 0, steps 6
    and 33; of head 1, blocks 0 and 3 of row 0, steps 33 and the last, and 1, 3 and 2 of row 1, steps 41, the last, the
    last. So 7, 8, 10, 11 or 14 blocks can be kept. The second sequence is the same.
    """
    none = 64 * INF
    scores = torch.tensor([[[32.0, 16, 0, none], [8, 40, none, 9000]], [[3, 32.4, 100, 5], [1, math.nan, 1, 1]]]) / -64
    rank = torch.tensor([[[2, 1, 0, 3], [0, 1, 3, 2]], [[0, 2, 3, 1], [0, 3, 1, 2]]])
    admissible = torch.stack([bools("xxxx xxx."), bools("xx.x xxxx")])
    force = torch.stack([bools("x.x. ...."), bools(".... ....")])
    dense = torch.tensor([[False, True], [False, False]])
    tensors = [x.expand(2, *x.shape) for x in (scores, rank, admissible, force, dense)]

    def counts(first: int, second: int, least: int = 0, most: int | None = None) -> list[Any]:
        groups, total = [[1], [0]], [first, second]
        got = ref.share(*tensors[:2], groups, *tensors[2:], total, (least, most))
        assert got.dtype == torch.int32
        return [sequence.tolist() for sequence in got]

    assert counts(0, 7) == [[[2, 4], [1, 1]]] * 2
    assert counts(8, 9) == [[[3, 4], [1, 1]]] * 2  # 9 is as near to 8 as to 10
    assert counts(10, 11) == [[[4, 4], [2, 1]], [[4, 4], [2, 2]]]
    assert counts(12, 13) == [[[4, 4], [2, 2]], [[4, 4], [3, 4]]]
    assert counts(9, 10, least=2) == [[[2, 4], [2, 2]], [[3, 4], [2, 2]]]
    assert counts(8, 99, most=3) == [[[3, 4], [1, 1]], [[3, 4], [3, 3]]]
    assert counts(99, 99, most=1) == [[[2, 4], [1, 1]]] * 2  # forced blocks are two
    # What is above 0 counts as 0, so that blocks 3 and 0 are in one step; NaN counts as none.
    tensors[0] = torch.where(tensors[0] == scores[1, 0, 1], math.nan, tensors[0] + 33 / 64)
    assert counts(8, 9) == [[[2, 4], [1, 1]], [[3, 4], [2, 1]]]


def attention(ref: Any) -> None:
    """Keys 0 and ln 3, values 4 and 8: 1/4 and 3/4 for q = 1 give 7; 1/10 and 9/10 for q = 2 give 7.6; q = 0 gives 6.

    Key head 1 has the values 1 and 0. Query 1 sees key 0 alone, and in the second sequence nothing: 0.
    """
    q = torch.stack([column(2, 2), column(4, 4), column(2, 2), column(0, 0)]).expand(2, 4, 2, 1)  # with scale 1/2
    k = column(0, math.log(3)).expand(2, 2, 2, 1)
    v = torch.stack([column(4, 8), column(1, 0)]).expand(2, 2, 2, 1)
    allowed = torch.stack([bools("xx x."), bools("xx ..")])[:, None].expand(2, 4, 2, 2)
    got = ref.attention(q, k, v, allowed, 0.5)[..., 0]
    near(got[0], [[7.0, 4.0], [7.6, 4.0], [0.25, 1.0], [0.5, 1.0]])
    near(got[1], [[7.0, 0.0], [7.6, 0.0], [0.25, 0.0], [0.5, 0.0]])


EXAMPLES: dict[str, Example] = {
    example.__name__: example
    for example in (
        token_mask,
        listed,
        classify,
        groups_of,
        key_groups,
        pool_heads,
        outlying_queries,
        block_scores,
        labels_of,
        sinks,
        probe_masses,
        budgets,
        all_mass_early,
        last_rows,
        row_counts,
        forced,
        rank_blocks,
        walk,
        select,
        share,
        attention,
    )
}

# Example, what the specification says, and a mistake in its place.
MISTAKES = [
    (
        "token_mask",
        "batch, heads, num_queries, num_keys, device=device",
        "1, heads, num_queries, num_keys, device=device",
    ),
    (
        "token_mask",
        "batch, heads, num_queries, num_keys, device=device",
        "batch, 1, num_queries, num_keys, device=device",
    ),
    ("classify", "pairs == block_size**2", "pairs >= block_size"),
    ("classify", "pairs > 0", "pairs > 1"),
    ("classify", "torch.zeros(\n        *allowed", "torch.ones(\n        *allowed"),
    ("classify", "x=block_size, y=block_size", "x=1, y=block_size"),
    (
        "groups_of",
        "(p + 1) * size)) for p in range(num_proxies)",
        "num_q_heads, num_proxies)) for p in range(num_proxies)",
    ),
    ("key_groups", "head * num_kv_heads // num_q_heads", "head % num_kv_heads"),
    (
        "key_groups",
        "sorted({head * num_kv_heads // num_q_heads for head in heads})",
        "[head * num_kv_heads // num_q_heads for head in heads]",
    ),
    ("pool_heads", "torch.arange(0, x.shape[2], stride)", "torch.arange(stride - 1, x.shape[2], stride)"),
    ("pool_heads", ".mean(1) for", ".amax(1) for"),
    ("pool_heads", ".mean(1) for heads in groups], 1).to(x.dtype)", ".mean(1) for heads in groups], 1)"),
    ("outlying_queries", "max(numbers", "min(numbers"),
    ("outlying_queries", "first + neighbours, length", "first + window, length"),
    ("outlying_queries", "length)) if valid[b, p, t]]", "length))]"),
    ("outlying_queries", "for t in tokens if valid[b, p, t]]", "for t in tokens]"),
    ("outlying_queries", ".square().sum()", ".sum()"),
    ("outlying_queries", "if not math.isnan(distance[t])]", "]"),
    ("outlying_queries", "(candidates or tokens)[0]", "tokens[0]"),
    ("outlying_queries", "double().mean(0)", "double().sum(0)"),
    ("block_scores", '"b p (i x) (j y) -> b p i j", "max"', '"b p (i x) (j y) -> b p i j", "mean"'),
    ("block_scores", "x, y = cell", "y, x = cell"),
    ("block_scores", "torch.log_softmax(scores, -1)", "scores"),
    ("block_scores", "torch.log_softmax(scores, -1)", "torch.log_softmax(scores, -2)"),
    ("block_scores", "scores = scores.masked_fill(~allowed, -math.inf)\n    log", "log"),
    ("block_scores", "-1).masked_fill(~allowed, -math.inf)\n    num", "-1)\n    num"),
    ("block_scores", "scores = scale * torch.einsum", "scores = torch.einsum"),
    ("probe_masses", ".nonzero().flatten()[-block_size:]", ".nonzero().flatten()[:block_size]"),
    ("probe_masses", ".nonzero().flatten()[-block_size:]", ".nonzero().flatten()[-1:]"),
    (
        "probe_masses",
        "rows = allowed[b, h].any(-1).nonzero().flatten()[-block_size:]",
        "rows = torch.arange(allowed.shape[2])[-block_size:]",
    ),
    ("probe_masses", "key_head = h * k.shape[1] // num_q_heads", "key_head = h % k.shape[1]"),
    ("probe_masses", "masked_fill(~allowed[b, h, rows], -math.inf).softmax", "softmax"),
    ("probe_masses", '"b h (j y) -> b h j", "sum"', '"b h (j y) -> b h j", "max"'),
    ("probe_masses", "scores = scale * q[b", "scores = q[b"),
    ("budgets", "sort(descending=True).values", "sort().values"),
    ("budgets", "masses[b, h].sort(descending=True).values.tolist()", "masses[b, h].tolist()"),
    ("budgets", "if total >= gamma", "if total > gamma"),
    ("all_mass_early", "if gamma == 1.0:", "if total < gamma:"),
    ("budgets", "math.ceil(min_budget / block_size)", "min_budget // block_size"),
    ("budgets", "max_budget // block_size", "math.ceil(max_budget / block_size)"),
    ("budgets", "int(forced[b, h])", "0"),
    ("budgets", "min(max(needed, int(forced[b, h])), num_blocks)", "max(needed, int(forced[b, h]))"),
    ("forced", "(query + offset[b]) // block_size", "query // block_size"),
    ("forced", "(query + offset[b]) // block_size", "(query + offset[0]) // block_size"),
    ("forced", "min((i + 1) * block_size, num_queries)", "(i + 1) * block_size"),
    ("forced", "j <= last or begin <= j < begin + sink_blocks", "j <= last"),
    ("forced", "j <= last or begin <= j < begin + sink_blocks", "j <= last or j < sink_blocks"),
    ("forced", "j <= last or begin <= j < begin + sink_blocks", "j <= last or begin <= j <= begin + sink_blocks"),
    ("forced", "first - local < j <= last", "first - local <= j <= last"),
    ("forced", "begin = int(sink[b, h, i])", "begin = int(sink[b, h, 0])"),
    ("forced", "if last > seen[-1]:", "if False:"),
    ("forced", "min(first, seen[-1] - 1)", "min(first, seen[-1])"),
    ("forced", "for j in seen:", "for j in range(admissible.shape[3]):"),
    ("listed", "return allowed & blocks", "return blocks"),
    ("listed", "return allowed & blocks[:, :, rows[:, None], columns]", "return allowed"),
    ("labels_of", "torch.where(seen, 0, -1)", "torch.where(seen, 0, 0)"),
    ("labels_of", "allowed.any(1).any(1)", "allowed[:, 0].any(1)"),
    ("labels_of", "if known else", "if not known else"),
    ("sinks", "labels.index(label) // block_size", "0"),
    ("sinks", "row.clamp_(max=labels.index(label)", "row.fill_(labels.index(label)"),
    ("sinks", "if label >= 0 and label in labels", "if label in labels"),
    ("sinks", "for query in allowed[b, h].any(-1).nonzero().flatten().tolist()", "for query in range(num_queries)"),
    ("sinks", "row = first[b, h, query // block_size]", "row = first[b, 0, query // block_size]"),
    ("last_rows", "rows[rows > rows[-1] - number]", "rows[-number:]"),
    ("last_rows", "(valid & (q_label[b] == label))", "(q_label[b] == label)"),
    ("last_rows", "set(q_label[b].tolist()) - set(range(-num_queries, 0))", "set(q_label[b].tolist())"),
    ("last_rows", "(valid & (q_label[b] == label))", "valid"),
    ("row_counts", "if label >= 0:", "if label > 0:"),
    ("row_counts", "q_label[b, h, i", "q_label[b, 0, i"),
    ("row_counts", "+= count[label][b, h]", "= count[label][b, h]"),
    ("row_counts", "counts.clamp(max=num_k_blocks)", "counts"),
    ("row_counts", "torch.where(dense, num_k_blocks", "torch.where(dense, 0"),
    ("rank_blocks", "-row[j], j)", "row[j], j)"),
    ("rank_blocks", "-row[j], j)", "-row[j], -j)"),
    ("rank_blocks", "if forced[b, p, i, j]:", "if False:"),
    ("rank_blocks", "return 0, 0.0, j", "return 0, -row[j], j"),
    ("rank_blocks", "if not admissible[b, p, i, j]:", "if False:"),
    ("rank_blocks", "row[j] == -math.inf", "row[j] < -0.4"),
    ("rank_blocks", "return 3, 0.0, j", "return 1, -row[j], j"),
    ("rank_blocks", "rank[b, p, i, j] = r", "rank[b, p, i, r] = j"),
    ("walk", "(not forced[j], int(rank[j]))", "(not forced[j], -int(rank[j]))"),
    ("walk", "(not forced[j], int(rank[j]))", "int(rank[j])"),
    ("walk", "own = admissible.nonzero()", "own = (rank >= 0).nonzero()"),
    ("select", "walk(rank[b, proxy, i]", "walk(rank[b, 0, i]"),
    ("select", "rank[b, proxy, i], admissible[b, h, i]", "rank[b, proxy, i], admissible[b, heads].any(0)[i]"),
    ("share", "-64 * score", "-64.0 * 64 * score"),
    ("share", "max(least, most_forced, 1)", "max(most_forced, 1)"),
    ("share", "max(most, most_forced)", "len(own)"),
    ("share", "walk(rank[b, p, i]", "walk(rank[b, 0, i]"),
    ("share", "), scores[b, p, i].tolist()", "), scores[b, 0, i].tolist()"),
    ("share", "abs(bisect.bisect(every, step) - total[b])", "bisect.bisect(every, step) > total[b]"),
    ("share", "abs(bisect.bisect(every, step) - total[b])", "abs(bisect.bisect(every, step) - total[0])"),
    ("share", "-64 * score, 0.0", "-64 * score, -99.0"),
    ("share", "4095 if math.isnan(score) else 1", "0 if math.isnan(score) else 1"),
    ("share", "4094.0)", "40.0)"),
    ("share", "math.floor(min", "math.ceil(min"),
    ("share", "if dense[b, h, i] else", "if False else"),
    ("share", "max(least, most_forced, 1)", "max(least, 1)"),
    ("share", "max(least, most_forced, 1)", "max(least, most_forced)"),
    ("share", "min([0, *every]", "min(every[::-1]"),
    ("share", "sum(step <= last", "sum(step < last"),
    ("share", "torch.where(dense, rank.shape[-1], counts)", "counts"),
    ("select", "own[: int(count[b, h, i])]", "own[: int(count[b, h, 0])]"),
    ("select", "own[: int(count[b, h, i])]", "own[: int(count[b, proxy, i])]"),
    ("select", "itertools.product(range(len(rank))", "itertools.product(range(1)"),
    ("attention", 'x.double(), "b h s d -> b (h g) s d"', 'x.double(), "b h s d -> b (g h) s d"'),
    ("attention", "(scale * q.double()", "(q.double()"),
    ("attention", "return scores.softmax(-1).nan_to_num(0.0)", "return scores.softmax(-1)"),
    ("attention", ".masked_fill(~allowed, -math.inf)\n    return scores", "\n    return scores"),
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_specification(name: str) -> None:
    """Each function of the specification gives the values worked out by hand."""
    EXAMPLES[name](reference)


@pytest.mark.parametrize(("name", "right", "wrong"), MISTAKES)
def test_a_planted_mistake_shows(name: str, right: str, wrong: str) -> None:
    """With a mistake planted in the specification, its example fails."""
    source = inspect.getsource(reference)
    assert source.count(right) == 1, f"the place to plant in is not found once: {right!r}"
    planted = ModuleType("planted")
    exec(compile(source.replace(right, wrong), "planted", "exec"), planted.__dict__)
    with pytest.raises((AssertionError, RuntimeError)):
        EXAMPLES[name](planted)


def test_every_function_has_an_example() -> None:
    """No function of the specification goes unchecked, nor without a planted mistake."""
    functions = {name for name, _ in inspect.getmembers(reference, inspect.isfunction) if name in vars(reference)}
    own = {name for name in functions if getattr(reference, name).__module__ == reference.__name__}
    assert own <= set(EXAMPLES)
    assert own <= {name for name, _, _ in MISTAKES}
