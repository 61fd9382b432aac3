"""What integrations have in common: the settings of a tensor-parallel rank, and layers in words."""

from __future__ import annotations

import pytest

from flexproxy import ProxyConfig
from flexproxy.integrations.common import ranges, share_of_rank


def test_one_rank_has_all() -> None:
    config = ProxyConfig(groups=[0, 1, 1, 0])
    assert share_of_rank(config, 0, 1, 4, 4) is config


def test_proxies_are_divided() -> None:
    config = ProxyConfig(num_proxies=4, gamma=0.9)
    assert share_of_rank(config, 1, 2, 8, 4) == ProxyConfig(num_proxies=2, gamma=0.9)
    with pytest.raises(ValueError, match=r"num_proxies: expected a multiple of the 8 .* got 4; use .*num_proxies=8"):
        share_of_rank(config, 0, 8, 8, 4)


def test_groups_are_cut_and_numbered_again() -> None:
    config = ProxyConfig(groups=[0, 0, 1, 0, 3, 2, 2, 2])
    assert share_of_rank(config, 0, 2, 8, 4).groups == (0, 0, 1, 0)
    assert share_of_rank(config, 1, 2, 8, 4).groups == (1, 0, 0, 0)
    with pytest.raises(ValueError, match=r"on one of the 4 tensor-parallel ranks, got proxies \[0\]"):
        share_of_rank(config, 0, 4, 8, 4)
    with pytest.raises(ValueError, match="each of the 16 query heads, got 8"):
        share_of_rank(config, 0, 2, 16, 4)


def test_nothing_is_ranked_where_every_block_is_kept() -> None:
    for config in (ProxyConfig(gamma=1.0), ProxyConfig(gamma=1.0, groups=[0, 0, 0, 0])):
        share = share_of_rank(config, 1, 2, 4, 4)
        assert share.keeps_all
        assert share.groups is None


def test_ranges() -> None:
    assert ranges([6, 0, 1, 2, 3, 9, 8]) == "0-3, 6, 8-9"
    assert ranges({}) == ""


def test_the_default_number_of_proxies_fits_any_number_of_ranks() -> None:
    """That of the whole model where the ranks divide it, else that of the rank's own heads."""
    config = ProxyConfig()
    assert share_of_rank(config, 1, 2, 32, 8).num_proxies == 4
    assert share_of_rank(config, 1, 8, 32, 8).num_proxies == 1
    assert share_of_rank(config, 0, 3, 36, 12).num_proxies == 2
    assert share_of_rank(config, 0, 4, 36, 12).num_proxies is None


def test_heads_that_share_over_rows_fit_any_number_of_ranks() -> None:
    share = share_of_rank(ProxyConfig(sharing="rows"), 1, 3, 9, 3)
    assert share == ProxyConfig(sharing="rows", num_proxies=3)  # of the rank's own heads
    assert share.strides == ProxyConfig(sharing="rows").strides
