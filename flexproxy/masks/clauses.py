"""Masks as numbers: which keys a query may see, without a tensor of token pairs.

NOTE [Clauses]
A *clause* describes a mask by one interval and one label for each query: query q may see key k if

    lo[q] <= k < hi[q]    and    q_label[q] == k_label[k] >= 0   (where the clause has labels).

Causal, sliding-window and prefix masks are intervals; documents and padding are labels. The intersection of two clauses
is a clause again (two labels become one that numbers the pairs), and a mask is the union of one or more clauses. So all
of flexproxy.masks, alone and under and_masks / or_masks / shift, costs four numbers a token, and a block of keys is
classified by *counting* how many of its keys each query may see.

Shapes: ``b`` is 1 or the batch size; positions are int32; ``C`` clauses are stacked in the first dimension.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Labels: TypeAlias = tuple[Tensor, Tensor]  # of queries [b, Sq] and of keys [b, Skv], integers; negative is none
MAX_CLAUSES = 3  # a union of more is classified by evaluating tokens: the terms of its count are 2**C - 1


class Clause(NamedTuple):
    """One interval, and at most one label, for every query. See NOTE [Clauses].

    lo, hi: int32 ``[b, Sq]``. q_label: ``[b, Sq]``, k_label: ``[b, Skv]``, integers; negative is no label at all.
    """

    lo: Tensor
    hi: Tensor
    q_label: Tensor | None = None
    k_label: Tensor | None = None


class ClauseStack(NamedTuple):
    """Several clauses with equal shapes. lo, hi ``[C, b, Sq]``; labels ``[C, b, Sq]``, ``[C, b, Skv]`` or None."""

    lo: Tensor
    hi: Tensor
    q_label: Tensor | None
    k_label: Tensor | None


def intersect(x: Clause, y: Clause) -> Clause:
    lo, hi = torch.maximum(x.lo, y.lo), torch.minimum(x.hi, y.hi)
    if x.q_label is None or x.k_label is None:
        return Clause(lo, hi, y.q_label, y.k_label)
    if y.q_label is None or y.k_label is None:
        return Clause(lo, hi, x.q_label, x.k_label)
    return Clause(lo, hi, *intersect_labels((x.q_label, x.k_label), (y.q_label, y.k_label)))


def intersect_labels(x: Labels, y: Labels) -> Labels:
    """Labels that are equal where both are equal: both are numbered densely, then the pairs of numbers."""
    x_q, x_k = dense_labels(*x)
    y_q, y_k = dense_labels(*y)
    base = y[1].shape[-1]  # no dense label is larger
    q_label = torch.where((x_q < 0) | (y_q < 0), -1, x_q * base + y_q)
    k_label = torch.where((x_k < 0) | (y_k < 0), -1, x_k * base + y_k)
    return q_label, k_label


def dense_labels(q_label: Tensor, k_label: Tensor) -> Labels:
    """Renumber labels to 0 .. Skv - 1, equal where they were equal; -1 for none, and for a query label no key has.

    int64 ``[b, Sq]`` and ``[b, Skv]``. No synchronisation, so no ``torch.unique``.
    """
    batch = max(q_label.shape[0], k_label.shape[0])
    q_label = q_label.to(torch.int64).expand(batch, -1).contiguous()
    k_label = k_label.to(torch.int64).expand(batch, -1)
    k_dense, ordered, number = numbered(k_label)
    place = torch.searchsorted(ordered, q_label).clamp(max=ordered.shape[-1] - 1)
    found = (ordered.gather(-1, place) == q_label) & (q_label >= 0)
    return torch.where(found, number.gather(-1, place), -1), torch.where(k_label >= 0, k_dense, -1)


def numbered(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number the different values of a row from 0, in ascending order: int64 ``[..., S]`` each.

    Returns:
        The number of each value; the values sorted; the numbers of these.
    """
    ordered, order = values.sort(dim=-1, stable=True)
    is_new = torch.ones_like(ordered)
    is_new[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).to(torch.int64)
    number = is_new.cumsum(-1) - 1
    return torch.empty_like(number).scatter_(-1, order, number), ordered, number


def stack(clauses: tuple[Clause, ...]) -> ClauseStack:
    """Bring clauses to one batch size and stack them; where some have labels, one without gets the label 0."""
    if len(clauses) == 1 and clauses[0].q_label is None:  # nothing to bring together
        return ClauseStack(clauses[0].lo[None], clauses[0].hi[None], None, None)
    batch = max(t.shape[0] for clause in clauses for t in clause if t is not None)
    lo = torch.stack([c.lo.expand(batch, -1) for c in clauses])
    hi = torch.stack([c.hi.expand(batch, -1) for c in clauses])
    labels = [(c.q_label, c.k_label) for c in clauses if c.q_label is not None and c.k_label is not None]
    if not labels:
        return ClauseStack(lo, hi, None, None)
    length = labels[0][1].shape[-1]
    q_labels, k_labels = [], []
    for c in clauses:
        q_label = torch.zeros_like(c.lo) if c.q_label is None else c.q_label
        k_label = c.lo.new_zeros(1, length) if c.k_label is None else c.k_label
        q_labels.append(q_label.to(torch.int64).expand(batch, -1))
        k_labels.append(k_label.to(torch.int64).expand(batch, -1))
    return ClauseStack(lo, hi, torch.stack(q_labels), torch.stack(k_labels))


def unstack(clauses: ClauseStack) -> tuple[Clause, ...]:
    """The clauses of a stack."""
    lo, hi, q_label, k_label = clauses
    labels = [(None, None)] * len(lo) if q_label is None or k_label is None else zip(q_label, k_label, strict=True)
    return tuple(Clause(first, last, *pair) for first, last, pair in zip(lo, hi, labels, strict=True))


def inclusion_exclusion(clauses: tuple[Clause, ...]) -> tuple[tuple[Clause, ...], tuple[int, ...]]:
    """The intersections of every non-empty subset of clauses, and the sign of each in the size of their union."""
    terms, signs = [], []
    for size in range(1, len(clauses) + 1):
        for subset in combinations(clauses, size):
            term = subset[0]
            for clause in subset[1:]:
                term = intersect(term, clause)
            terms.append(term)
            signs.append(1 if size % 2 else -1)
    return tuple(terms), tuple(signs)


def allowed(lo: Tensor, hi: Tensor, q_label: Tensor | None, k_label: Tensor | None, k_position: Tensor) -> Tensor:
    """Evaluate stacked clauses for some queries and keys: bool ``[b, rows, keys]``.

    lo, hi, q_label: ``[C, b, rows]``; k_label: ``[C, b, keys]``; k_position: ``[keys]``. All but the last, and the
    result, may have heads after ``b``.
    """
    ok = (k_position >= lo[..., None]) & (k_position < hi[..., None])
    if q_label is not None and k_label is not None:
        ok &= (q_label[..., None] == k_label[..., None, :]) & (q_label[..., None] >= 0)
    return ok.any(dim=0) if len(ok) > 1 else ok[0]
