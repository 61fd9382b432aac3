"""Which versions of vLLM the backend is for."""

from __future__ import annotations

OLDEST, NEWEST = (0, 26), (0, 33)
"""The first and the last minor version whose interface was read; docs/serving.md says which were run."""


def why_unsupported(version: str) -> str | None:
    """Why a version of vLLM gets dense attention alone, in one line; None where it is supported."""
    numbers = version.split("+")[0].split(".")
    try:
        found = int(numbers[0]), int(numbers[1])
    except (IndexError, ValueError):
        return f"vLLM {version} is not a release"
    if OLDEST <= found <= NEWEST:
        return None
    low, high = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    return f"it is for vLLM {low} to {high}, and this is {version}"
