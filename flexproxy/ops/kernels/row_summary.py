"""The columns of ``flexproxy.ops.row_summary``, as constants of kernels."""

import triton.language as tl

from flexproxy.ops import row_summary

FIRST = tl.constexpr(row_summary.FIRST)
END = tl.constexpr(row_summary.END)
FULL_FIRST = tl.constexpr(row_summary.FULL_FIRST)
FULL_END = tl.constexpr(row_summary.FULL_END)
NUMBER = tl.constexpr(row_summary.NUMBER)
SINK = tl.constexpr(row_summary.SINK)
DENSE = tl.constexpr(row_summary.DENSE)
COLUMNS = tl.constexpr(row_summary.COLUMNS)
