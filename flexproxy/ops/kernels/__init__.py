"""Triton kernels of the operators, each with its launcher. Importing this needs triton; flexproxy does so when asked.

A launcher takes the arguments of the operator of its name and gives the same result: ranks, counts, maps and lists
exactly, scores and masses within the rounding of fp32.
"""

from flexproxy.ops.kernels.blocks import classify_clauses, summarize_rows
from flexproxy.ops.kernels.budget import block_masses, count_blocks, last_valid_queries
from flexproxy.ops.kernels.documents import document_masses
from flexproxy.ops.kernels.lists import block_lists, selected_lists
from flexproxy.ops.kernels.proxy import outlying_queries, pool_groups
from flexproxy.ops.kernels.ranking import forced_counts, rank_blocks
from flexproxy.ops.kernels.reading import Reader
from flexproxy.ops.kernels.scores import block_scores
from flexproxy.ops.kernels.sharing import shared_counts

__all__ = ["OPERATORS", "Reader"]

OPERATORS = {
    launcher.__name__: launcher
    for launcher in (
        block_lists,
        block_masses,
        block_scores,
        classify_clauses,
        count_blocks,
        document_masses,
        forced_counts,
        last_valid_queries,
        outlying_queries,
        pool_groups,
        rank_blocks,
        selected_lists,
        shared_counts,
        summarize_rows,
    )
}
