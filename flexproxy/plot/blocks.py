"""Pictures by block: which are kept, and the ranking beside the true mass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.plot.figures import DARK, LIGHT, MIDDLE, add_title, plain_style
from flexproxy.selection import Selection
from flexproxy.stats import block_mass, block_size_of, check_index, kept_and_full_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SELECTION_CLASSES = {"not admissible": LIGHT, "admissible, dropped": MIDDLE, "kept": DARK}
BLOCK_MASK_CLASSES = {"not listed": LIGHT, "partial": MIDDLE, "full": DARK}


def block_map(
    mask: Selection | BlockMask, *, heads: Sequence[int] | None = None, batch: int = 0, title: str | None = None
) -> Figure:
    """One small map of blocks for every head.

    Of a Selection it shows the blocks that are kept, dropped and not admissible, with the density of each head; of a
    BlockMask those that are full, partial and not listed, for it does not say what was admissible.

    Args:
        mask: a Selection of ``flexproxy.select``, or any BlockMask.
        heads: which query heads; None is all of them. A BlockMask with one list for all heads has head 0 alone.
        batch: which sequence.
        title: line above the maps; None describes the mask.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
        ModuleNotFoundError: matplotlib is not installed.
    """
    classes, names, notes = _classes_of(mask, heads, batch)
    chosen = list(range(classes.shape[0])) if heads is None else list(heads)
    if title is None:
        title = f"Blocks that each head {'keeps' if isinstance(mask, Selection) else 'lists'}, sequence {batch}"
    columns = min(len(chosen), 4 if len(chosen) <= 8 else 8)
    rows = math.ceil(len(chosen) / columns)
    q_size, k_size = block_size_of(mask)
    with plain_style():
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        inches = 2.6 if len(chosen) <= 8 else 1.9
        figure = Figure(figsize=(max(inches * columns + 1.0, 6.0), (inches + 0.25) * rows + 1.6), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axis in axes.flat[len(chosen) :]:
            axis.set_axis_off()
        for axis, head in zip(axes.flat, chosen, strict=False):
            _draw_blocks(axis, classes[head], cmap=ListedColormap(list(names.values())), vmin=0, vmax=2)
            axis.set_title(f"head {head}: {notes[head]}", fontsize=9)
        for axis in axes.flat[max(0, len(chosen) - columns) : len(chosen)]:  # the lowest of each column
            axis.set_xlabel(_block_label("key", k_size), fontsize=8)
            axis.tick_params(labelbottom=True)
        for axis in axes[:, 0]:
            axis.set_ylabel(_block_label("query", q_size), fontsize=8)
        add_title(figure, title)
        patches = [Patch(facecolor=colour, edgecolor="#808080", label=name) for name, colour in names.items()]
        figure.legend(handles=patches[::-1], loc="outside lower center", ncols=3, frameon=False)
    return figure


def ranking(
    selection: Selection,
    q: Tensor,
    k: Tensor,
    *,
    head: int = 0,
    batch: int = 0,
    scale: float | None = None,
    title: str | None = None,
) -> Figure:
    """The ranking of blocks beside their true attention mass, for one head.

    From left to right: the rank that the head's proxy gives every block; the probability that dense attention of this
    head gives it, the mean over the row's queries (``flexproxy.stats.block_mass``, which reads all pairs of tokens);
    and the mass that the first n blocks of a row hold, the mean over rows: ranked, and in the best order there is.

    Args:
        selection, q, k, scale: the selection, and what it was made from.
        head: the query head.
        batch: the sequence.
        title: line above; None describes the picture.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not isinstance(selection, Selection):
        raise TypeError(
            f"selection: expected a Selection, got {type(selection).__name__}; pass flexproxy.select(q, k), for no "
            "other mask ranks its blocks"
        )
    mass = block_mass(q, k, selection, head=head, batch=batch, scale=scale).cpu()
    rank = selection.rank[batch, int(selection.proxy_of[head])].cpu()
    admissible = selection.admissible.expand(*selection.count.shape, -1)[batch, head].cpu()
    count = selection.summary().count[batch][head]
    ranked, best = _mean_coverage(rank, mass, admissible)
    blocks = torch.arange(1, len(ranked) + 1)
    with plain_style():
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        figure = Figure(figsize=(15.0, 5.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        ranks = rank.float().masked_fill(~admissible, torch.nan)
        image = _draw_blocks(left, ranks, cmap="viridis_r")
        figure.colorbar(image, ax=left, label="rank in its row (0 is kept first)", location="bottom")
        left.set_title(f"ranking of proxy {int(selection.proxy_of[head])}")
        masses = mass.masked_fill(~admissible, torch.nan).clamp(min=1e-6)
        image = _draw_blocks(middle, masses, cmap="viridis", norm=LogNorm(1e-6, 1.0))
        figure.colorbar(image, ax=middle, label="probability, mean over the row's queries", location="bottom")
        middle.set_title("mass of dense attention")
        for axis in (left, middle):
            axis.set_xlabel(_block_label("key", selection.block_size))
            axis.set_ylabel(_block_label("query", selection.block_size))
        right.plot(blocks, best, color=DARK, label="best order there is")
        right.plot(blocks, ranked, color=MIDDLE, label="as ranked")
        right.axvline(count, color="#505050", linestyle="--", label=f"kept: {count} blocks a row")
        right.set_xlabel(f"first n blocks of a row ({selection.block_size} tokens each)")
        right.set_ylabel("mass that they hold, mean over rows")
        right.set_ylim(0.0, 1.02)
        right.set_title("mass held by the first blocks")
        right.grid(color="#dddddd")
        right.legend(loc="lower right")
        add_title(figure, title or f"Ranking and true mass of head {head}, sequence {batch}")
    return figure


# What is drawn


def _classes_of(mask: Any, heads: Any, batch: int) -> tuple[Tensor, dict[str, str], list[str]]:
    """Class of every block, int8 ``[h, Nq, Nk]``; the classes with their colours; a note for every head."""
    if not isinstance(mask, (Selection, BlockMask)):
        raise TypeError(
            f"mask: expected a Selection or a BlockMask, got {type(mask).__name__}; pass flexproxy.select(q, k) or a "
            "mask of create_block_mask"
        )
    kept, full = kept_and_full_blocks(mask)
    check_index("batch", batch, kept.shape[0])
    if heads is not None and (not isinstance(heads, Sequence) or isinstance(heads, str)):
        raise TypeError(
            f"heads: expected indices of heads, got {type(heads).__name__}; pass a list of ints, such as [3]"
        )
    if heads is not None and not heads:
        raise ValueError("heads: expected indices of heads, got none; None draws all heads")
    for head in heads or ():
        check_index("heads", head, kept.shape[1])
    if isinstance(mask, Selection):
        upper, lower = kept[batch], mask.admissible.expand_as(kept)[batch]
        names, notes = SELECTION_CLASSES, [f"density {value:.3f}" for value in mask.density()[batch].tolist()]
    else:
        upper, lower = full[batch], kept[batch]
        names, notes = BLOCK_MASK_CLASSES, [f"{number} blocks" for number in lower.sum((-2, -1)).tolist()]
    return (lower.to(torch.int8) + (upper & lower).to(torch.int8)).cpu(), names, notes


def _mean_coverage(rank: Tensor, mass: Tensor, admissible: Tensor) -> tuple[Tensor, Tensor]:
    """Mass of the first n + 1 blocks of a row, by rank and by mass, the mean over rows with any: ``[Nk]`` each."""
    rows = admissible.any(-1)
    mass = mass[rows]
    ranked = mass.gather(-1, rank[rows].to(torch.int64).argsort(-1))
    return tuple(x.cumsum(-1).mean(0) for x in (ranked, mass.sort(-1, descending=True).values))  # type: ignore[return-value]


# How it is drawn


def _draw_blocks(axis: Axes, values: Tensor, **colours: Any) -> Any:
    """A map ``[Nq, Nk]``. With more blocks than pixels, a pixel is the mean of the colours of its blocks."""
    from matplotlib.ticker import MaxNLocator

    image = axis.imshow(
        values.numpy(), interpolation="antialiased", interpolation_stage="rgba", aspect="auto", **colours
    )
    for part in (axis.xaxis, axis.yaxis):
        part.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 4, 5, 10]))
    return image


def _block_label(what: str, size: int) -> str:
    return f"{what} block ({size} tokens each)"
