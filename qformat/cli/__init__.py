"""The command line: one module per command, imported on first use."""

from __future__ import annotations

import io
import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import click

from qformat import QFormatError, TypeSpecError, __version__
from qformat.errors import printable

_COMMANDS = {
    "convert": "Convert a checkpoint to one .qf file.",
    "truncate": "Drop layers from a .qf file.",
    "export": "Write a .qf file as GGUF, safetensors or a Hugging Face directory.",
    "inspect": "Show the contents of a .qf file.",
    "quantize-stats": "Measure the error of types on a checkpoint.",
    "types": "List the weight types and their parameters.",
    "verify": "Check .qf files and SHA256SUMS lists.",
    "checksum": "Print lines for a SHA256SUMS list.",
}


class _Commands(click.Group):
    """Group that imports the module of a command on demand and prints expected errors as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"qformat.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx  # listed without importing the modules
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = printable(error.message)  # type: ignore[misc]
            raise
        except TypeSpecError as error:
            raise click.UsageError(str(error)) from None
        except QFormatError as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt as interrupt:
            ctx.exit(_interrupted(interrupt))
        except BrokenPipeError:  # the reader of the output has gone, as head does: no sign of damage
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(128 + signal.SIGPIPE)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(printable(f"{where}{error.strerror or error}")) from None
        except MemoryError:
            raise click.ClickException("not enough memory; try a smaller --jobs") from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qformat")
def cli() -> None:
    """Model checkpoints in one small, versioned, checksummed file.

    Every command has its own --help. Exit status: 0 success, 1 error, 2 wrong usage, 130 interrupted.
    """


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which unwinds as Ctrl-C does: what is not kept for a later run is removed."""


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    del signum, frame
    raise _Terminated


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    """Say that a run was interrupted, and what it leaves; return the exit status, which is that of shells."""
    notes = "; ".join(getattr(interrupt, "__notes__", []))
    click.echo(f"Interrupted: {printable(notes)}" if notes else "Interrupted", err=True)
    return 128 + (signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT)


def _open_closed() -> None:
    """Open standard streams that the calling process has closed: files would get their descriptors, and be written to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def main() -> None:
    """Run the command line."""
    _open_closed()
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the terminal may be unable to encode a name
            stream.reconfigure(errors="backslashreplace")
    try:
        cli(prog_name="qformat")
    except KeyboardInterrupt as interrupt:  # outside of a command
        sys.exit(_interrupted(interrupt))
    finally:
        _settle()


def _settle() -> None:
    """Discard output that cannot be written, so that the interpreter does not retry at exit and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
