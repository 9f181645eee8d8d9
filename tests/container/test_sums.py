"""Lists of SHA-256 digests in every form that other tools print."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.container.sums import Entry, is_list, parse, sums_line
from qformat.container.verify import verify
from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.pipeline.recipe import Recipe
from tests.helpers.cli import invoke

H = hashlib.sha256(b"abc").hexdigest()
SIGNED = (
    f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n{H}  m.bin\n- {H}  -x\n-----BEGIN PGP SIGNATURE-----\n\niQ==\n"
    "-----END PGP SIGNATURE-----\n"
)
FORMS = {
    "sha256sum": f"{H}  m.bin\n",
    "binary": f"{H} *m.bin\n",
    "line ends of Windows": f"{H}  m.bin\r\n",
    "upper case": f"{H.upper()}  m.bin\n",
    "one space": f"{H} m.bin\n",
    "tab": f"{H}\tm.bin\n",
    "tag": f"SHA256 (m.bin) = {H}\n",
    "OpenSSL 1": f"SHA256(m.bin)= {H}\n",
    "OpenSSL 3": f"SHA2-256(m.bin)= {H}\n",
    "byte order mark": f"\ufeff{H}  m.bin\n",
    "comment": f"# reviewed\n\n{H}  m.bin\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_list_is_read_in_the_form_of(form):
    data = FORMS[form].encode()
    assert is_list(data)
    assert [(entry.name, entry.digest, entry.problem) for entry in parse(data)] == [("m.bin", H, "")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_list_that_powershell_wrote_in_utf16_is_read(encoding):
    text = ("" if encoding == "utf-16" else "\ufeff") + f"{H}  m.bin\r\n"
    assert list(parse(text.encode(encoding))) == [Entry(1, "m.bin", H)]


def test_the_text_of_a_signed_list_is_read_without_its_frame():
    assert is_list(SIGNED.encode())
    assert list(parse(SIGNED.encode())) == [Entry(4, "m.bin", H), Entry(5, "-x", H)]


def test_lines_of_a_list_that_cannot_be_checked_are_named():
    sha512 = hashlib.sha512(b"x").hexdigest()
    data = f"{sha512}  m.bin\n{H}\nMD5 (m.bin) = {'0' * 32}\nnonsense\n{H}  good\n".encode()
    assert is_list(data)
    other = "has a digest that is not SHA-256, and only that can be checked"
    assert [entry.problem for entry in parse(data)] == [
        other, "has a digest, but no name of a file", other, "is not of the form 'SHA256  NAME'", "",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a b", " a", "*a", "a\nb", "a\\b", "a\rb", "\udcff", "(a) = b"])
def test_names_come_back_from_the_lines_that_are_printed(name):
    assert list(parse(sums_line(name, H).encode("utf-8", "surrogateescape") + b"\n")) == [Entry(1, name, H)]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"# only a comment\n", b"\x89QFMT", b"{}", b"abc  m.bin\n"])
def test_other_files_are_no_lists(data):
    assert not is_list(data)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
@pytest.mark.parametrize("options", [[], ["--tag"], ["--binary"]])
def test_lists_of_sha256sum_are_checked(options, tmp_path):
    for name in ("m.bin", "a\nb", "c\\d"):
        (tmp_path / name).write_bytes(name.encode())
    done = subprocess.run(
        ["sha256sum", *options, "m.bin", "a\nb", "c\\d"], cwd=tmp_path, capture_output=True, check=True
    )
    (tmp_path / "SUMS").write_bytes(done.stdout)
    reports = verify([str(tmp_path / "SUMS")])
    assert [(Path(report.path).name, report.ok) for report in reports] == [
        ("m.bin", True),
        ("a\nb", True),
        ("c\\d", True),
    ]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    qformat.save_file({f"w{i}": np.full((64, 64), i, np.float32) for i in range(3)}, tmp_path / "x.qf", "f32")
    convert(open_checkpoint(tmp_path / "x.qf"), tmp_path / "m.qf", Recipe.parse("f32"), shard_size=17_000)
    return tmp_path


def test_checksum_lists_a_head_with_its_shards(sharded):
    lines = invoke("checksum", sharded / "m.qf").stdout.splitlines()
    assert len(lines) == 4
    assert [Path(line[66:]).parent for line in lines] == [sharded] * 4
    assert lines[0][66:] == str(sharded / "m.qf")


@pytest.mark.parametrize("listed", [1, 4])
@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_list_with_a_head_covers_its_shards(listed, harm, sharded):
    lines = invoke("checksum", sharded / "m.qf").stdout.splitlines()
    (sharded / "SUMS").write_text("\n".join(lines[:listed]) + "\n")
    assert all(report.ok for report in verify([str(sharded / "SUMS")]))
    assert len(verify([str(sharded / "SUMS")])) == 4
    shard = Path(lines[2][66:])
    if harm == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[5000] ^= 1
        shard.write_bytes(data)
    reports = verify([str(sharded / "SUMS")])
    assert [report.path for report in reports if not report.ok] == [str(shard)]
