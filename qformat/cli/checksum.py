"""``qformat checksum``."""

from __future__ import annotations

import os
import sys

import click

from qformat.container.verify import sha256_of, sums_line


@click.command()
@click.argument("files", nargs=-1, required=True)
def command(files: tuple[str, ...]) -> None:
    """Print the SHA-256 of each of FILES in the format of sha256sum, which qformat verify reads as well."""
    failed = False
    for path in files:
        try:
            digest = sha256_of(path)
        except OSError as error:
            failed = True
            click.echo(f"Error: {path}: {error.strerror or error}", err=True)
            continue
        click.echo(os.fsencode(sums_line(path, digest)))  # file names are bytes in any encoding
    sys.exit(1 if failed else 0)
