"""Settings that several tests take."""

from __future__ import annotations

from typing import Any

from flexproxy import ProxyConfig


def outliers(**changes: Any) -> ProxyConfig:
    """Of every 8 queries the outlier is sampled, and every key."""
    settings: dict[str, Any] = {"stride": 1, "query_stride": 8, "query_choice": "outlier"}
    return ProxyConfig(**(settings | changes))
