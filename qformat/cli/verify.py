"""``qformat verify``."""

from __future__ import annotations

import sys

import click

from qformat.cli.common import Command, echo_json, jobs_option, progress_bar, warn
from qformat.container.verify import Damage, FileReport, bytes_to_check, verify
from qformat.errors import printable
from qformat.parallel import default_jobs


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--quick", is_flag=True, help="Check only the header, index and trailer of .qf files, not the bytes of the tensors."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@jobs_option
def command(files: tuple[str, ...], quick: bool, as_json: bool, jobs: int | None) -> None:
    """Check that FILES are complete and undamaged.

    Each of FILES is a .qf file, every byte of which is checked and whose damaged tensors are named, or a list in the format of
    sha256sum, whose files are found relative to the list. Exit status: 0 if all files are intact, 1 otherwise.
    """
    paths = list(files)
    with progress_bar("verifying", 0 if quick else bytes_to_check(paths), as_bytes=True) as advance:
        reports = verify(paths, quick=quick, jobs=jobs or default_jobs(), progress=advance)
    good = all(report.ok for report in reports)
    if as_json:
        echo_json({"ok": good, "files": [_to_json(report) for report in reports]})
    else:
        for report in reports:
            _echo(report, "index OK, tensors not checked" if quick and report.root else "OK")
    sys.exit(0 if good else 1)


def _echo(report: FileReport, good: str) -> None:
    click.echo(f"{printable(report.path)}: {good if report.ok else 'FAILED'}")
    for damage in report.errors:
        click.echo(f"  {printable(_place(damage) + damage.what)}")
    if report.outdated:
        warn(f"{report.path} was written as an older format version: convert again for better results")


def _place(damage: Damage) -> str:
    if damage.asset is not None:
        return f"asset {damage.asset!r}: "
    return "" if damage.tensor is None else f"tensor {damage.tensor!r}, segment {damage.segment!r}: "


def _to_json(report: FileReport) -> dict[str, object]:
    errors = [{"tensor": d.tensor, "asset": d.asset, "segment": d.segment, "what": d.what} for d in report.errors]
    return {"path": report.path, "ok": report.ok, "root_sha256": report.root, "errors": errors}
