"""The one configuration object."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

__all__ = ["ProxyConfig"]

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 16, 1024
MAX_DEFAULT_PROXIES = 8
NEIGHBOURS = 128  # queries, from a multiple of this number on, whose mean an outlier is far from
QueryChoice = Literal["first", "outlier"]
Sharing = Literal["heads", "rows"]


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """How blocks are scored, and how many of them each head keeps.

    The defaults rest on pre-trained models; ``ProxyConfig.paper()`` is the method of the paper (arXiv 2509.24745).

    Attributes:
        num_proxies: number P of proxy heads. Divides Hkv, or is a multiple of Hkv that divides Hq. Heads are grouped
            contiguously, aligned with the KV groups of GQA. None: one for each key/value head, but at most 8: the
            largest divisor of Hkv up to 8; with ``sharing="rows"``, one for each query head. Under tensor parallelism,
            that of the whole model.
        groups: proxy index of every query head, length Hq, every index from 0 to P - 1 used. Replaces ``num_proxies``.
        gamma: attention mass that each head's budget must reach, in (0, 1]. 1.0 keeps every block.
        density: target mean density (kept blocks / admissible blocks) in (0, 1]. Replaces ``gamma``: the one gamma that
            brings the heads of a sequence nearest to the target is found, so all of them reach the same coverage.
        sharing: what a count is for. "heads", as in the paper: each head has one, for all of its rows. "rows": a
            sequence keeps as many blocks in all, but its rows and heads share them by one threshold on the scores, so
            each row has a count of its own. It is for heads with scores of their own; with pooled scores "heads" loses
            less. The documents packed in a batch row share as one sequence.
        stride: tokens from one sampled key (and query) to the next in the scores. Divides ``block_size``.
        query_stride: the same for the queries, where it is another. Half of the queries and twice the keys are as
            many pairs: what matters may be a few tokens among the keys, which many queries look for. None: ``stride``,
            and with ``sharing="rows"`` four times that, so that heads score as many pairs as Hq / 4 proxies.
        query_choice: which query of every ``query_stride`` is sampled: the "first", as in the paper, or the "outlier",
            the one whose proxy query is farthest from the mean of the 128 around it. A query that looks for something
            far away is unlike its neighbours, so far fewer samples find it.
        block_size: tokens per block, for queries and for keys. A power of two from 16 to 1024. On a GPU, blocks smaller
            than 128 need kernel options with tiles that divide them; ``flexproxy.attention`` sets these itself.
        min_budget: tokens that every row keeps at least (where the mask admits so many).
        max_budget: tokens that a row keeps at most; not of the dense last blocks.
        sink_blocks: first key blocks that every row keeps, inside its budget: those in which the real tokens of its
            sequence (of its document, after left padding) begin. A row that may not see them has none.
        local_blocks: most recent key blocks that every row keeps, inside its budget; the diagonal is the first of them.
        dense_last_blocks: last rows of blocks of every sequence (and packed document) that attend to everything: the
            question stands there.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields contradict each other.
    """

    num_proxies: int | None = None
    groups: Sequence[int] | None = None
    gamma: float = 0.95
    density: float | None = None
    sharing: Sharing = "heads"
    stride: int = 4
    query_stride: int | None = None
    query_choice: QueryChoice = "first"
    block_size: int = 128
    min_budget: int = 2048
    max_budget: int | None = None
    sink_blocks: int = 1
    local_blocks: int = 2
    dense_last_blocks: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if self.num_proxies is not None:
            _check_int("num_proxies", self.num_proxies, 1)
        _check_fraction("gamma", self.gamma)
        if self.density is not None:
            _check_fraction("density", self.density)
        _check_choice("sharing", self.sharing, get_args(Sharing))
        _check_int("block_size", self.block_size, MIN_BLOCK_SIZE, MAX_BLOCK_SIZE)
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size: expected a power of two, got {self.block_size}; use 64 or 128")
        _check_stride("stride", self.stride, self.block_size)
        if self.query_stride is not None:
            _check_stride("query_stride", self.query_stride, self.block_size)
        _check_choice("query_choice", self.query_choice, get_args(QueryChoice))
        if self.query_choice == "outlier" and self.strides[0] > NEIGHBOURS:
            raise ValueError(
                f"query_stride: expected at most {NEIGHBOURS} where query_choice is 'outlier', got {self.strides[0]}; "
                "use 8 or 16"
            )
        _check_int("sink_blocks", self.sink_blocks, 0)
        _check_int("local_blocks", self.local_blocks, 1)
        _check_int("dense_last_blocks", self.dense_last_blocks, 0)
        _check_int("min_budget", self.min_budget, 0)
        if self.max_budget is not None:
            _check_int("max_budget", self.max_budget, 1)
            if self.max_budget // self.block_size < self.min_blocks:
                raise ValueError(
                    f"max_budget: expected at least min_budget in whole blocks, {self.min_blocks * self.block_size} "
                    f"tokens, got {self.max_budget}; raise max_budget or lower min_budget"
                )
            # One more block than is forced: the queries of one block may see themselves in two key blocks.
            forced = (self.sink_blocks + self.local_blocks + 1) * self.block_size
            if self.max_budget < forced:
                raise ValueError(
                    f"max_budget: expected at least {forced} tokens, (sink_blocks + local_blocks + 1) forced blocks x "
                    f"block_size, got {self.max_budget}; raise max_budget or force fewer blocks"
                )
        if self.groups is not None:
            object.__setattr__(self, "groups", _check_groups(self.groups))

    @classmethod
    def paper(cls, **changes: Any) -> ProxyConfig:
        """The paper's method, exactly (arXiv 2509.24745, section 4.1), whatever the defaults become.

        One proxy head as for Llama-3.1-8B, gamma 0.95, stride 4, blocks of 128, at least 2048 tokens a row, no forced
        block but the diagonal, no dense row. The paper also reports ``num_proxies=4`` (Qwen2.5-7B-1M), ``gamma=0.9``.

        Args:
            changes: fields to set otherwise, by name.

        Raises:
            TypeError, ValueError: as ``ProxyConfig``.
        """
        settings = cls(
            num_proxies=1,
            groups=None,
            gamma=0.95,
            density=None,
            sharing="heads",
            stride=4,
            query_stride=None,
            query_choice="first",
            block_size=128,
            min_budget=2048,
            max_budget=None,
            sink_blocks=0,
            local_blocks=1,
            dense_last_blocks=0,
        )
        return replace(settings, **changes)

    def proxies(self, num_q_heads: int, num_kv_heads: int) -> int:
        """P, for ``num_q_heads`` = Hq and ``num_kv_heads`` = Hkv."""
        if self.groups is not None:
            return max(self.groups) + 1
        if self.num_proxies is not None:
            return self.num_proxies
        return num_q_heads if self.sharing == "rows" else default_proxies(num_kv_heads)

    @property
    def strides(self) -> tuple[int, int]:
        """Tokens from one sampled query to the next, and from one sampled key to the next."""
        usual = min(4 * self.stride, self.block_size) if self.sharing == "rows" else self.stride
        return self.query_stride or usual, self.stride

    @property
    def chooses_queries(self) -> bool:
        """Whether the sampled queries depend on their values."""
        return self.query_choice == "outlier" and self.strides[0] > 1

    @classmethod
    def load_layers(cls, path: str | os.PathLike[str]) -> dict[int, ProxyConfig]:
        """The settings of every layer, by its index, from a file of ``flexproxy calibrate`` or ``save_configuration``.

        Which model the file was made for is not looked at here: ``configure(model, path)`` of the transformers
        integration refuses a file of another model.

        Raises:
            ValueError: there is no such file, or it holds something else; the message says what.
        """
        return read_settings(path, "path")[1]

    @property
    def min_blocks(self) -> int:
        """Blocks that every row keeps at least."""
        return -(-self.min_budget // self.block_size)

    @property
    def max_blocks(self) -> int | None:
        """Blocks that a row keeps at most."""
        return None if self.max_budget is None else self.max_budget // self.block_size

    @property
    def target(self) -> float:
        """``density`` where it is set, else ``gamma``. With 1.0 only ``max_budget`` leaves blocks out."""
        return self.gamma if self.density is None else self.density

    @property
    def keeps_all(self) -> bool:
        """Whether every admissible block is kept, whatever the inputs are."""
        return self.target == 1.0 and self.max_budget is None


def _plain(value: Any) -> Any:
    """A number of another kind, such as numpy's, as one of Python's; anything else as it is."""
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def default_proxies(num_kv_heads: int) -> int:
    """One proxy for each key/value head, but at most 8: the largest divisor of Hkv up to that."""
    return max(p for p in range(1, MAX_DEFAULT_PROXIES + 1) if num_kv_heads % p == 0)


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    span = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {span}, got {value!r} of type {type(value).__name__}; pass a Python int")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {span}, got {value}; use {low if value < low else high}")


def _check_stride(name: str, value: int, block_size: int) -> None:
    _check_int(name, value, 1)
    if block_size % value:
        raise ValueError(f"{name}: expected a divisor of block_size {block_size}, got {value}; use 1, 2, 4, 8 or 16")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}; {choices[0]!r} is the paper's")


def _check_fraction(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}: expected a number in (0, 1], got {value!r} of type {type(value).__name__}; pass a Python float"
        )
    if not 0.0 < value <= 1.0:  # not-a-number, too
        raise ValueError(f"{name}: expected a number in (0, 1], got {value}; 1.0 keeps every block")


def _check_groups(groups: object) -> tuple[int, ...]:
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Sequence):
        raise TypeError(
            f"groups: expected the proxy index of every query head, for example [0, 0, 1, 1], got {groups!r} "
            f"of type {type(groups).__name__}; pass a list or tuple of ints"
        )
    groups = [_plain(index) for index in groups]
    for index in groups:
        _check_int("groups", index, 0)
    missing = sorted(set(range(max(groups, default=-1) + 1)) - set(groups))
    if not groups or missing:
        raise ValueError(
            f"groups: expected every proxy index from 0 to P - 1 to be used, got {list(groups)}, which leaves out "
            f"{missing or 'all of them'}; number the proxies without gaps"
        )
    return tuple(groups)


def changed_fields(config: ProxyConfig) -> dict[str, Any]:
    """The fields that differ from their defaults: how a file holds the settings of a layer."""
    default = ProxyConfig()
    names = (field.name for field in fields(ProxyConfig))
    return {name: value for name in names if (value := getattr(config, name)) != getattr(default, name)}


def read_settings(path: str | os.PathLike[str], argument: str) -> tuple[dict[str, Any], dict[int, ProxyConfig]]:
    """A file's content, and the settings of its layers by index. argument: whom errors name.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{argument}: cannot read {path}: {error.strerror}; pass the path of a JSON file") from error
    except ValueError as error:
        raise ValueError(
            f"{argument}: expected JSON in {path}, got {error}; write it with save_configuration or flexproxy calibrate"
        ) from error
    if not isinstance(data, dict) or data.get("flexproxy") != 1 or not isinstance(data.get("layers"), dict):
        raise ValueError(
            f'{argument}: expected {{"flexproxy": 1, "model": ..., "layers": ...}} in {path}, got something else; '
            "write it with save_configuration or flexproxy calibrate"
        )
    layers = data["layers"].items()
    return data, {_layer(index, path, argument): _config(x, index, path, argument) for index, x in layers}


def _layer(index: str, path: Path, argument: str) -> int:
    if not index.isdecimal():
        raise ValueError(f'{argument}: expected layers by number in {path}, got {index!r}; write "0", "1" and so on')
    return int(index)


def _config(values: Any, index: str, path: Path, argument: str) -> ProxyConfig:
    names = [field.name for field in fields(ProxyConfig)]
    unknown = sorted(set(values) - set(names)) if isinstance(values, dict) else [values]
    if unknown:
        raise ValueError(
            f"{argument}: expected fields of ProxyConfig for layer {index} in {path}, got {unknown}; use some of "
            f"{', '.join(names)}"
        )
    try:
        return ProxyConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: layer {index} in {path}: {error}") from error
