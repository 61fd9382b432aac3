"""The command line: a file for every command, which is imported when the command line runs.

The commands need typer and rich, which nothing else in flexproxy does; ``--help`` and ``--version`` do without.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch

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
_ABOUT = "ProxyAttn block-sparse prefill for PyTorch FlexAttention."
_COMMANDS = {
    "calibrate": "Choose the density of every layer of a model, from a few texts.",
    "compare": "Prefill a text with a model, dense and with a few settings: density, agreement, loss and time of each.",
    "demo": "Prefill a real text with a small trained model, dense and with flexproxy, and compare.",
    "info": "Show versions, devices, and what flexproxy picks on each: the estimate and the kernel options, and why.",
    "inspect": "Prefill a text with a model, and show what every layer keeps and how long its attention takes.",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(flexproxy.__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """The options before a command."""


def _app() -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback(help=_ABOUT)(_options)
    for name, about in _COMMANDS.items():
        app.command(name, help=about)(getattr(importlib.import_module(f"flexproxy.cli.commands.{name}"), name))
    return app


def _without_typer(args: Sequence[str]) -> int:
    """Help and version; for a command, what to install."""
    install = f'{_missing} is not installed: pip install "flexproxy[hf]"'
    if args == ["--version"]:
        print(flexproxy.__version__)
    elif not args or "--help" in args:
        commands = "\n".join(f"  {name:<11}{about}" for name, about in _COMMANDS.items())
        print(f"Usage: flexproxy COMMAND [OPTIONS]\n\n{_ABOUT}\n\n{commands}\n\nTo run them: {install}")
    else:
        print(f"flexproxy: {install}", file=sys.stderr)
        return 1
    return 0


def _no_stdout(error: OSError) -> int:
    """stdout cannot be written to. A full disk is reported, a pipe whose reader has gone is not."""
    # Python flushes stdout again at exit, which must not fail again.
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
    args = sys.argv[1:] if args is None else list(args)
    if _missing is not None:
        return _without_typer(args)
    from flexproxy.calibration import CalibrationError
    from flexproxy.cli.inputs import ImpossibleError, InputError

    try:
        code: Any = _app()(args or ["--help"], prog_name="flexproxy", standalone_mode=False)
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # not stdout, so a bug
            raise
        return _no_stdout(error)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except ImpossibleError as error:
        return _say(error, 1)
    except (InputError, CalibrationError) as error:
        return _say(error, 2)
    except torch.OutOfMemoryError:
        return _say("out of memory; use a lower --length, or another --device", 1)
    except Exception as error:
        # A usage error; typer's class for it has moved from release to release.
        if not hasattr(error, "format_message"):
            raise
        return _say(error.format_message(), 2)
    return _say("interrupted", code) if code == _INTERRUPTED else int(code or 0)


def _say(message: object, code: int) -> int:
    print(f"flexproxy: {' '.join(str(message).split())}", file=sys.stderr)
    return code
