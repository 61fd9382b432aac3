"""Write the figures of README and of the pages: every one comes from a file of benchmarks/results.

    python -m docs.figures

A page has a place for each, between ``<!-- figures: NAME -->`` and ``<!-- end -->``; ``BLOCKS`` has what goes there. A
file of another version of flexproxy is refused. tests/project/test_figures.py compares pages and files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import flexproxy
from benchmarks import harness
from benchmarks.quality import report
from benchmarks.stages import STAGES
from flexproxy.files import replacing

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))
QUALITY = "quality_smollm2"
OURS = "flexproxy P 3, stride 4"  # the defaults, for a model of 3 key/value heads
OFFERED = (
    OURS,
    "flexproxy P 1, stride 4",
    "flexproxy, as the paper",
    "flexproxy, calibrated by layer",
    "flexproxy P 9, stride 16:4, rows",
)
SHOWN = ("dense", OURS, "XAttention", "FlexPrefill", "flexproxy, as the paper", "sink + recent", "oracle")
FLASH, CUDNN = "SDPA FlashAttention-2", "SDPA cuDNN"
LONG = 131072
Row = dict[str, Any]
_PLACE = re.compile(r"<!-- figures: (\w+) -->\n(\n?).*?<!-- end -->", re.DOTALL)


@cache
def results(name: str) -> Any:
    """A file of results.

    Raises:
        ValueError: it is of another version.
    """
    data = json.loads((harness.RESULTS / f"{name}.json").read_text())
    version = data["environment"]["flexproxy"]
    if version != flexproxy.__version__:
        raise ValueError(
            f"benchmarks/results/{name}.json: expected results of flexproxy {flexproxy.__version__}, got {version}; "
            "measure again"
        )
    return data


def find(name: str, **wanted: Any) -> Row:
    """The first row with these values."""
    rows: list[Row] = results(name)["rows"]
    for row in rows:
        if row.get("error") is None and all(row.get(key) == value for key, value in wanted.items()):
            return row
    raise ValueError(f"benchmarks/results/{name}.json: expected a row with {wanted}, got none")


def lengths_of(name: str, **wanted: Any) -> list[int]:
    rows = [r for r in results(name)["rows"] if r.get("error") is None and wanted.items() <= r.items()]
    return sorted({row["length"] for row in rows})


def device(name: str) -> str:
    return harness.device_of(results(name)).removeprefix("NVIDIA ")


def measured(*names: str) -> str:
    """What files were measured on, and when: code changes within a version too."""
    environments = [results(name)["environment"] for name in names]
    devices, dates = dict.fromkeys(map(device, names)), sorted({environment["date"] for environment in environments})
    flash = all(environment.get("flash-attn-4", "absent") != "absent" for environment in environments)
    return f"{' and '.join(devices)}, {' and '.join(dates)}{', flash-attn-4' if flash else ', without flash-attn-4'}"


def table(lines: Sequence[Sequence[str]], wide: int = 1) -> str:
    """Markdown; the first ``wide`` columns to the left, numbers to the right."""
    head, *body = lines
    rule = ["---"] * wide + ["---:"] * (len(head) - wide)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def tokens(length: int) -> str:
    return f"{length // 2**20}M" if length % 2**20 == 0 else f"{length // 1024}K"


def milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


# Speed


def _attention(length: int, density: float, kernel: str = "default") -> float:
    wanted = {"contender": "flexproxy", "part": "total", "kernel": kernel, "target_density": density}
    return float(find("attention", length=length, **wanted)["median_ms"])


def _dense(name: str, length: int, contender: str) -> float:
    part = "dense" if name == "attention" else "prefill"
    return float(find(name, length=length, contender=contender, part=part)["median_ms"])


def _model(length: int, density: float) -> float:
    wanted = {"part": "prefill", "contender": "flexproxy", "density": density}
    return float(find("prefill", length=length, **wanted)["median_ms"])


def speed() -> str:
    """One layer and a whole model, by length, at a density of 0.10."""
    wanted = {"contender": "flexproxy", "part": "total", "target_density": 0.1}
    above: dict[str, list[str]] = {}
    lines = [["tokens", "layer, dense", "flexproxy", "gain", "model, dense", "flexproxy", "gain"]]
    lengths = set(lengths_of("attention", contender=CUDNN, part="dense"))
    for length in lengths_of("prefill", contender=CUDNN, part="prefill"):
        if length in lengths:
            layer, model = _dense("attention", length, CUDNN), _dense("prefill", length, CUDNN)
            ours, whole = _attention(length, 0.1), _model(length, 0.1)
            reached = find("attention", length=length, **wanted)["density"]
            if f"{reached:.2f}" != "0.10":
                above.setdefault(f"{reached:.2f}", []).append(tokens(length))
            lines.append(
                [
                    tokens(length),
                    f"{milliseconds(layer)} ms",
                    f"{milliseconds(ours)} ms",
                    f"{layer / ours:.1f} x",
                    f"{model / 1000:.1f} s",
                    f"{whole / 1000:.1f} s",
                    f"{model / whole:.1f} x",
                ]
            )
    stock, served = (find("vllm", part="engine", contender=name) for name in ("FlashAttention", "flexproxy"))
    seconds = [f"{row[f'{LONG}_ms'] / 1000:.1f}" for row in (served, stock)]
    more = ", ".join(f"{kept} at {' and '.join(where)}" for kept, where in above.items())
    where, (_, when) = measured("attention", "prefill"), measured("vllm").split(", ", 1)
    wide = [f"{_dense('prefill', n, CUDNN) / _model(n, 0.31):.1f} x at {tokens(n)}" for n in (32768, LONG, 2 * LONG)]
    return (
        f"{table(lines)}\n\n"
        f"bf16, Llama-3.1-8B's shape, density 0.10 (kept / causal blocks; {more}); dense: cuDNN. Layer: "
        "blocks chosen, and attention.\nModel: time to first token, batch 1, transformers; at 0.31, near what the "
        f"defaults keep of 32K tokens: {', '.join(wide)}.\nflexproxy {flexproxy.__version__}, {where}. Stock "
        f"vLLM {served['vllm']} ({when}), {tokens(LONG)}: {seconds[1]} s, with flexproxy at "
        f"{results('vllm')['settings']['density']}: {seconds[0]} s ([how](docs/serving.md))."
    )


def numbers() -> str:
    """Three numbers for the first page."""
    dense, ours = _dense("prefill", LONG, CUDNN), _model(LONG, 0.16)
    layer, build = _dense("attention", LONG, CUDNN), find("build", length=LONG, num_proxies=8)["median_ms"]
    lost, kept = _lost(32768, "prose", "defaults")
    return (
        f"- **{dense / ours:.1f} times** as fast to the first token: the shape of Llama-3.1-8B, {tokens(LONG)} tokens, "
        f"density 0.16,\n  {ours / 1000:.1f} s beside {dense / 1000:.1f} s with cuDNN "
        f"(flexproxy {flexproxy.__version__}, {device('prefill')}).\n"
        f"- **{build:.1f} ms** to choose the blocks of a layer of {tokens(LONG)} tokens, where dense attention takes "
        f"{layer:.0f} ms.\n"
        f"- **{lost:+.1f} %** bits per byte on prose of 32K tokens at default settings (SmolLM2-135M, {kept:.2f} of\n"
        "  the blocks kept)."
    )


def attention() -> str:
    names = ["cuDNN", "FlashAttention-2", "flex_attention"]
    lines = [["tokens", "density", "flexproxy", "without flash-attn-4", *(f"{name}, dense" for name in names)]]
    for length in lengths_of("attention", contender=CUDNN, part="dense"):
        for density in (0.02, 0.1, 0.2, 0.4):
            if length >= 32768:
                ours = [_attention(length, density, kernel) for kernel in ("default", "triton")]
                dense = [_dense("attention", length, contender) for contender in (CUDNN, FLASH, "flex dense")]
                reached = find("attention", length=length, part="total", target_density=density)["density"]
                lines.append([tokens(length), f"{reached:.2f}", *(milliseconds(x) for x in (*ours, *dense))])
    return table(lines)


def build() -> str:
    lines = [["tokens", "1 proxy", "4 proxies", "8 proxies", 'sharing="rows"', "dense, cuDNN", "share, 8 proxies"]]
    for length in lengths_of("build", num_proxies=1):
        rows = [find("build", length=length, num_proxies=proxies) for proxies in (1, 4, 8, 32)]
        dense, share = rows[2]["dense_ms"], rows[2]["share_of_dense"]
        times = [milliseconds(row["median_ms"]) for row in rows]
        cells = ["", ""] if dense is None else [milliseconds(dense), f"{100 * share:.{0 if share > 0.1 else 1}f} %"]
        lines.append([tokens(length), *times, *cells])
    return table(lines)


def stages() -> str:
    rows = [find("build", length=LONG, num_proxies=proxies) for proxies in (1, 8)]
    found = {name: [row[f"stage_{name}_ms"] for row in rows] for name in (*STAGES, "other")}
    lines = [[name, *(f"{x:.2f}" for x in values)] for name, values in found.items() if any(values)]
    return table([["stage", "1 proxy", "8 proxies"], *lines])


def calls() -> str:
    """Single calls: the device's time, the wait for one, and the host's time; each figure of its quickest round."""
    kinds = ((CUDNN, None), ("flexproxy", "default"), ("flexproxy", "triton"))
    rounds = sorted({row["round"] for row in results("calls")["rows"]})
    lines = [["tokens", "density", "cuDNN", "flexproxy", "without flash-attn-4"]]
    for length in lengths_of("calls", contender=CUDNN):
        found = [
            [find("calls", round=turn, length=length, contender=name, kernel=kernel) for turn in rounds]
            for name, kernel in kinds
        ]
        times = [[min(row[f"{what}_ms"] for row in rows) for what in ("queued", "waited", "host")] for rows in found]
        cells = [" / ".join(f"{time:.2f}" for time in each) for each in times]
        lines.append([tokens(length), f"{found[1][0]['target_density']:.2f}", *cells])
    return f"{table(lines)}\n\n{measured('calls')}; each figure of the quickest of {len(rounds)} rounds."


def chunks() -> str:
    """A prompt in chunks, and short prompts, to the first token."""
    lines = [["chunks of", "dense", "flexproxy", "gain", "a chunk adds", "pairs of layers share"]]
    wanted = {"part": "chunks", "length": LONG}
    for chunk in sorted({row["chunk"] for row in results("prefill_chunks")["rows"] if row["chunk"]}, reverse=True):
        dense = find("prefill_chunks", chunk=chunk, contender="SDPA cuDNN in two parts", **wanted)
        ours, shared = (find("prefill_chunks", chunk=chunk, density=0.16, share=share, **wanted) for share in (1, 2))
        times = [row["median_ms"] / 1000 for row in (dense, ours, shared)]
        extra = ours["extra_ms_per_chunk"]
        lines.append(
            [
                tokens(chunk) if chunk < LONG else "the whole",
                *(f"{x:.2f} s" for x in times[:2]),
                f"{times[0] / times[1]:.2f} x",
                "" if extra is None else f"{extra:.0f} ms",
                f"{times[0] / times[2]:.2f} x",
            ]
        )
    short = []
    for length in lengths_of("prefill_chunks", contender="flexproxy", part="prefill"):
        dense, ours = (
            find("prefill_chunks", length=length, contender=name, part="prefill") for name in (CUDNN, "flexproxy")
        )
        short.append(f"{tokens(length)} {dense['median_ms'] / ours['median_ms']:.2f} x")
    return (
        f"{table(lines)}\n\n"
        f"{tokens(LONG)} tokens, density 0.16, {measured('prefill_chunks')}. Shorter prompts whole, at 0.15: "
        f"{', '.join(short)}."
    )


def model() -> str:
    lines = [["tokens", "cuDNN", "FlashAttention-2", "density 0.31", "0.16", "0.10", "memory, MiB"]]
    for length in lengths_of("prefill", contender=CUDNN, part="prefill"):
        dense = find("prefill", length=length, contender=CUDNN, part="prefill")
        ours = find("prefill", length=length, contender="flexproxy", part="prefill", density=0.1)
        flash = [
            row["median_ms"]
            for row in results("prefill")["rows"]
            if (row["part"], row["length"], row["contender"], row.get("error")) == ("prefill", length, FLASH, None)
        ]
        times = [dense["median_ms"], *flash[:1], *(_model(length, x) for x in (0.31, 0.16, 0.1))]
        cells = [f"{x / 1000:.2f}" for x in times]
        if not flash:
            cells.insert(1, "")
        lines.append([tokens(length), *cells, f"{ours['peak_mib'] - dense['peak_mib']:+.0f}"])
    step = find("prefill", part="decode")["ratio"] - 1
    longer = "as long as" if abs(step) < 0.005 else f"{100 * step:.1f} % longer than"
    return (
        f"{table(lines)}\n\n{measured('prefill')}. A decoding step behind {tokens(LONG)} tokens takes "
        f"{longer} with sdpa."
    )


def served() -> str:
    """An engine of vLLM, stock and with flexproxy: seconds to the first token."""
    settings = results("vllm")["settings"]
    stock, ours = (find("vllm", part="engine", contender=name) for name in ("FlashAttention", "flexproxy"))
    lines = [["prompt", "stock", "flexproxy", "", "the first such prompt"]]
    named = [(str(length), f"{tokens(length)} tokens") for length in settings["lengths"]]
    for key, name in [*named, ("eight", "eight of 16K tokens at once")]:
        times = [row[f"{key}_ms"] for row in (stock, ours)]
        first = ours[f"{key}_first_ms"]
        lines.append(
            [name, *(f"{x / 1000:.2f} s" for x in times), f"{times[0] / times[1]:.2f} x", f"{first / 1000:.2f} s"]
        )
    equal = find("vllm", part="equality")
    real = [find("vllm", part="real", contender=name) for name in ("FlashAttention", "flexproxy")]
    decode, share = ours["decode_tokens_per_s"], ours["decode_tokens_per_s"] / stock["decode_tokens_per_s"]
    pages = ours["cache_pages"] / stock["cache_pages"]
    return (
        f"{table(lines)}\n\n"
        f"vLLM {ours['vllm']}, flexproxy {flexproxy.__version__}, {measured('vllm')}: the shape of Llama-3.1-8B, "
        f"random weights, density {settings['density']},\n{tokens(settings['tokens'])} tokens a step"
        f"{'' if settings['compiled'] else ', without compilation by vLLM'} and without prefix caching. Decoding "
        f"32 requests: {decode:.0f} tokens a second,\n{100 * (share - 1):+.1f} %; pages of the cache: "
        f"{100 * (pages - 1):+.1f} %; start: {ours['start_s']:.0f} s instead of {stock['start_s']:.0f}. With every "
        f"block kept, a small random model gives {equal['equal_tokens']}\nof {equal['of']} tokens of stock vLLM (four "
        f"prompts of 300 to 9001 tokens, bf16). SmolLM2-135M, {len(real[1]['requests'])} prompts of "
        f"{real[1]['requests'][0][0]} tokens of prose:\n"
        f"{real[0]['bits_per_byte']:.4f} bits per byte with stock vLLM, {real[1]['bits_per_byte']:.4f} with flexproxy "
        f"at a density of {real[1]['density']}."
    )


def steps() -> str:
    """One layer's share of a step of vLLM: milliseconds."""
    lines = [["a step", "build and attention", "with gathering pages and writing the output"]]
    for row in results("vllm")["rows"]:
        if (row["part"], row["contender"], row["error"]) == ("step", "tokens first", None):
            queries, keys = row["requests"][0]
            many = f"{len(row['requests'])} x " if len(row["requests"]) > 1 else ""
            whole = f"{row['step_ms']:.2f} ({100 * row['added']:+.0f} %)"
            lines.append([f"{many}{tokens(queries)} new of {tokens(keys)} tokens", f"{row['call_ms']:.2f}", whole])
    return f"{table(lines)}\n\n{measured('vllm')}."


def cold() -> str:
    states = ("empty", "warm", "warm, and flash-attn-4's")
    first, later, kept = (find("cold", caches=caches) for caches in states)
    return (
        f"The first process waits {first['build_s']:.0f} s for `build` and {first['attention_s']:.0f} s for "
        f"`attention`; a later one {later['build_s']:.1f} s\nand {later['attention_s']:.0f} s, or "
        f"{kept['build_s']:.1f} s and {kept['attention_s']:.0f} s if flash-attn-4 kept its kernels "
        f"({measured('cold')})."
    )


def others() -> str:
    """Other authors' code beside ours at 256K tokens; ours was timed before them and after."""
    find_one = partial(find, "others", length=262144)
    lines = [["code", "density", "choice, ms", "attention, ms", "both, ms"]]
    for title, contender, kernel in (
        ("flexproxy", "flexproxy", "default"),
        ("flexproxy, Triton's kernel", "flexproxy", "triton"),
        ("FlashPrefill, as in transformers", "FlashPrefill native", None),
        ("FlashPrefill, as in vLLM", "FlashPrefill varlen", None),
        ("Prism", "Prism", None),
    ):
        choice = find_one(contender=contender, part="index")
        parts = [choice, *(find_one(contender=contender, part=part, kernel=kernel) for part in ("attention", "total"))]
        times = [milliseconds(row["median_ms"]) for row in parts]
        if kernel:
            again = find_one(contender="flexproxy, again", part="total", kernel=kernel)
            times[-1] += f", {milliseconds(again['median_ms'])}"
        lines.append([title, f"{choice['density']:.3f}", *times])
    return f"{table(lines)}\n\n{measured('others')}."


# Quality


def _quality(method: str, length: int, task: str, setting: str) -> Row:
    return find(QUALITY, method=method, length=length, task=task, setting=setting)


def _lost(length: int, task: str, setting: str) -> tuple[float, float]:
    """What is lost, in percent of the bits or in points of the answers, and what is kept."""
    dense, ours = _quality("dense", length, task, ""), _quality(OURS, length, task, setting)
    if dense["metric"] == "bits_per_byte":
        return 100 * (ours["mean"] / dense["mean"] - 1), ours["density"]
    return 100 * (ours["mean"] - dense["mean"]), ours["density"]


def quality() -> str:
    rows = [row for row in results(QUALITY)["rows"] if row["method"] in SHOWN]
    columns = [(8192, task, "density 0.25") for task in ("prose", "code", "single")]
    text = report.columns_markdown(rows, columns, intervals=False)
    names = {OURS: "**flexproxy**", "flexproxy, as the paper": "ProxyAttn, as its paper", "sink + recent": "no ranking"}
    for name, better in names.items():
        text = text.replace(name, better)
    return text.replace(", 8K, 0.25", "").replace("| single |", "| needles, % |")


def compared(rows: Sequence[Row], own: Sequence[str]) -> list[Row]:
    """Those of other methods, and of flexproxy the named variants; the benchmarks' notebook has the others."""
    return [row for row in rows if row["method"] in own or not row["method"].startswith(("flexproxy", "trial"))]


def _tables(*columns: tuple[int, str, str]) -> str:
    return report.columns_markdown(compared(results(QUALITY)["rows"], OFFERED), columns)


def quality_025() -> str:
    return _tables(*((8192, task, "density 0.25") for task in ("prose", "code", "single")))


def quality_012() -> str:
    return _tables(*((8192, task, "density 0.12") for task in ("prose", "code", "single")))


def quality_needles() -> str:
    return _tables(*((8192, task, "density 0.25") for task in ("multikey", "multivalue", "multiquery")))


def quality_32k() -> str:
    return _tables(*((32768, "prose", f"density {density}") for density in ("0.05", "0.1")))


def quality_needle_model() -> str:
    columns = [(32768, "single", f"density {density}") for density in ("0.05", "0.1")]
    return report.columns_markdown(results("quality_needle")["rows"], columns)


def quality_as_set() -> str:
    return report.lengths_markdown(results(QUALITY)["rows"], "prose")


def quality_gemma() -> str:
    return report.columns_markdown(results("quality_gemma3")["rows"], [(4096, "prose", "density 0.25")])


def density() -> str:
    """What the default settings keep and lose, by length."""
    lengths = lengths_of(QUALITY, method=OURS, setting="defaults", task="prose")
    found = [_lost(length, "prose", "defaults") for length in lengths]
    lines = [
        ["tokens", *map(tokens, lengths)],
        ["blocks kept", *(f"{kept:.2f}" for _, kept in found)],
        ["bits per byte", *(f"{lost:+.1f} %" for lost, _ in found)],
    ]
    return table(lines)


def choosing() -> str:
    """What to expect of a setting, as measured."""
    lines = [["tokens", "goal", "setting", "density", "loss, prose", "code", "needles, points"]]

    def line(length: int, goal: str, setting: str, measured: str) -> None:
        if length not in lengths_of(QUALITY, method=OURS, task="prose", setting=measured):
            return
        cells = []
        for task in ("prose", "code", "single"):
            if length in lengths_of(QUALITY, method=OURS, task=task, setting=measured):
                lost, _ = _lost(length, task, measured)
                cells.append(f"{lost:+.1f}{'' if task == 'single' else ' %'}")
            else:
                cells.append("")
        kept = _quality(OURS, length, "prose", measured)["density"]
        lines.append([tokens(length), goal, setting, f"{kept:.2f}", *cells])

    for length in (8192, 16384, 32768):
        line(length, "quality", "the defaults", "defaults")
    line(8192, "speed", "`density=0.25, min_budget=256`", "density 0.25")
    line(8192, "too low", "`density=0.12, min_budget=256`", "density 0.12")
    line(16384, "speed", "`density=0.15, min_budget=256`", "density 0.15")
    line(32768, "speed, not needles", "`density=0.1, min_budget=256`", "density 0.1")
    line(32768, "too low", "`density=0.05, min_budget=256`", "density 0.05")
    return table(lines, wide=3)


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block
    for block in (
        *(speed, numbers, attention, build, stages, calls, model, chunks, cold, others, served, steps, choosing),
        *(quality, density, quality_025, quality_012, quality_needles, quality_32k, quality_as_set, quality_gemma),
        quality_needle_model,
    )
}


def with_figures(text: str) -> str:
    """A page with every block as the files have it; mkdocs needs a blank line around a table, README does without."""

    def block(match: re.Match[str]) -> str:
        name, blank = match.groups()
        return f"<!-- figures: {name} -->\n{blank}{BLOCKS[name]()}\n{blank}<!-- end -->"

    return _PLACE.sub(block, text)


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        written = with_figures(text)
        if written != text:
            with replacing(page) as unfinished:
                unfinished.write_text(written)
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
