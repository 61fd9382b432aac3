"""Which requests of a step are sparse: without vLLM."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flexproxy.integrations.vllm.step import Run, dense_runs, prefills, sparse_requests
from flexproxy.sparse.ragged import Request


def test_mixed_step() -> None:
    """Two decodes, a chunk of a long prompt, a short prompt, a decode, a long prompt, and room for two more."""
    starts = [0, 1, 2, 514, 530, 531, 831, 831, 831]
    lengths = [900, 70, 4096, 16, 33, 300, 0, 0]
    prefilling = [False, False, True, True, False, True, False, False]
    found = prefills(starts, lengths, prefilling)
    assert found == [Request(2, 2, 512, 4096), Request(3, 514, 16, 16), Request(5, 531, 300, 300)]
    sparse = sparse_requests(found, lambda queries, keys: queries >= 128)
    assert [request.row for request in sparse] == [2, 5]
    assert dense_runs(starts, sparse) == (Run(0, 2, 0, 2), Run(3, 5, 514, 531))


def test_one_token_is_no_prefill() -> None:
    """Also where the prompt is not read to its end, and where a request takes more tokens than the batch has."""
    assert prefills([0, 1, 2], [1, 500], [True, True]) == []
    assert prefills([0, 8], [4], [True]) == []


def test_the_shortest_counts() -> None:
    assert prefills([0, 9, 18], [9], [True, True]) == [Request(0, 0, 9, 9)]
    assert prefills([0, 9, 18], [9, 9], [True]) == [Request(0, 0, 9, 9)]
    assert prefills([0, 9], [9, 9], [True, True]) == [Request(0, 0, 9, 9)]
    assert prefills([], [], []) == []


def test_nothing_sparse_is_one_run() -> None:
    assert dense_runs([0, 1, 9], []) == (Run(0, 2, 0, 9),)


def test_all_sparse_is_no_run() -> None:
    assert dense_runs([0, 4, 9], [Request(0, 0, 4, 4), Request(1, 4, 5, 5)]) == ()


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.booleans(), st.booleans()), max_size=8),
    st.integers(0, 3),
)
def test_every_query_is_in_one_place(requests: list[tuple[int, int, bool, bool]], room: int) -> None:
    """Sparse requests and dense runs together have every query once."""
    starts = [0]
    for queries, *_ in requests:
        starts.append(starts[-1] + queries)
    starts += [starts[-1]] * room
    lengths = [queries + cached for queries, cached, *_ in requests] + [0] * room
    found = prefills(starts, lengths, [prefilling for *_, prefilling, _ in requests] + [False] * room)
    chosen = {i for i, (*_, wanted) in enumerate(requests) if wanted}
    sparse = [request for request in found if request.row in chosen]
    spans = [(request.start, request.start + request.num_queries) for request in sparse]
    spans += [(run.start, run.stop) for run in dense_runs(starts, sparse)]
    assert all(end == start for (_, end), (start, _) in pairwise(sorted([(0, 0), *spans, (starts[-1], starts[-1])])))
    for run in dense_runs(starts, sparse):
        assert (starts[run.first], starts[run.end]) == (run.start, run.stop)
