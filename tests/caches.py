"""What flexproxy keeps from call to call."""

from __future__ import annotations

import functools
import gc

from flexproxy import replay
from flexproxy.ops import cache


def forget_tensors() -> None:
    """Give back the tensors that flexproxy keeps."""
    for each in gc.get_objects():
        if type(each) is functools._lru_cache_wrapper and each.__module__ in (cache.__name__, replay.__name__):
            each.cache_clear()
