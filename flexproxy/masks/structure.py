"""What is known of a mask besides its function: one type for masks alone, combined and shifted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.masks.clauses import MAX_CLAUSES, Clause, Labels, intersect, intersect_labels

MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Position: TypeAlias = int | Tensor


class Table(NamedTuple):
    """A tensor that a mask looks up, by the name of its argument. per_sequence: its first dimension is the batch."""

    name: str
    value: Tensor
    per_sequence: bool


@dataclass(frozen=True)
class Structure:
    """What flexproxy knows of a mask besides its function. Every field but ``tables`` is None where it is not known.

    clauses: from the positions of the queries, int32 ``[b, Sq]``, and Skv, to the clauses whose union is the mask
        (if there are more than MAX_CLAUSES, to any MAX_CLAUSES + 1). Without them the mask is evaluated.
    documents: from the same to labels of queries and keys: a query sees only keys of its label (documents, padding).
    packed: whether these may be several documents; of padding alone they are one sequence.
    position: from a default to the position of query 0 among the keys: an int, or integers ``[]`` or ``[B]``; the
        default is the result where parts that should agree on it do not.
    tables: the tensors that the mask looks up.
    recipe: a function and its arguments, which may be masks, that make the mask again.
    """

    clauses: Callable[[Tensor, int], tuple[Clause, ...]] | None = None
    documents: Callable[[Tensor, int], Labels] | None = None
    packed: bool = False
    position: Callable[[int], Position] | None = None
    tables: tuple[Table, ...] = ()
    recipe: tuple[Callable[..., MaskMod], tuple[Any, ...]] | None = None

    def offset(self, at_end: int, device: torch.device) -> Tensor:
        """The position of query 0 among the keys: integers ``[1]`` or ``[B]``; ``at_end`` where it is not known."""
        position = at_end if self.position is None else self.position(at_end)
        return position.reshape(-1) if isinstance(position, Tensor) else torch.full((1,), position, device=device)


def attach(mask_mod: MaskMod, structure: Structure) -> MaskMod:
    mask_mod.structure = structure  # type: ignore[attr-defined]
    return mask_mod


def structure_of(mask_mod: MaskMod) -> Structure:
    """What is known of a mask: of those of ``flexproxy.masks``, and of torch's ``and_masks`` / ``or_masks`` of them."""
    structure = getattr(mask_mod, "structure", None)
    return structure if isinstance(structure, Structure) else _of_torch(mask_mod)


def _of_torch(mask_mod: MaskMod) -> Structure:
    """The parts of torch's combinators, from their closures. In a trace dynamo shows these wrongly, or not at all."""
    name = getattr(mask_mod, "__name__", "")
    if torch.compiler.is_compiling() or name not in ("and_mask", "or_mask") or mask_mod.__module__ != flex.__name__:
        return Structure()
    cells: Any = getattr(mask_mod, "__closure__", None) or ()
    parts = cells[0].cell_contents if len(cells) == 1 else None
    if not isinstance(parts, tuple) or not parts:
        return Structure()
    combine, maker = (all_of, flex.and_masks) if name == "and_mask" else (any_of, flex.or_masks)
    return combine([structure_of(part) for part in parts], (maker, parts))


# ------------------------------------------------------------------------------------------------ combinations


def all_of(parts: Sequence[Structure], recipe: tuple[Callable[..., MaskMod], tuple[Any, ...]]) -> Structure:
    """The structure of a conjunction. Its position is that of the parts that have one, where they agree."""
    of_clauses = [part.clauses for part in parts if part.clauses is not None]
    of_documents = [part.documents for part in parts if part.documents is not None]
    positions = [part.position for part in parts if part.position is not None]

    def clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
        product = of_clauses[0](position, num_keys)[: MAX_CLAUSES + 1]
        for part in of_clauses[1:]:
            term = part(position, num_keys)[: MAX_CLAUSES + 1]
            product = tuple(intersect(x, y) for x in product for y in term)[: MAX_CLAUSES + 1]
        return product

    def documents(position: Tensor, num_keys: int) -> Labels:
        labels = of_documents[0](position, num_keys)
        for part in of_documents[1:]:
            labels = intersect_labels(labels, part(position, num_keys))
        return labels

    def agreed(default: int) -> Position:
        position = positions[0](default)
        for part in positions[1:]:
            position = _where_equal(position, part(default), default)
        return position

    return Structure(
        clauses=clauses if len(of_clauses) == len(parts) else None,
        documents=documents if of_documents else None,
        packed=any(part.packed for part in parts),
        position=agreed if positions else None,
        tables=tuple(table for part in parts for table in part.tables),
        recipe=recipe,
    )


def any_of(parts: Sequence[Structure], recipe: tuple[Callable[..., MaskMod], tuple[Any, ...]]) -> Structure:
    """The structure of a disjunction, which does not say where its queries stand."""
    of_clauses = [part.clauses for part in parts if part.clauses is not None]

    def clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
        return tuple(clause for part in of_clauses for clause in part(position, num_keys)[: MAX_CLAUSES + 1])

    return Structure(
        clauses=clauses if len(of_clauses) == len(parts) else None,
        tables=tuple(table for part in parts for table in part.tables),
        recipe=recipe,
    )


def _where_equal(x: Position, y: Position, default: int) -> Position:
    """``x`` where it is ``y``, else the default; decided on the device."""
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        if x is y:
            return x
        x, y = (x, y) if isinstance(x, Tensor) else (y, x)
        return torch.where(x == y, x, default)  # type: ignore[arg-type]
    return x if x == y else default


# ------------------------------------------------------------------------------------------------ of all queries


def clauses_of(
    structure: Structure, num_queries: int, num_keys: int, device: torch.device
) -> tuple[Clause, ...] | None:
    """The clauses of a mask for queries 0 .. Sq - 1, which may reach beyond the keys; None if it must be evaluated."""
    if structure.clauses is None:
        return None
    clauses = structure.clauses(_indices(num_queries, device), num_keys)
    return clauses if len(clauses) <= MAX_CLAUSES else None


def documents_of(structure: Structure, num_queries: int, num_keys: int, device: torch.device) -> Labels | None:
    """The labels that part queries and keys into sequences, ``[b, Sq]`` and ``[b, Skv]``; None if there are none."""
    return None if structure.documents is None else structure.documents(_indices(num_queries, device), num_keys)


def _indices(number: int, device: torch.device) -> Tensor:
    return torch.arange(number, dtype=torch.int32, device=device)[None]


# ------------------------------------------------------------------------------------------------ pickling


class Recipe(NamedTuple):
    """How to make a mask, with recipes in place of masks among the arguments: all of it can be pickled."""

    maker: Callable[..., MaskMod]
    arguments: tuple[Any, ...]

    def make(self) -> MaskMod:
        return self.maker(*(a.make() if isinstance(a, Recipe) else a for a in self.arguments))


def recipe_of(mask_mod: MaskMod) -> Recipe | MaskMod:
    """How to make a mask again; a function of a module is its own recipe.

    Raises:
        TypeError: the mask is, or has as a part, a function that pickle cannot name.
    """
    known = structure_of(mask_mod).recipe
    if known is not None:
        return Recipe(known[0], tuple(recipe_of(a) if callable(a) else a for a in known[1]))
    name = getattr(mask_mod, "__qualname__", "")
    if not name or "<" in name:  # <lambda>, or <locals> of another function
        raise TypeError(
            f"mask_mod: expected a mask that can be pickled, got {name or type(mask_mod).__name__}; use the masks of "
            "flexproxy.masks and their combinations, or a function defined at the top of a module"
        )
    return mask_mod


# ------------------------------------------------------------------------------------------------ checks


def check_mask_mod(name: str, mask_mod: Any, block_mask_remedy: str, remedy: str) -> None:
    """Check that an argument is a ``mask_mod``; the remedies are for a BlockMask, and for what is no function."""
    if isinstance(mask_mod, BlockMask):
        raise TypeError(f"{name}: expected a function, got a BlockMask; {block_mask_remedy}")
    if not callable(mask_mod):
        raise TypeError(
            f"{name}: expected a function of (b, h, q_idx, kv_idx), got {type(mask_mod).__name__}; {remedy}"
        )
    if torch.compiler.is_compiling() or isinstance(getattr(mask_mod, "structure", None), Structure):
        return
    code = mask_mod.__code__ if isinstance(mask_mod, FunctionType) else None
    if code is not None and code.co_argcount == 4 and not code.co_kwonlyargcount:
        return  # to ask for its signature takes twenty times as long
    function, signature = getattr(mask_mod, "__name__", str(mask_mod)), ""
    try:
        signature = str(inspect.signature(mask_mod))
        inspect.signature(mask_mod).bind(0, 0, 0, 0)
    except (TypeError, ValueError):  # a builtin has no signature
        raise TypeError(
            f"{name}: expected a function of (b, h, q_idx, kv_idx), got {function}{signature}; masks with parameters "
            "are made by a call, for example masks.sliding_window(1024)"
        ) from None


def check_tables(tables: Sequence[Table], q: Tensor) -> None:
    """Check the tensors that a mask looks up: on the device of q, for its batch."""
    for name, value, per_sequence in tables:
        if value.device != q.device:
            raise ValueError(
                f"{name}: expected a tensor on {q.device}, as q, got one on {value.device}; move it with .to(device) "
                "before making the mask"
            )
        if per_sequence and value.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name}: expected a batch of {q.shape[0]}, as q, got a batch of {value.shape[0]}; give each sequence "
                "a row of its own, for example with expand"
            )
