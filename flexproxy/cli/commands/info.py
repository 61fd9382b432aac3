"""``flexproxy info``."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexproxy.cli.common import AsJson


def info(
    as_json: AsJson = False,
) -> None:
    from flexproxy.environment import collect

    data = collect()
    if as_json:
        print(json.dumps(data, indent=2))
        return
    console = Console(highlight=False)
    table = Table(title=f"flexproxy {data['flexproxy']}, Python {data['python']}, {data['platform']}")
    for heading in ("package", "version", "needed for"):
        table.add_column(heading)
    for name, package in data["packages"].items():
        missing = "" if package["version"] else f"\n{escape(package['install'])}"
        table.add_row(name, package["version"] or "[bold]missing[/]", package["needed_for"] + missing)
    compiler = data["cpp_compiler"]
    table.add_row(compiler["name"], compiler["path"] or "[bold]missing[/]", "compiled attention on a CPU")
    console.print(table)

    shape = ", ".join(f"{name} {size}" for name, size in data["shape"].items())
    table = Table(title=f"The estimate, and the options of flex_attention for {shape}")
    for heading in ("device", "for", "picked", "why"):
        table.add_column(heading)
    for entry in data["devices"]:
        memory = "" if entry["memory_gib"] is None else f", {entry['memory_gib']} GiB"
        options = ", ".join(f"{key}={value}" for key, value in entry["kernel_options"].items()) or "torch's own"
        why = {name: escape(reason) for name, reason in entry["why"].items()}
        table.add_row(f"{entry['device']}: {entry['name']}{memory}", "estimate", entry["estimate"], why["estimate"])
        table.add_row("", f"attention, {entry['dtype']}", options, why["kernel_options"], end_section=True)
    console.print(table)
    if len(data["devices"]) == 1:
        console.print("No CUDA device: everything runs on the CPU.")
