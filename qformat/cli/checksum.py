"""``qformat checksum``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress

import click

from qformat.cli.common import Command
from qformat.container.reader import ContainerReader
from qformat.container.sums import sums_line
from qformat.container.verify import sha256_of
from qformat.errors import FormatError, printable


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True)
def command(files: tuple[str, ...]) -> None:
    """Print the SHA-256 of each of FILES in the format of sha256sum, which qformat verify reads as well.

    The shards of a .qf file follow it.
    """
    failed = False
    for path in dict.fromkeys(beside for file in files for beside in (file, *_shards(file))):
        try:
            digest = sha256_of(path)
        except OSError as error:
            failed = True
            click.echo(f"Error: {printable(path)}: {error.strerror or error}", err=True)
            continue
        click.echo(os.fsencode(sums_line(path, digest)))  # file names are bytes in any encoding
    sys.exit(1 if failed else 0)


def _shards(file: str) -> Iterator[str]:
    """Yield the shards of a container, with the directory as it was given; any other file has none."""
    with suppress(FormatError, OSError), ContainerReader(file, alone=True) as container:
        for shard in container.index.shards:
            yield os.path.join(os.path.dirname(file), shard.name)  # noqa: PTH118, PTH120  a Path would drop ./
