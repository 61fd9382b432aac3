"""Everything that the documentation quotes of a real model, in one run on one GPU, the most important first.

    python -m benchmarks.quality.run_all --minutes 9 --out benchmarks/results/quality_smollm2.json

The file is written after every cell. When the minutes are over, the rest is left out; the same command goes on there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import RESULTS, Row, command, listed
from benchmarks.quality.__main__ import Session, names
from benchmarks.quality.corpus import DOMAINS, corpus
from benchmarks.quality.evaluate import Cell, ResultFile, run_batch
from benchmarks.quality.methods import (
    BASELINES,
    DENSE,
    EXPERIMENTS,
    Method,
    Place,
    corrected,
    of_config,
    of_layers,
    shared,
)
from benchmarks.quality.models import DEFAULT_MODEL
from flexproxy import ProxyConfig
from flexproxy.calibration import calibrate
from flexproxy.cli.common import Device

TEXTS, ANSWERS = 16, 64
MIN_BUDGET = 256
LENGTH = 8192
FULL_PEERS = (
    "XAttention",
    "XAttention, stride 16",
    "FlexPrefill",
    "FlashPrefill",
    "FlashPrefill V2",
    "FlashPrefill V2, 2 last rows, no dense layers",
    "Prism",
)
SPARSE_PEERS = tuple(name for name in FULL_PEERS if name != "FlashPrefill V2")  # whose dense layers take it all
RANKINGS = "sink + recent", "mean-pooled", "oracle"
USUAL = (*DOMAINS, "single")


class Plan:
    """The cells, stage by stage. A stage may read what was measured before."""

    def __init__(self, session: Session, results: ResultFile) -> None:
        self.session, self.results = session, results
        self.proxies = ProxyConfig().proxies(session.heads, session.kv_heads)
        self.stages: dict[str, Callable[[], Iterator[Cell]]] = {
            "equal": self.equal,
            "defaults": self.defaults,
            "long": self.long,
            "trials": self.trials,
            "rows": self.rows,
            "low": self.low,
            "curve": self.curve,
            "matched": self.matched,
            "needles": self.needles,
            "corrections": self.corrections,
            "calibrated": self.calibrated,
            "short": self.short,
            "shared": self.shared,
        }

    def cells(self, stages: Sequence[str]) -> Iterator[Cell]:
        for stage in stages:
            yield from self.stages[stage]()

    def equal(self) -> Iterator[Cell]:
        """Everybody at 0.25 and at 0.12."""
        yield from self._over([LENGTH], USUAL, [DENSE])
        for target in (0.25, 0.12):
            methods = [*self._ours(target), *self._peers((*SPARSE_PEERS, *RANKINGS), target)]
            yield from self._over([LENGTH], USUAL, methods)

    def defaults(self) -> Iterator[Cell]:
        """Everybody as its authors set it; what is kept, by length."""
        methods = [DENSE, self._default(), *(BASELINES[name].with_defaults() for name in FULL_PEERS)]
        yield from self._over([LENGTH], USUAL, methods)
        yield from self._over([4096, 16384, 32768], ("prose",), methods)

    def long(self) -> Iterator[Cell]:
        """32K tokens, at 0.05 and 0.10."""
        yield from self._over([32768], ("prose",), [DENSE])
        for target in (0.05, 0.1):
            methods = [*self._ours(target), *self._peers(SPARSE_PEERS, target)]
            yield from self._over([32768], ("prose",), methods)

    def trials(self) -> Iterator[Cell]:
        """Other choices, and flexproxy's own variants, where more than the forced blocks is kept."""
        yield from self._over([LENGTH], USUAL, [self._ours(0.18)[0]])
        for target in (0.25, 0.18):
            pooled: list[Row] = [
                {"stride": 1, "query_stride": 8, "query_choice": "outlier"},
                {"stride": 2, "query_stride": 8},
                {"query_stride": 8},
                {"query_stride": 16},
                {"stride": 8},
            ]
            single: list[Row] = [
                {},
                {"query_stride": 16},
                {"query_stride": 32, "sharing": "rows"},
                {"query_stride": 16, "stride": 8, "sharing": "rows"},
            ]
            kinds = (self.proxies, pooled), (self.session.heads, single)
            variants = [
                ProxyConfig(num_proxies=number, **(self._at(target) | changes))
                for number, changed in kinds
                for changes in changed
            ]
            methods = [*map(of_config, variants), self._by_rows(target)]
            methods += [trial.at(target, MIN_BUDGET) for trial in EXPERIMENTS.values()]
            yield from self._over([LENGTH], USUAL, methods)

    def rows(self) -> Iterator[Cell]:
        """One budget for rows and heads, beside the defaults, at other densities, lengths and tasks."""
        for target in (0.25, 0.18, 0.12, 0.08, 0.35):
            yield from self._over([LENGTH], USUAL, [self._ours(target)[0], self._by_rows(target)])
        for length, target in ((32768, 0.05), (32768, 0.1), (16384, 0.15)):
            yield from self._over([length], USUAL, [DENSE, self._ours(target)[0], self._by_rows(target)])
        for target in (0.25, 0.12):
            tasks = "multikey", "multivalue", "multiquery"
            yield from self._over([LENGTH], tasks, [self._ours(target)[0], self._by_rows(target)])

    def low(self) -> Iterator[Cell]:
        """Fewer forced blocks, where the default keeps hardly more than these."""
        for target in (0.12, 0.08):
            few: Row = {"num_proxies": self.proxies, "density": target, "min_budget": 128, "local_blocks": 1}
            fewer = [of_config(ProxyConfig(**few)), of_config(ProxyConfig(**few, sink_blocks=0))]
            methods = [self._ours(target)[0], *fewer, *self._peers(SPARSE_PEERS, target)]
            yield from self._over([LENGTH], USUAL, methods)

    def curve(self) -> Iterator[Cell]:
        """More densities, for the plot."""
        for target in (0.08, 0.18, 0.35, 0.5):
            peers = FULL_PEERS if target >= 0.5 else SPARSE_PEERS
            yield from self._over([LENGTH], USUAL, [self._ours(target)[0], *self._peers(peers, target)])

    def matched(self) -> Iterator[Cell]:
        """flexproxy at the density that each peer reaches as its authors set it."""
        for name, task in product(FULL_PEERS, USUAL):
            density = self._density(name, task)
            if density is not None:
                config = ProxyConfig(num_proxies=self.proxies, **self._at(min(density, 1.0)))
                yield from self._over([LENGTH], (task,), [of_config(config, setting=f"density of {name}")])

    def needles(self) -> Iterator[Cell]:
        """What is harder to find than one needle."""
        tasks = "multikey", "multivalue", "multiquery"
        yield from self._over([LENGTH], tasks, [DENSE])
        for target in (0.25, 0.12):
            yield from self._over(
                [LENGTH], tasks, [*self._ours(target), *self._peers((*SPARSE_PEERS, "oracle"), target)]
            )

    def corrections(self) -> Iterator[Cell]:
        """Means of dropped blocks, and dense rows, where little is kept."""
        for target in (0.25, 0.15):
            plain = self._ours(target)[0]
            yield from self._over([LENGTH], USUAL, [plain, *corrected(plain)])

    def calibrated(self) -> Iterator[Cell]:
        """A density of each layer, from other texts, beside the same density in all layers."""
        for target in (0.25, 0.13):  # 0.12 is what the forced blocks keep at this length
            name, setting = "flexproxy, calibrated by layer", f"density {target:g}"
            yield from self._over([LENGTH], USUAL, [self._ours(target)[0]])
            cells = list(self._over([LENGTH], USUAL, [Method(name, setting)]))
            if all(self.results.has(cell.identity) for cell in cells):
                yield from cells
                continue
            yield from self._over([LENGTH], USUAL, [of_layers(name, setting, self._calibrate(target))])

    def short(self) -> Iterator[Cell]:
        """Shorter texts, and 16K tokens."""
        yield from self._over([2048, 4096, 16384], USUAL, [DENSE])
        for length, target in ((4096, 0.25), (2048, 0.4), (16384, 0.1)):
            methods = [self._ours(target)[0], *self._peers((*SPARSE_PEERS, "sink + recent"), target)]
            yield from self._over([length], USUAL, methods)

    def shared(self) -> Iterator[Cell]:
        """One selection for two and for four layers."""
        config = ProxyConfig(num_proxies=self.proxies, **self._at(0.25))
        yield from self._over([LENGTH], USUAL, [of_config(config), *(shared(config, number) for number in (2, 4))])

    # What stages are made of

    def _over(self, lengths: Sequence[int], tasks: Sequence[str], methods: Sequence[Method]) -> Iterator[Cell]:
        for length, method, name in product(lengths, methods, tasks):
            task = self.session.tasks[name]
            yield Cell(length, task, method, ANSWERS if task.metric == "exact" else TEXTS)

    def _at(self, target: float) -> Row:
        return {"density": target, "min_budget": MIN_BUDGET}

    def _ours(self, target: float) -> list[Method]:
        """The defaults, one proxy, and the paper's method."""
        own = of_config(ProxyConfig(num_proxies=self.proxies, **self._at(target)))
        one = of_config(ProxyConfig(num_proxies=1, **self._at(target)))
        paper = of_config(ProxyConfig.paper(**self._at(target)), "flexproxy, as the paper")
        return [own, one, paper] if self.proxies > 1 else [own, paper]

    def _by_rows(self, target: float) -> Method:
        by_rows: Row = {"num_proxies": self.session.heads, "query_stride": 16, "sharing": "rows"}
        return of_config(ProxyConfig(**by_rows, **self._at(target)))

    def _default(self) -> Method:
        return of_config(ProxyConfig(num_proxies=self.proxies), setting="defaults")

    def _peers(self, chosen: Sequence[str], target: float) -> list[Method]:
        return [BASELINES[name].at(target, MIN_BUDGET) for name in chosen]

    def _density(self, name: str, task: str) -> float | None:
        wanted = {"length": LENGTH, "task": task, "method": name, "setting": "defaults", "error": None}
        rows = [row for row in self.results.rows if all(row[key] == value for key, value in wanted.items())]
        return rows[0]["density"] if rows else None

    def _calibrate(self, target: float) -> dict[int, ProxyConfig]:
        """From prose and code of the calibration texts."""
        tokenizer: Any = self.session.tokenizer
        texts = [
            torch.tensor([tokenizer.encode(corpus(domain, "calibration").content.decode()[: 16 * LENGTH])])
            for domain in DOMAINS
        ]
        config = ProxyConfig(min_budget=MIN_BUDGET)
        found = calibrate(self.session.model, texts, density=target, config=config, length=LENGTH, sequences=4)
        return dict(found.layers)


def gate(session: Session) -> None:
    """Every block kept is dense attention: nothing is measured otherwise."""
    task = session.tasks["prose"]
    samples = [task.make(seed, 2000) for seed in range(2)]

    def every(q: torch.Tensor, _k: torch.Tensor, _place: Place) -> torch.Tensor:
        num_blocks = -(-q.shape[2] // 128)
        return torch.ones(*q.shape[:2], num_blocks, num_blocks, dtype=torch.bool, device=q.device).tril()

    found = [run_batch(session.model, method, task, samples) for method in (DENSE, Method("every block", "", every))]
    for dense, own in zip(*found, strict=True):
        if not abs(dense["bits_per_byte"] - own["bits_per_byte"]) < 0.003:
            sys.exit(
                f"correctness gate failed: every block kept takes {own['bits_per_byte']} bits per byte, dense "
                f"{dense['bits_per_byte']}; nothing was measured"
            )


def main(
    *,
    model: Annotated[str, typer.Option(help="smollm2 or gemma3.")] = DEFAULT_MODEL,
    minutes: Annotated[float, typer.Option(min=0.0, help="After so many, no cell is begun.")] = 600.0,
    stages: Annotated[Any, listed(names, "In this order; by default all.")] = None,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes a GPU if there is one.")] = Device.auto,
    out: Annotated[Path | None, typer.Option(help="Result file; by default in benchmarks/results.")] = None,
) -> None:
    until = time.monotonic() + 60 * minutes
    try:
        session = Session(model, device, None)
        results = session.results(out or RESULTS / f"quality_{model}.json", {"texts": TEXTS, "answers": ANSWERS})
        plan = Plan(session, results)
        unknown = sorted(set(stages or ()) - set(plan.stages))
        if unknown:
            raise ValueError(f"--stages: expected some of {', '.join(plan.stages)}, got {', '.join(unknown)}")
    except ValueError as error:
        sys.exit(str(error))
    gate(session)
    session.measure(plan.cells(stages or list(plan.stages)), None, results, until)


if __name__ == "__main__":
    command(main)
