"""The command line: a file for every command, which is imported when the command line runs.

Typer and rich are needed here and nowhere else in flexproxy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import flexproxy

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as _error:
    if _error.name is None or _error.name.partition(".")[0] not in ("typer", "rich", "click"):
        raise
    _missing: str | None = _error.name
else:
    _missing = None

_INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        print(flexproxy.__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """ProxyAttn block-sparse prefill for PyTorch FlexAttention."""


def _app() -> typer.Typer:
    from flexproxy.cli.commands.calibrate import calibrate
    from flexproxy.cli.commands.demo import demo
    from flexproxy.cli.commands.info import info
    from flexproxy.cli.commands.inspect import inspect

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_options)
    app.command()(calibrate)
    app.command()(demo)
    app.command()(info)
    app.command()(inspect)
    return app


def _no_stdout(error: OSError) -> int:
    """What was printed cannot be written: a full disk is said, a pipe that nobody reads any more is not."""
    # Python tries again at its end, and must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        print(f"flexproxy: cannot write to stdout: {error.strerror}", file=sys.stderr)
    return 1


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 (not possible here: a GPU, a compiler, a package, memory or space on a disk is missing),
        2 (misuse) or 130 (interrupted).
    """
    if _missing is not None:
        print(f'flexproxy: {_missing} is not installed: pip install "flexproxy[cli]"', file=sys.stderr)
        return 1
    args = sys.argv[1:] if args is None else list(args)
    try:
        code: Any = _app()(args or ["--help"], prog_name="flexproxy", standalone_mode=False)
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # not stdout, so a bug
            raise
        return _no_stdout(error)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        # What typer calls a usage error; its classes have moved from release to release.
        if not hasattr(error, "format_message"):
            raise
        print(f"flexproxy: {' '.join(error.format_message().split())}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    if code == _INTERRUPTED:
        print("flexproxy: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0
