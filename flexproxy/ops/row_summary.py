"""The columns of a row summary, int32 ``[b, h, Nq, COLUMNS]``: what each row of blocks holds.

FIRST, END: the first admissible block, and one more than the last; Nk and 0 where there is none.
FULL_FIRST, FULL_END: the first full block, and the first after it that is not full; Nk and Nk where there is none.
NUMBER: of admissible blocks.
SINK: the first block of the row's sequence; Nk where it has none. DENSE: 1 where all of the row is kept, else 0.
"""

FIRST, END, FULL_FIRST, FULL_END, NUMBER, SINK, DENSE = range(7)
COLUMNS = 7
