"""Whether a release would be right: build it, look into it, and use it where nothing else is.

    make release-check

Builds the sdist, and the wheel from it. The wheel holds the package and nothing besides, no file larger than 1 MB. Its
metadata is what an index takes. Installed alone in a new environment, with torch and einops but without triton and
transformers, it imports, its command says in one line what it lacks, and the quickstart runs outside of the checkout.
Needs the packages build and twine, and an index that pip can reach.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 1_000_000
SUFFIXES = (".py", ".typed")
# What is not there in the new environment. torch's CUDA builds bring triton, so it is taken away again.
ABSENT = ("triton", "transformers", "safetensors", "matplotlib", "typer", "rich")


def problems_of(wheel: Path) -> list[str]:
    """What a wheel holds and should not, a line each."""
    problems = []
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename)
            top = name.parts[0]
            if top != "flexproxy" and not (top.startswith("flexproxy-") and top.endswith(".dist-info")):
                problems.append(f"{name} is not part of the package")
            elif top == "flexproxy" and name.suffix not in SUFFIXES:
                problems.append(f"{name} is not code")
            if entry.file_size > MAX_BYTES:
                problems.append(f"{name} has {entry.file_size:,} bytes, more than {MAX_BYTES:,}")
        names = set(archive.namelist())
    problems += [f"{name} is missing" for name in ("flexproxy/__init__.py", "flexproxy/py.typed") if name not in names]
    return problems


def missing_from(sdist: Path) -> list[str]:
    """What README links to and the sdist does not hold."""
    with tarfile.open(sdist) as archive:
        files = [PurePosixPath(*PurePosixPath(name).parts[1:]) for name in archive.getnames()]
    held = {str(path) for file in files for path in (file, *file.parents)}
    links = re.findall(r'(?:\]\(|src="|srcset=")(?!https?://|#)([^)#"]+)', (ROOT / "README.md").read_text())
    return sorted({link for link in links if link.rstrip("/") not in held})


def say(what: str) -> None:
    print(f"-- {what}", flush=True)


def run(command: Sequence[str | Path], where: Path, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command without what the surroundings set; ends the check if it does not exit as expected."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=where, env=clean, capture_output=True, text=True)
    if done.returncode != expected:
        raise SystemExit(
            f"release check: {' '.join(map(str, command))}: expected exit code {expected}, got {done.returncode}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist and the wheel, which is built from the sdist."""
    run([sys.executable, "-m", "build", "--outdir", folder], ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def check_files(sdist: Path, wheel: Path, folder: Path) -> None:
    if problems := problems_of(wheel):
        raise SystemExit("release check: the wheel\n" + "\n".join(problems))
    if missing := missing_from(sdist):
        raise SystemExit(f"release check: the sdist: expected all that README links to, got none of {missing}")
    run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], folder)
    print(f"   {wheel.name} {wheel.stat().st_size:,} bytes, {sdist.name} {sdist.stat().st_size:,} bytes")


def check_alone(wheel: Path, folder: Path) -> None:
    """The wheel in a new environment, with what it depends on and nothing else."""
    venv.create(folder / "alone", with_pip=True)
    binaries = folder / "alone" / ("Scripts" if os.name == "nt" else "bin")
    python, command = binaries / "python", binaries / "flexproxy"
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "-c", ROOT / "constraints.txt", wheel], folder)
    run([*pip, "uninstall", "--yes", "triton"], folder)
    found = {package["name"].lower() for package in json.loads(run([*pip, "list", "--format", "json"], folder).stdout)}
    if present := sorted(found & set(ABSENT)):
        raise SystemExit(f"release check: flexproxy alone: expected none of {', '.join(ABSENT)}, got {present}")

    say("import, and the command without what it needs")
    where = run([python, "-c", "import flexproxy; print(flexproxy.__file__)"], folder).stdout.strip()
    if not Path(where).is_relative_to(folder):
        raise SystemExit(f"release check: expected the installed package, got {where}")
    run([command, "--help"], folder)
    said = run([command, "info"], folder, expected=1).stderr
    lines = [line for line in said.splitlines() if line.startswith("flexproxy")]  # torch warns where there is no numpy
    if len(lines) != 1 or 'pip install "flexproxy[hf]"' not in lines[0] or "Traceback" in said:
        raise SystemExit(f"release check: flexproxy info: expected one line, what to install, got\n{said}")
    print(f"   {lines[0]}")

    say("quickstart, outside of the checkout")
    (folder / "quickstart.py").write_bytes((ROOT / "examples" / "quickstart.py").read_bytes())
    print(run([python, "quickstart.py"], folder).stdout.rstrip())

    say("flexproxy info, with the command's own packages")
    run([*pip, "install", "-c", ROOT / "constraints.txt", "typer", "rich"], folder)
    packages = json.loads(run([command, "info", "--json"], folder).stdout)["packages"]
    missing = {name: package["needed_for"] for name, package in packages.items() if package["version"] is None}
    if not {"triton", "transformers", "matplotlib"} <= missing.keys():
        raise SystemExit(f"release check: flexproxy info: expected what is missing, got {sorted(missing)}")
    for name, cost in missing.items():
        print(f"   {name} is missing, needed for {cost}")
    if run([command, "info"], folder).stdout.count("missing") < len(missing):
        raise SystemExit("release check: flexproxy info: expected 'missing' beside each missing package")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="flexproxy-release-") as name:
        folder = Path(name).resolve()
        say("build")
        sdist, wheel = build(folder / "dist")
        check_files(sdist, wheel, folder)
        say("install the wheel alone")
        check_alone(wheel, folder)
    print("release check: passed")


if __name__ == "__main__":
    main()
