"""Which requests of a step are prefilled sparsely, and which neighbours stay together for dense attention.

Plain Python on host copies of lengths: nothing here knows vLLM, and nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flexproxy.sparse.ragged import Request


class Run(NamedTuple):
    """Neighbouring requests, ``first`` to ``end - 1``, whose queries are ``start`` to ``stop - 1``."""

    first: int
    end: int
    start: int
    stop: int


def prefills(query_starts: Sequence[int], key_lengths: Sequence[int], prefilling: Sequence[bool]) -> list[Request]:
    """The requests that are still reading their prompt, with more than one new token.

    Args:
        query_starts: where the queries of each request start, and where the last end.
        key_lengths: cached and new tokens of each request; exact for those that are prefilling.
        prefilling: whether a request's new tokens are of its prompt.

    The three may have places for requests that are not there: the shortest counts.
    """
    number = min(len(query_starts) - 1, len(key_lengths), len(prefilling))
    requests = (
        Request(i, query_starts[i], query_starts[i + 1] - query_starts[i], key_lengths[i])
        for i in range(number)
        if prefilling[i]
    )
    return [request for request in requests if 1 < request.num_queries <= request.num_keys]


def sparse_requests(requests: Sequence[Request], pays: Callable[[int, int], bool]) -> tuple[Request, ...]:
    """Those for which sparse attention pays, by their numbers of queries and keys."""
    return tuple(request for request in requests if pays(request.num_queries, request.num_keys))


def dense_runs(query_starts: Sequence[int], sparse: Sequence[Request]) -> tuple[Run, ...]:
    """The requests between the sparse ones, in as few runs of neighbours as possible; none without queries.

    Args:
        query_starts: as in ``prefills``; requests behind the last one are not there.
        sparse: in the order of the requests.
    """
    runs = []
    first = 0
    for row in [request.row for request in sparse] + [len(query_starts) - 1]:
        if query_starts[row] > query_starts[first]:
            runs.append(Run(first, row, query_starts[first], query_starts[row]))
        first = row + 1
    return tuple(runs)
