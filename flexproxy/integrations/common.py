"""What integrations have in common: the settings of a tensor-parallel rank, and layers in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexproxy.config import ProxyConfig


def share_of_rank(config: ProxyConfig, rank: int, ranks: int, num_q_heads: int, num_kv_heads: int) -> ProxyConfig:
    """The settings of a rank that has one of ``ranks`` equal runs of the query heads.

    A rank ranks blocks for its own heads, so a proxy must lie on one rank. Settings that keep every block rank nothing,
    and fit any number of ranks; so does the default number of proxies, which is that of the whole model where the ranks
    divide it, and else that of the rank's own heads.

    Args:
        config: settings of the whole model.
        num_q_heads, num_kv_heads: of the whole model.

    Raises:
        ValueError: a proxy has heads on several ranks, or ``groups`` is not for this model.
    """
    if ranks == 1:
        return config
    if config.keeps_all:
        return replace(config, num_proxies=1, groups=None)
    if config.groups is None:
        total = config.proxies(num_q_heads, num_kv_heads)
        if total % ranks == 0:
            return replace(config, num_proxies=total // ranks)
        if config.num_proxies is not None:
            raise ValueError(
                f"num_proxies: expected a multiple of the {ranks} tensor-parallel ranks, whose heads are ranked apart, "
                f"got {config.num_proxies}; use ProxyConfig(num_proxies={ranks})"
            )
        return config
    if len(config.groups) != num_q_heads:
        raise ValueError(
            f"groups: expected the proxy index of each of the {num_q_heads} query heads, got {len(config.groups)} of "
            "them; name one for each, or use num_proxies"
        )
    size = num_q_heads // ranks
    own = config.groups[rank * size : (rank + 1) * size]
    others = {*config.groups[: rank * size], *config.groups[(rank + 1) * size :]}
    if shared := sorted(set(own) & others):
        raise ValueError(
            f"groups: expected every proxy's heads on one of the {ranks} tensor-parallel ranks, got proxies {shared} "
            f"with heads on several; regroup within runs of {size} heads, or use num_proxies={ranks}"
        )
    place = {proxy: index for index, proxy in enumerate(sorted(set(own)))}
    return replace(config, groups=tuple(place[proxy] for proxy in own))


def ranges(indices: Iterable[int]) -> str:
    """Indices in a few characters: ``0-3, 6``."""
    there = sorted(set(indices))
    starts = [i for i in there if i - 1 not in there]
    ends = [i for i in there if i + 1 not in there]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
