"""The columns of a row summary, int32 ``[b, h, Nq, COLUMNS]``: what each row of blocks holds.

FIRST, END: the first admissible block, and one more than the last; Nk and 0 where there is none.
FULL_FIRST, FULL_END: the first full block, and the first after it that is not full; Nk and Nk where there is none.
NUMBER: of admissible blocks.
"""

FIRST, END, FULL_FIRST, FULL_END, NUMBER = range(5)
COLUMNS = 5
